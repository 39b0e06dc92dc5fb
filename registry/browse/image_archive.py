"""Produces the tar archive of an image for `docker load` (`ImageArchive`), piece by piece while the server sends it.

The archive is both a docker archive and an OCI image layout. It contains the image of one platform. For the same image
and name, every server process produces the same bytes, so a client can resume a download at another process.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import tarfile
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from registry.browse.content_reader import ContentReader, index_entry, is_image
from registry.request import RequestInvalid
from registry.single_flight import finish_in_thread
from registry.upkeep.images.image_file_writers import index_json, tar_header, tar_padding
from registry.upkeep.images.image_files import (
    DOCKER_MANIFEST_FILE,
    IMAGE_NAME_ANNOTATION,
    INDEX_FILE,
    LAYOUT_FILE,
    LAYOUT_FILE_CONTENT,
    REF_NAME_ANNOTATION,
    blob_file,
)
from storage.content import Descriptor, Manifest, Span
from storage.errors import BlobUnknown, ManifestUnknown
from storage.interface import Registry
from storage.names import Digest, Reference, RepositoryName, Tag

MAX_LAYERS: Final = 1_000
"""The largest number of layers that an image in an archive may have. Docker accepts at most 127."""
_FORMAT_VERSION: Final = b"1"
"""The version of the archive's format, which is a part of the ETag. A change of the format needs a new version.
Otherwise a client that resumes a download could join bytes of two formats."""
_LOOKUPS_PER_PAUSE: Final = 20
"""Number of blobs that are looked up before other tasks of the event loop get a turn."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of an archive. `digest`: the blob that is this part. If `digest` is None, the part is the bytes `data`.
    `start`: the offset of the part in the archive. `size`: the length of the part in bytes."""

    start: int
    size: int
    data: bytes = b""
    digest: Digest | None = None

    @property
    def stop(self) -> int:
        """The offset in the archive at which the part ends."""
        return self.start + self.size


class ImageArchive:
    """The archive of one image. `size`: its length in bytes. `etag`: the value of the ETag header. `file_name`: the
    file name for the download, in ASCII."""

    def __init__(
        self, registry: Registry, repo: RepositoryName, file_name: str, contents: Sequence[bytes | Descriptor]
    ) -> None:
        """`contents`: what the archive consists of, in order: bytes, and descriptors of blobs."""
        self._registry = registry
        self._repo = repo
        self._parts: list[_Part] = []
        self.file_name = file_name
        identity, offset = hashlib.sha256(_FORMAT_VERSION), 0
        for content in contents:
            if isinstance(content, bytes):
                part = _Part(offset, len(content), data=content)
                identity.update(content)
            else:
                part = _Part(offset, content.size, digest=content.digest)
                identity.update(content.digest.encode())
            self._parts.append(part)
            offset = part.stop
        self.size = offset
        self.etag = f'"{identity.hexdigest()}"'

    async def read(self, start: int, stop: int) -> AsyncGenerator[bytes, None]:
        """Yields the bytes from `start` up to, but not including, `stop`. Reads the blobs with the rights of the
        current request. Raises BlobUnknown if a blob has the wrong size, and the errors of `Registry.open_blob`."""
        for part in self._parts:
            first_byte, end_byte = max(start, part.start) - part.start, min(stop, part.stop) - part.start
            if first_byte >= end_byte:
                continue
            if part.digest is None:
                yield part.data[first_byte:end_byte]
                continue
            reader = await self._registry.open_blob(self._repo, part.digest, Span(first_byte, end_byte))
            async with aclosing(reader):
                if reader.descriptor.size != part.size:
                    raise _wrong_size(part.digest)
                async for piece in reader:
                    yield bytes(piece)


async def open_archive(
    registry: Registry, repo: RepositoryName, reference: Reference, platform: str | None, name: str
) -> ImageArchive:
    """Returns the archive of the image that `reference` names.

    - `platform`: selects an image if `reference` names an index: the platform or the digest of the image. None
      selects the only image of the index.
    - `name`: the repository's name as the client wrote it.

    Raises these errors, and those of a mirror that fetches the content from its upstream:

    - ManifestUnknown: there is no such image, or it cannot be sent (`_archived_blobs` has the reasons).
    - RequestInvalid: `platform` is None, and the index lists several images.
    - BlobUnknown: a blob is missing or has the wrong size."""
    reader = ContentReader(registry)
    manifest = await registry.get_manifest(repo, reference)
    entry_platform: Mapping[str, object] | None = None
    if (await reader.summarize(manifest)).kind == "index":
        entry = await reader.run_in_thread_if_large(
            len(manifest.body), partial(_choose_entry, manifest, platform, name)
        )
        entry_platform = entry.platform
        manifest = await registry.get_manifest(repo, entry.digest)
        # The summary is not needed. The call parses the manifest, in a thread if it is large, and `manifest` keeps the
        # parsed content.
        await reader.summarize(manifest)
    blobs = await reader.run_in_thread_if_large(len(manifest.body), lambda: _archived_blobs(manifest))
    if blobs is None:
        raise ManifestUnknown(f"{name}: {reference} is not a container image, or this registry cannot send its layers")
    await _check_sizes(registry, repo, blobs)
    tagged_name = f"{name}:{reference}" if isinstance(reference, Tag) else None
    file_name = f"{name.rpartition('/')[2]}_{reference.replace(':', '-')}.tar"

    def build_archive() -> ImageArchive:
        return ImageArchive(registry, repo, file_name, list(_contents(manifest, blobs, tagged_name, entry_platform)))

    return await finish_in_thread(build_archive)


def _archived_blobs(manifest: Manifest) -> Sequence[Descriptor] | None:
    """Returns the blobs of an image, without duplicates. Returns None if the image cannot be sent, for one of these
    reasons:

    - The manifest cannot be parsed (`Manifest.is_readable`), or does not describe an image.
    - The image has more than MAX_LAYERS layers.
    - The image has layers that registries need not store (`Manifest.foreign`)."""
    if not manifest.is_readable or not is_image(manifest):
        return None
    if len(manifest.layers) > MAX_LAYERS or manifest.foreign:
        return None
    return [replace(blob, annotations=None, platform=None) for blob in {b.digest: b for b in manifest.blobs}.values()]


def _choose_entry(index: Manifest, wanted: str | None, name: str) -> Descriptor:
    """Returns the index entry of the image that goes into the archive. `wanted`: the platform or the digest of the
    image; None for the only image of the index. `name`: the repository's name for error messages. Raises
    ManifestUnknown, RequestInvalid."""
    images = {}
    for entry in index.manifests:
        entry_view = index_entry(entry)
        if not entry_view.is_attestation:
            images[entry.digest] = (entry_view.platform, entry)
    if wanted is None and len(images) > 1:
        platforms = ", ".join(sorted({platform or digest for digest, (platform, _) in images.items()})[:20])
        raise RequestInvalid(f"{name} has images for several platforms; choose one with `platform`: {platforms}")
    for digest, (platform, entry) in images.items():
        if wanted in (None, digest, platform):
            return entry
    raise ManifestUnknown(f"{name} lists no image for {wanted!r:.100}")


async def _check_sizes(registry: Registry, repo: RepositoryName, blobs: Sequence[Descriptor]) -> None:
    """Raises BlobUnknown if a blob is missing, or has another size than the manifest says."""
    for number, blob in enumerate(blobs):
        if number % _LOOKUPS_PER_PAUSE == 0:
            await asyncio.sleep(0)
        if (await registry.resolve_blob(repo, blob.digest)).size != blob.size:
            raise _wrong_size(blob.digest)


def _wrong_size(digest: Digest) -> BlobUnknown:
    return BlobUnknown(f"{digest} has another size than the manifest says, so the image cannot be loaded")


def _contents(
    manifest: Manifest, blobs: Sequence[Descriptor], tagged_name: str | None, platform: Mapping[str, object] | None
) -> Iterator[bytes | Descriptor]:
    """Yields what the archive consists of, in order: bytes, and descriptors of blobs. `tagged_name`: the image's name
    and tag, such as `team/app:v1`; None if the client has chosen the image by its digest. `platform`: the platform that
    the image's entry in the index states; None if there is no index, or if the entry states none."""
    assert manifest.config is not None
    descriptor = replace(manifest.descriptor, annotations=None, artifact_type=None, platform=platform).as_json()
    if tagged_name is not None:
        descriptor["annotations"] = {
            REF_NAME_ANNOTATION: tagged_name.rpartition(":")[2],
            IMAGE_NAME_ANNOTATION: tagged_name,
        }
    docker_manifest = {
        "Config": blob_file(manifest.config.digest),
        "RepoTags": None if tagged_name is None else [tagged_name],
        "Layers": [blob_file(layer.digest) for layer in manifest.layers],
    }
    files = {
        LAYOUT_FILE: LAYOUT_FILE_CONTENT,
        INDEX_FILE: index_json([descriptor]),
        DOCKER_MANIFEST_FILE: json.dumps([docker_manifest]).encode(),
        blob_file(manifest.digest): manifest.body,
    }
    for file_name, data in files.items():
        yield tar_header(file_name, len(data)) + data + tar_padding(len(data))
    for blob in blobs:
        yield tar_header(blob_file(blob.digest), blob.size)
        yield blob
        yield tar_padding(blob.size)
    yield bytes(2 * tarfile.BLOCKSIZE)
