"""Content for the pages, written into the store of a data directory: hosted repositories and cached ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from storage.content import Descriptor, Manifest, digest_of
from storage.names import RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import BY, LAYER_TYPE, descriptor_of, image_of, index_of

LAYER_BYTES = 5 * 1024 * 1024


async def add_cached(store: StoredRegistry, repo: str, *tags: str, of: str = "") -> Manifest:
    """Stores an image as a mirror does, which needs none of its blobs. Its only layer has `LAYER_BYTES`, as the
    manifest states. `of` makes it another image."""
    manifest = _image(of)
    await store.put_manifest(RepositoryName(repo), manifest, [Tag(tag) for tag in tags], by=BY, sparse=True)
    return manifest


async def add_index(store: StoredRegistry, repo: str, tag: str, platforms: Iterable[tuple[str, str]]) -> Manifest:
    """Stores an index of which no image is here."""
    children = [
        replace(_image(f"{os} {arch}").descriptor, platform={"os": os, "architecture": arch}) for os, arch in platforms
    ]
    manifest = index_of(children)
    await store.put_manifest(RepositoryName(repo), manifest, [Tag(tag)], by=BY, sparse=True)
    return manifest


def _image(of: str) -> Manifest:
    config = descriptor_of(f"config {of}".encode(), "application/vnd.oci.image.config.v1+json")
    return image_of(config, [Descriptor(LAYER_TYPE, digest_of(f"layer {of}".encode()), LAYER_BYTES)])
