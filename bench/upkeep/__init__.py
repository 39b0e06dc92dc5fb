"""Garbage collection and eviction in stores of growing size, and what they cost clients meanwhile."""
