"""Reads an image in an OCI layout or docker archive, with all its manifests and blobs (`read_tree`)."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Final

from registry.upkeep.images.found_images import FoundContent, FoundImage
from storage.backups import ImageFileFailed
from storage.content import Descriptor, Manifest
from storage.names import Digest

MAX_DEPTH: Final = 8
"""Largest number of levels of manifests in one image. An index can list indexes, which can list further indexes."""


@dataclass(slots=True)
class ImageTree:
    """An image with its manifests and blobs. `manifests`: all manifests of the image; an index comes after the
    manifests that it lists. `missing`: digests of the listed manifests that are not in the file, or whose blobs are not
    in the file."""

    root: Manifest
    manifests: dict[Digest, Manifest] = field(default_factory=dict)
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)
    missing: list[Digest] = field(default_factory=list)


def read_tree(content: FoundContent, image: FoundImage) -> ImageTree:
    """Reads the manifests of an image. Removes manifests that are `missing` in the file from the indexes that list
    them: `docker save` writes only the platforms that docker has pulled. Blocks. Raises ImageFileFailed."""
    root = content.manifest(image.digest, image.media_type)
    if root is None:
        raise ImageFileFailed(f"{content.source.label} is incomplete: it has no manifest {image.digest}")
    tree = ImageTree(root)
    tree.root = _add_manifest(content, tree, root, MAX_DEPTH)
    return tree


def _add_manifest(content: FoundContent, tree: ImageTree, manifest: Manifest, depth: int) -> Manifest:
    """Adds a manifest to `tree`, with the manifests and blobs that it lists. `depth`: how many levels of manifests are
    still allowed, including the level of `manifest`. Returns `manifest`. If the file lacks some of the listed
    manifests, adds and returns an index of the other listed manifests instead."""
    if depth == 0:
        raise ImageFileFailed(f"{content.source.label} has indexes in indexes, more than {MAX_DEPTH} deep")
    replaced: dict[str, Manifest | None] = {}
    for entry in manifest.manifests:
        if entry.digest in manifest.blob_children:  # the index lists a blob, as those of BuildKit's build cache do
            tree.blobs.setdefault(entry.digest, entry)
            continue
        child = content.manifest(entry.digest, entry.media_type)
        replacement = (
            None if child is None or not _has_blobs(content, child) else _add_manifest(content, tree, child, depth - 1)
        )
        if replacement is None:
            tree.missing.append(entry.digest)
        if replacement is None or replacement.digest != entry.digest:
            replaced[entry.digest] = replacement
    if replaced:
        manifest = _without_missing(content, manifest, replaced)
    for blob in manifest.blobs:
        if blob.digest not in manifest.foreign:
            tree.blobs.setdefault(blob.digest, blob)
    tree.manifests[manifest.digest] = manifest
    return manifest


def _has_blobs(content: FoundContent, manifest: Manifest) -> bool:
    """Returns whether the file contains all blobs of a listed manifest, except foreign blobs. Blobs can be missing:
    for a platform that docker has not pulled, containerd may have only the manifest, and `docker save` writes this
    manifest."""
    needed_digests = [blob.digest for blob in manifest.blobs if blob.digest not in manifest.foreign]
    return all(content.source.size(content.file_of(digest)) is not None for digest in needed_digests)


def _without_missing(content: FoundContent, index: Manifest, replaced: dict[str, Manifest | None]) -> Manifest:
    """Returns the index with changed entries. `replaced`: for the digest of each entry to change, the manifest to list
    instead; None: the new index does not have the entry. Raises ImageFileFailed if no entry is left."""
    document = json.loads(index.body)
    entries = []
    for entry in document["manifests"]:
        replacement = replaced.get(entry["digest"])
        if replacement is not None:
            entries.append({**entry, "digest": replacement.digest, "size": len(replacement.body)})
        elif entry["digest"] not in replaced:
            entries.append(entry)
    if not entries:
        raise ImageFileFailed(
            f"{content.source.label} is incomplete: it has nothing that the index {index.digest} lists"
        )
    document["manifests"] = entries
    return Manifest.parse(json.dumps(document).encode(), index.media_type)
