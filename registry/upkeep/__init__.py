"""The work of upkeep on a registry and its mirrors, for the server and for commands."""
