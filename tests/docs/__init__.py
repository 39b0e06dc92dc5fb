"""Tests of the book (the documentation in docs/): all pages in both languages, their links, their blocks of code, and
their commands."""
