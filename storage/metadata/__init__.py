"""The metadata store, which records which content exists: its interface, and the implementation with SQLite."""
