"""Background work on a data directory: garbage collection, and watching the free disk space."""
