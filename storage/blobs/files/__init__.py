"""Blobs, upload sessions, and partial blobs (blobs that are still being downloaded) as files in the data directory."""
