"""The registry that stores what clients push: it combines a metadata store and a blob store."""
