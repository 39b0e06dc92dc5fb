"""The registry that stores what clients push. It combines a metadata store and a blob store."""
