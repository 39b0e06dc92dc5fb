"""Servers and the machine they run on."""
