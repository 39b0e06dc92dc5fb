"""Finds the paths of the files of an opened registry."""

from __future__ import annotations

from storage.blobs.files.file_blob_store import FileBlobStore
from storage.data_dir.layout import Layout
from storage.store.stored_registry import StoredRegistry


def layout_behind(registry: StoredRegistry) -> Layout:
    """Returns the paths of a registry whose blobs are files."""
    assert isinstance(registry.blobs, FileBlobStore)
    return registry.blobs.layout
