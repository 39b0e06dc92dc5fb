"""Unit tests: each tests one part of the program, within one process."""
