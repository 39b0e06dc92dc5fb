"""Reads an image with all its manifests and blobs (`read_tree`) from a *source*: an OCI layout or a docker archive."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Final

from registry.upkeep.images.found_images import FoundContent, FoundImage
from storage.backups import ImageFileFailed
from storage.content import Descriptor, Manifest
from storage.names import Digest

MAX_DEPTH: Final = 8
"""Largest number of levels of manifests in one image. (An index can list other indexes.)"""


@dataclass(slots=True)
class ImageTree:
    """An image with its manifests and blobs.

    - `root`: the manifest or index of the whole image.
    - `manifests`: all manifests of the image, with `root`. An index comes after the manifests that it lists.
    - `missing`: digests of the manifests that an index lists, but that this image leaves out, because the source lacks
      the manifest or one of its blobs."""

    root: Manifest
    manifests: dict[Digest, Manifest] = field(default_factory=dict)
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)
    missing: list[Digest] = field(default_factory=list)


def read_tree(content: FoundContent, image: FoundImage) -> ImageTree:
    """Reads the manifests of an image, and removes the `missing` ones from the indexes that list them. (`docker save`
    writes only the platforms that docker has pulled.) Blocks. Raises ImageFileFailed."""
    root = content.manifest(image.digest, image.media_type)
    if root is None:
        raise ImageFileFailed(f"{content.source.label} is incomplete: it has no manifest {image.digest}")
    tree = ImageTree(root)
    tree.root = _add_manifest(content, tree, root, MAX_DEPTH)
    return tree


def _add_manifest(content: FoundContent, tree: ImageTree, manifest: Manifest, depth: int) -> Manifest:
    """Adds a manifest to `tree`, with the manifests and blobs that it lists, and returns it. If some of the listed
    manifests are `missing`, adds and returns an index without them instead. `depth`: how many levels of manifests are
    still allowed, including the level of `manifest`. Raises ImageFileFailed."""
    if depth == 0:
        raise ImageFileFailed(f"{content.source.label} has indexes in indexes, more than {MAX_DEPTH} deep")
    replacement_by_digest: dict[str, Manifest | None] = {}
    for entry in manifest.manifests:
        if entry.digest in manifest.blob_children:  # indexes of BuildKit's build cache list blobs
            tree.blobs.setdefault(entry.digest, entry)
            continue
        child = content.manifest(entry.digest, entry.media_type)
        replacement = (
            None if child is None or not _has_blobs(content, child) else _add_manifest(content, tree, child, depth - 1)
        )
        if replacement is None:
            tree.missing.append(entry.digest)
        if replacement is None or replacement.digest != entry.digest:
            replacement_by_digest[entry.digest] = replacement
    if replacement_by_digest:
        manifest = _with_replacements(content, manifest, replacement_by_digest)
    for blob in manifest.blobs:
        if blob.digest not in manifest.foreign:
            tree.blobs.setdefault(blob.digest, blob)
    tree.manifests[manifest.digest] = manifest
    return manifest


def _has_blobs(content: FoundContent, manifest: Manifest) -> bool:
    """Returns whether the source contains all blobs of the manifest except foreign ones. `docker save` may write the
    manifest of a platform that docker has not pulled, without its blobs."""
    needed_digests = [blob.digest for blob in manifest.blobs if blob.digest not in manifest.foreign]
    return all(content.source.size(content.file_of(digest)) is not None for digest in needed_digests)


def _with_replacements(
    content: FoundContent, index: Manifest, replacement_by_digest: dict[str, Manifest | None]
) -> Manifest:
    """Returns the index with replaced or removed entries. `replacement_by_digest`: for the digest of each such entry,
    the manifest that the new index lists instead; None to remove the entry. Raises ImageFileFailed if no entry is
    left."""
    document = json.loads(index.body)
    entries = []
    for entry in document["manifests"]:
        replacement = replacement_by_digest.get(entry["digest"])
        if replacement is not None:
            entries.append({**entry, "digest": replacement.digest, "size": len(replacement.body)})
        elif entry["digest"] not in replacement_by_digest:
            entries.append(entry)
    if not entries:
        raise ImageFileFailed(
            f"{content.source.label} is incomplete: it has nothing that the index {index.digest} lists"
        )
    document["manifests"] = entries
    return Manifest.parse(json.dumps(document).encode(), index.media_type)
