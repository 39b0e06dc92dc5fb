"""Real container clients for tests. Each has its own daemon, configuration and storage."""
