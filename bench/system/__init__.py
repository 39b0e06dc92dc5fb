"""Runs servers and other programs, and measures them and the machine."""
