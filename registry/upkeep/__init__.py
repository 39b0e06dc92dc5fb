"""Upkeep: the background jobs that maintain a registry and its mirrors, for the server and for commands."""
