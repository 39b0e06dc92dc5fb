"""The metadata store, which knows which content exists: its interface, and the implementation with SQLite."""
