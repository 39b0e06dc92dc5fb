"""Real container clients, each with its own daemon, configuration and storage."""
