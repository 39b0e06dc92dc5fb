"""The metadata store: its interface, and the implementation with SQLite."""
