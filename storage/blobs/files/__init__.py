"""Blobs, upload sessions and partial blobs as files in the data directory."""
