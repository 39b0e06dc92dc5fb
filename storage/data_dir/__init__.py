"""The data directory: paths, locks between processes, durable file operations, and disk space reserved for a full
disk."""
