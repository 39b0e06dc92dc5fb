"""Exports images into a file or directory (`export_images`). The images are pushed images, or images that this registry
mirrors from an upstream. The export fetches mirrored content that is not cached yet."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Final

from registry.mirror.warm.targets import Platform, choose_manifests, platform_name
from registry.router import Router
from registry.upkeep.images.image_file_writers import Document, ImageFileWriter
from registry.upkeep.images.image_files import (
    DOCKER_CONFIG,
    IMAGE_NAME_ANNOTATION,
    OCI_CONFIG,
    REF_NAME_ANNOTATION,
    blob_file,
)
from storage.content import INDEXES, Descriptor, Manifest
from storage.errors import ManifestUnknown, Unsupported
from storage.interface import Registry
from storage.jobs import JSON
from storage.names import Digest, ImageReference, RepositoryName, Tag
from storage.upkeep.reporter import Reporter

MAX_DEPTH: Final = 8
"""A limit for two things:

- The levels of manifests in an image, because an index may list indexes. An image with more levels is not exported.
- The levels of referrers, because a referrer may have referrers. The export leaves out further levels."""
_REFERRERS_PER_PAGE: Final = 100
"""Largest number of referrers that are read from the registry with one call."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options that say which content is exported.

    - `platforms`: the platforms that are exported of each image that is an index. None: all platforms.
    - `with_referrers`: whether the referrers of exported manifests, such as signatures and SBOMs, are exported.
    - `for_docker`: whether the result is also a docker archive. In a docker archive, each image has one platform."""

    platforms: Sequence[Platform] | None = None
    with_referrers: bool = True
    for_docker: bool = False


@dataclass(slots=True)
class _Image:
    """An image to export.

    - `root`: the manifest or index that `name` refers to, or its replacement by `_choose_platforms`.
    - `platform_entry`: the entry of the original index that lists `root`, and states its platform. None if
      `_choose_platforms` has not replaced the root by a manifest of one platform.
    - `manifests`: by digest, all manifests to export, each before the index that lists it.
    - `referrers`: the digests of the referrers in `manifests`."""

    name: ImageReference
    registry: Registry
    repo: RepositoryName
    root: Manifest
    platform_entry: Descriptor | None = None
    manifests: dict[Digest, Manifest] = field(default_factory=dict)
    referrers: list[Digest] = field(default_factory=list)
    blobs: dict[Digest, Descriptor] = field(default_factory=dict)


async def export_images(
    router: Router, names: Sequence[ImageReference], writer: ImageFileWriter, options: ExportOptions, reporter: Reporter
) -> JSON:
    """Exports the images. Returns the numbers of images and blobs, and the size in bytes. Each file is written under a
    temporary name, and gets its final name when it is complete. So an error or a cancellation leaves only complete
    files under their final names.

    Raises ManifestUnknown if an image does not exist, or lacks one of the platforms. Raises Unsupported if an image
    cannot be in a docker archive, or has more than `MAX_DEPTH` levels of manifests. Raises ImageFileFailed, and the
    errors of mirrors."""
    try:
        return await _export(router, names, writer, options, reporter)
    except BaseException:
        writer.abandon()
        raise


async def _export(
    router: Router, names: Sequence[ImageReference], writer: ImageFileWriter, options: ExportOptions, reporter: Reporter
) -> JSON:
    """Does what `export_images` does, but does not clean up after an error."""
    images = []
    for name in names:
        await reporter.report(message=f"reading {name}")
        images.append(await _read_image(router, name, options))
    sizes = {
        digest: size
        for image in images
        for digest, size in [
            *((digest, blob.size) for digest, blob in image.blobs.items()),
            *((digest, len(manifest.body)) for digest, manifest in image.manifests.items()),
        ]
    }
    exported_bytes = 0

    def count_exported(count: int) -> None:
        nonlocal exported_bytes
        exported_bytes += count

    await reporter.report(0, total=sum(sizes.values()), unit="bytes", message="exporting")
    written_blobs, present_blobs = 0, 0  # `present_blobs`: number of blobs that the writer already had
    for image in images:
        for digest, blob in image.blobs.items():
            if writer.has(digest, blob.size):
                present_blobs += 1
                count_exported(blob.size)
            else:
                reader = await image.registry.open_blob(image.repo, digest)
                async with aclosing(reader):
                    await writer.write(
                        digest, blob.size, _with_progress(reader, reporter, lambda: exported_bytes), count_exported
                    )
                written_blobs += 1
        for digest, manifest in image.manifests.items():
            if not writer.has(digest, len(manifest.body)):
                await writer.write(digest, len(manifest.body), _single_chunk(manifest.body), count_exported)
        reporter.step("image", image=str(image.name), digest=image.root.digest, manifests=len(image.manifests))
    entries = list(_index_entries(images))
    await writer.finish(entries, [_docker_entry(image) for image in images] if options.for_docker else None)
    size = sum(sizes.values())
    return {"images": len(images), "blobs": written_blobs, "present_blobs": present_blobs, "size": size}


async def _read_image(router: Router, name: ImageReference, options: ExportOptions) -> _Image:
    """Reads the manifests of an image."""
    registry, repo, _ = await router.locate(name.repository)
    try:
        root = await registry.get_manifest(repo, name.reference)
    except ManifestUnknown as error:
        raise ManifestUnknown(f"{name}: {error.message}") from None
    image = _Image(name, registry, repo, root)
    stored_root_digest = root.digest
    if root.media_type in INDEXES and options.platforms is not None:
        await _choose_platforms(image, options)
    await _add_manifest(image, image.root, MAX_DEPTH)
    if options.with_referrers:
        # If `_choose_platforms` has replaced the root, `image.manifests` does not have the stored root.
        for digest in dict.fromkeys([*image.manifests, stored_root_digest]):
            await _add_referrers(image, digest, MAX_DEPTH)
    if options.for_docker and not _is_runnable(image.root):
        raise Unsupported(
            f"{name} is no container image of one platform, or has layers that this registry does not store; export it "
            "with `--format oci-layout`"
        )
    return image


async def _choose_platforms(image: _Image, options: ExportOptions) -> None:
    """Replaces `image.root`, which is an index, by the manifest that the index lists for the platforms. If the index
    lists several manifests for the platforms, replaces the root by a new index of these manifests. Raises
    ManifestUnknown if the index lists no manifest for one of the platforms."""
    assert options.platforms is not None
    index = image.root
    chosen, missing = choose_manifests(index.manifests, options.platforms)
    if missing:
        offered = ", ".join(sorted({platform_name(entry) for entry in index.manifests} - {""}))
        raise ManifestUnknown(f"{image.name} does not exist for {', '.join(map(str, missing))}, only for {offered}")
    if len(chosen) == 1:
        image.root = await image.registry.get_manifest(image.repo, chosen[0].digest)
        image.platform_entry = chosen[0]
    else:
        document = json.loads(index.body)
        chosen_digests = {entry.digest for entry in chosen}
        document["manifests"] = [entry for entry in document["manifests"] if entry["digest"] in chosen_digests]
        image.root = Manifest.parse(json.dumps(document).encode(), index.media_type)


async def _add_manifest(image: _Image, manifest: Manifest, depth: int) -> None:
    """Adds to `image`: `manifest`, the manifests that it lists directly or through other indexes, and the blobs of all
    these manifests. Raises Unsupported if there are more than `depth` levels of manifests. `manifest` is the first
    level."""
    if depth == 0:
        raise Unsupported(f"{image.name} has indexes in indexes, more than {MAX_DEPTH} deep")
    for entry in manifest.manifests:
        if entry.digest in manifest.blob_children:  # a blob: the indexes of BuildKit's build cache list blobs
            image.blobs.setdefault(entry.digest, entry)
        elif entry.digest not in image.manifests:
            await _add_manifest(image, await image.registry.get_manifest(image.repo, entry.digest), depth - 1)
    for blob in manifest.blobs:
        if blob.digest not in manifest.foreign:
            image.blobs.setdefault(blob.digest, blob)
    image.manifests[manifest.digest] = manifest


async def _add_referrers(image: _Image, subject: Digest, depth: int) -> None:
    """Adds the manifests whose subject is `subject` (its direct referrers), their referrers, and so on. `depth` is a
    limit for two things:

    - The levels of referrers. The direct referrers are the first level. Further levels are left out.
    - The levels of manifests in a direct referrer, because a referrer may be an index. If a direct referrer has more
      levels, raises Unsupported. For each further level of referrers, this limit is one lower."""
    after: str | None = None
    has_more = depth > 0
    while has_more:
        page = await image.registry.referrers(image.repo, subject, None, after, _REFERRERS_PER_PAGE)
        for referrer in page.items:
            if referrer.digest not in image.manifests:
                await _add_manifest(image, await image.registry.get_manifest(image.repo, referrer.digest), depth)
                image.referrers.append(referrer.digest)
                await _add_referrers(image, referrer.digest, depth - 1)
        has_more = page.more and (bool(page.items) or page.next_after is not None)
        after = page.next_after or (page.items[-1].digest if page.items else None)


def _index_entries(images: Iterable[_Image]) -> Iterable[Document]:
    """Yields the entries of `index.json`: the images, each with its tag, and then the referrers. If the images are from
    several repositories, each entry has the image's full name, with repository and tag, in place of the tag."""
    images = list(images)
    is_one_repository = len({image.name.repository for image in images}) == 1
    for image in images:
        root = replace(image.root.descriptor, annotations=None, artifact_type=None)
        if image.platform_entry is not None:
            root = replace(root, platform=image.platform_entry.platform)
        entry = root.as_json()
        if isinstance(image.name.reference, Tag):
            tag = image.name.reference if is_one_repository else str(image.name)
            entry["annotations"] = {REF_NAME_ANNOTATION: str(tag), IMAGE_NAME_ANNOTATION: str(image.name)}
        yield entry
    for image in images:
        for digest in image.referrers:
            yield replace(image.manifests[digest].descriptor, annotations=None).as_json()


def _is_runnable(manifest: Manifest) -> bool:
    config = manifest.config
    return config is not None and config.media_type in (OCI_CONFIG, DOCKER_CONFIG) and not manifest.foreign


def _docker_entry(image: _Image) -> Document:
    """Returns the entry of the image in a docker archive's `manifest.json`."""
    assert image.root.config is not None
    entry: dict[str, Any] = {
        "Config": blob_file(image.root.config.digest),
        "RepoTags": [str(image.name)] if isinstance(image.name.reference, Tag) else None,
        "Layers": [blob_file(layer.digest) for layer in image.root.layers],
    }
    return entry


async def _single_chunk(data: bytes) -> AsyncIterator[bytes]:
    yield data


async def _with_progress(chunks: Any, reporter: Reporter, get_exported_bytes: Any) -> AsyncIterator[bytes]:
    """Yields the chunks, and reports the progress before each chunk. `get_exported_bytes` returns the number of bytes
    that were exported until now."""
    async for chunk in chunks:
        await reporter.report(get_exported_bytes())
        yield chunk
