"""Servers, programs and the machine they run on."""
