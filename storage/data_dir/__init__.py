"""The data directory: its layout, locks between processes, durable file operations, the reserve for a full disk."""
