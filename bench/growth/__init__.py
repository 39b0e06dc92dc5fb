"""Stores of growing size, and how that changes requests and the start."""
