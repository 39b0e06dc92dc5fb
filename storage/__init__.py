"""What registry content is and how it is kept. Knows no HTTP; usable without a web framework."""
