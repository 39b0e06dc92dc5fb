"""What the book says, against the code: every page in both languages, its links, its blocks and its commands."""
