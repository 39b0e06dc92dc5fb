"""Reads manifests and blobs to show them to people, and limits the work for each manifest and blob (`ContentReader`).

Manifests and configs never change, so their summaries are cached in memory by digest. Large documents are parsed in a
thread, one at a time, and never on the event loop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from registry.browse.byte_limited_cache import ByteLimitedCache
from registry.browse.image_config import ImageConfig, parse_config, platform_text
from registry.browse.models import Kind
from registry.single_flight import finish_in_thread
from registry.upkeep.images.image_files import DOCKER_CONFIG, OCI_CONFIG
from storage.content import INDEXES, MAX_IMAGE_CONFIG_BYTES, OCI_ARTIFACT, Descriptor, Manifest
from storage.errors import BlobUnknown, ManifestUnknown, RegistryError
from storage.interface import BlobReader, Registry
from storage.names import Digest, RepositoryName

T = TypeVar("T")
IMAGE_CONFIGS: Final = frozenset({OCI_CONFIG, DOCKER_CONFIG})
"""Media types of the configs of images."""
MAX_ROW_BYTES: Final = 256 * 1024
"""The size of the largest manifest or config that is read for a row of a list."""
MAX_INDEX_ENTRIES: Final = 100
"""How many entries of an index a summary has at most, including entries with attestations. `more_entries` of the
summary is the number of further entries."""
_MAX_ON_LOOP_BYTES: Final = 16 * 1024
"""The size of the largest document that is parsed on the event loop. Larger ones are parsed in a thread."""
MAX_PREDICATES: Final = 20
"""How many predicate types a summary has at most. A *predicate type* names the kind of claim that an attestation makes,
such as how an image was built."""
_MAX_CACHED_BYTES: Final = 8 * 1024 * 1024
"""Roughly how many bytes of memory the cached summaries of manifests may take. The cached summaries of configs may take
as much again. A summary takes about one kilobyte; the summary of a large index takes up to 50 kilobytes."""
_OBJECT_BYTES: Final = 256
"""Roughly how many bytes of memory an object in the cache takes, such as a summary or an entry of an index. Its texts
are counted separately."""
_ATTESTATION: Final = "attestation-manifest"
"""The value of the annotation `vnd.docker.reference.type` in the index entries that BuildKit adds for attestations."""
# The keys of annotations: the predicate type of an attestation, and the time of creation.
_PREDICATE: Final = "in-toto.io/predicate-type"
_CREATED: Final = "org.opencontainers.image.created"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """An entry of an index. `is_attestation`: the entry has BuildKit's attestations about another entry."""

    digest: Digest
    media_type: str
    platform: str
    is_attestation: bool


@dataclass(frozen=True, slots=True)
class ManifestSummary:
    """What a list shows of a manifest.

    - `size`: bytes of config and layers. None for an index.
    - `config`: the config of an image. None for other manifests.
    - `entries`, `more_entries`: the first entries of an index, and the number of further entries.
    - `predicates`: the predicate types of the attestations in the manifest.
    - `created`: the annotation with the time of creation. Empty if there is none."""

    kind: Kind
    size: int | None = None
    config: Descriptor | None = None
    artifact_type: str | None = None
    entries: tuple[IndexEntry, ...] = ()
    more_entries: int = 0
    predicates: frozenset[str] = frozenset()
    created: str = ""


@dataclass(frozen=True, slots=True)
class ConfigSummary:
    """The parts of an image config that a list shows. `created`: the time of creation in RFC 3339; empty if it is not
    known."""

    platform: str = ""
    created: str = ""


UNREADABLE: Final = ManifestSummary("unreadable")
"""The summary of a manifest that is damaged, missing, or too large for a list."""


class ContentReader:
    """Reads and summarizes content through `registry`, which checks the rights of the current request."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._manifests = ByteLimitedCache[ManifestSummary](_MAX_CACHED_BYTES, _bytes_of_summary)
        self._configs = ByteLimitedCache[ConfigSummary](
            _MAX_CACHED_BYTES, lambda summary: _bytes_of((summary.platform, summary.created))
        )
        self._thread_lock = asyncio.Lock()
        """Held while a thread parses a large document."""

    async def read_summary(self, repo: RepositoryName, digest: Digest, size: int | None = None) -> ManifestSummary:
        """Reads a manifest and returns its summary. The caller has checked that the repository has the manifest, and
        that the visitor may see it. `size`: the size of the manifest; None: it is not known. Returns `UNREADABLE` if
        the manifest is too large for a list, is damaged, or has been deleted in the meantime."""
        cached = self._manifests.get(digest)
        if cached is not None:
            return cached
        if size is not None and size > MAX_ROW_BYTES:
            return UNREADABLE
        try:
            manifest = await self._registry.get_manifest(repo, digest)
        except ManifestUnknown:
            return UNREADABLE
        if len(manifest.body) > MAX_ROW_BYTES:
            return UNREADABLE
        return await self.summary_of(manifest)

    async def summary_of(self, manifest: Manifest) -> ManifestSummary:
        """Returns the summary of a manifest of any size. Parses the manifest, so that its properties need no parsing
        later. The summary of a large manifest is not cached."""
        summary = await self.run_in_thread_if_large(len(manifest.body), lambda: parse_summary(manifest))
        return summary if len(manifest.body) > MAX_ROW_BYTES else self._manifests.keep(manifest.digest, summary)

    async def read_config_summary(self, repo: RepositoryName, config: Descriptor) -> ConfigSummary:
        """Reads a config and returns its summary. The summary is empty if the repository does not have the config, if
        the config is too large for a list, or if it is no config of an image."""
        key = (repo, config.digest)  # by repository, because a repository may serve only its own blobs
        cached = self._configs.get(key)
        if cached is not None:
            return cached
        summary = await self.read_parsed(
            repo, config.digest, MAX_ROW_BYTES, partial(_parse_config_summary, config.digest)
        )
        return ConfigSummary() if summary is None else self._configs.keep(key, summary)

    async def read_config(self, repo: RepositoryName, config: Descriptor) -> ImageConfig | None:
        """Returns the config of an image. Returns None if the repository does not have it, if it has more than
        `MAX_IMAGE_CONFIG_BYTES`, or if it is no config of an image."""
        return await self.read_parsed(
            repo, config.digest, MAX_IMAGE_CONFIG_BYTES, lambda data: parse_config(config.digest, data)
        )

    async def read_blob(self, repo: RepositoryName, digest: Digest, max_bytes: int) -> bytes | None:
        """Returns the bytes of a blob. Returns None if the repository does not have the blob, or if the blob is larger
        than `max_bytes`."""
        try:
            reader = await self._registry.open_blob(repo, digest)
        except BlobUnknown:
            return None
        async with aclosing(reader):
            return None if reader.descriptor.size > max_bytes else await _read(reader)

    async def read_parsed(
        self,
        repo: RepositoryName,
        digest: Digest,
        max_bytes: int,
        parse: Callable[[bytes], T],
        *,
        max_on_loop_bytes: int = _MAX_ON_LOOP_BYTES,
    ) -> T | None:
        """Reads a blob and returns the result of `parse`. Returns None if the repository does not have the blob, or if
        the blob is larger than `max_bytes`. A blob that is larger than `max_on_loop_bytes` is parsed in a thread, and
        is read only when the thread is free, so that waiting blobs take no memory."""
        try:
            reader = await self._registry.open_blob(repo, digest)
        except BlobUnknown:
            return None
        async with aclosing(reader):
            size = reader.descriptor.size
            if size > max_bytes:
                return None
            if size <= max_on_loop_bytes:
                return parse(await _read(reader))
            async with self._thread_lock:
                return await finish_in_thread(partial(parse, await _read(reader)))

    async def run_in_thread_if_large(self, size: int, parse: Callable[[], T]) -> T:
        """Calls `parse`, which parses a document of `size` bytes, and returns the result. Calls it in a thread if the
        document is large (`_MAX_ON_LOOP_BYTES`), otherwise on the event loop."""
        if size <= _MAX_ON_LOOP_BYTES:
            return parse()
        async with self._thread_lock:
            return await finish_in_thread(parse)


async def _read(reader: BlobReader) -> bytes:
    return b"".join([bytes(piece) async for piece in reader])


def parse_summary(manifest: Manifest) -> ManifestSummary:
    """Returns the summary of a manifest."""
    try:
        manifest.config, manifest.layers, manifest.manifests  # noqa: B018  parses the body and caches the result
    except RegistryError:  # the manifest is malformed; an earlier version of this program accepted it
        return UNREADABLE
    created = manifest.annotations.get(_CREATED, "")[:64]  # no valid time is longer
    if manifest.media_type in INDEXES:
        entries = manifest.manifests
        shown_entries = [index_entry(entry) for entry in entries[:MAX_INDEX_ENTRIES]]
        return ManifestSummary(
            "index",
            artifact_type=manifest.artifact_type,
            entries=tuple(shown_entries),
            more_entries=len(entries) - len(shown_entries),
            created=created,
        )
    size = sum(blob.size for blob in manifest.blobs)
    predicates = _predicates(manifest.layers)
    if is_image(manifest):
        config = manifest.config
        assert config is not None
        return ManifestSummary(
            "image",
            size,
            Descriptor(config.media_type, config.digest, config.size),
            predicates=predicates,
            created=created,
        )
    return ManifestSummary("artifact", size, artifact_type=manifest.artifact_type, created=created)


def _parse_config_summary(digest: Digest, data: bytes) -> ConfigSummary:
    """Returns the summary of a config. The summary is empty if `data` is no config of an image."""
    parsed = parse_config(digest, data)
    if parsed is None:
        return ConfigSummary()
    return ConfigSummary(parsed.platform, parsed.view.created.isoformat() if parsed.view.created else "")


def _predicates(layers: Iterable[Descriptor]) -> frozenset[str]:
    """Returns the predicate types of the layers, at most MAX_PREDICATES of them."""
    predicates: set[str] = set()
    for layer in layers:
        predicate = (layer.annotations or {}).get(_PREDICATE)
        if predicate:
            predicates.add(predicate[:200])  # longer than any known type; limits the memory of the summary
        if len(predicates) == MAX_PREDICATES:
            break
    return frozenset(predicates)


def is_image(manifest: Manifest) -> bool:
    """Returns whether a manifest describes an image of one platform. An index or another artifact is no image."""
    config = manifest.config
    return manifest.media_type != OCI_ARTIFACT and config is not None and config.media_type in IMAGE_CONFIGS


def index_entry(entry: Descriptor) -> IndexEntry:
    """Returns the parts of an index entry that are shown."""
    platform = entry.platform if isinstance(entry.platform, Mapping) else {}
    kind = (entry.annotations or {}).get("vnd.docker.reference.type")
    return IndexEntry(entry.digest, entry.media_type, platform_text(platform), kind == _ATTESTATION)


def _bytes_of_summary(summary: ManifestSummary) -> int:
    """Returns about how many bytes of memory a summary takes."""
    entries = (text for entry in summary.entries for text in (entry.digest, entry.media_type, entry.platform))
    texts = (summary.created, summary.artifact_type or "", *summary.predicates, *entries)
    return _bytes_of(texts) + _OBJECT_BYTES * len(summary.entries)


def _bytes_of(texts: Iterable[str]) -> int:
    """Returns about how much memory a summary with these texts takes. Besides the texts, counts three objects for every
    summary: the summary itself, and the digest and media type of an image's config."""
    return 3 * _OBJECT_BYTES + sum(map(sys.getsizeof, texts))
