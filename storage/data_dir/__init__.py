"""The data directory: paths, locks between processes, durable file operations, and disk space that is reserved for
deletes on a full disk."""
