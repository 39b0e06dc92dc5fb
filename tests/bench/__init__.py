"""Tests of the bench's own arithmetic: a wrong figure would be believed."""
