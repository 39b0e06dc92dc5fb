"""Reads manifests and blobs to show them to people (`ContentReader`).

Manifests and configs never change, so their summaries are cached in memory. Large manifests and blobs are parsed in a
thread, one at a time. Small ones are parsed on the event loop.
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
"""The size of the largest manifest or config that is summarized for a row of a list."""
MAX_INDEX_ENTRIES: Final = 100
"""Largest number of index entries in a summary. Entries with attestations count too."""
_MAX_ON_LOOP_BYTES: Final = 16 * 1024
"""The size of the largest manifest or blob that is parsed on the event loop."""
MAX_PREDICATES: Final = 20
"""Largest number of predicate types in a summary. A *predicate type* names what an attestation claims, such as how an
image was built."""
_MAX_CACHED_BYTES: Final = 8 * 1024 * 1024
"""Approximate memory limit for the cached summaries of manifests. The summaries of configs have a cache of their own,
with an equal limit."""
_OBJECT_BYTES: Final = 256
"""Approximate memory of one cached object without its texts. Such objects are summaries and index entries."""
_ATTESTATION: Final = "attestation-manifest"
"""The value of the annotation `vnd.docker.reference.type` in the index entries that BuildKit adds for attestations."""
_PREDICATE_TYPE_ANNOTATION: Final = "in-toto.io/predicate-type"
_CREATED_ANNOTATION: Final = "org.opencontainers.image.created"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """An entry of an index. `is_attestation`: whether the entry is a manifest with attestations from BuildKit."""

    digest: Digest
    media_type: str
    platform: str
    is_attestation: bool


@dataclass(frozen=True, slots=True)
class ManifestSummary:
    """What a list shows of a manifest.

    - `size`: total bytes of the config and the layers. None for an index.
    - `config`: the descriptor of the config. None if the manifest is not an image.
    - `entries`: the first entries of an index, at most `MAX_INDEX_ENTRIES`.
    - `more_entries`: the number of further entries.
    - `predicates`: the predicate types of the attestations that are layers of the manifest.
    - `created`: the creation time from the manifest's annotation. Empty if there is none."""

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
    """The fields of an image config that lists show. Both are empty if the blob is not the config of an image.

    - `platform`: such as `linux/amd64`.
    - `created`: the creation time in RFC 3339; empty if the config does not state it."""

    platform: str = ""
    created: str = ""


UNREADABLE: Final = ManifestSummary("unreadable")
"""The summary of a manifest that is damaged, missing, malformed, or larger than `MAX_ROW_BYTES`."""


class ContentReader:
    """Reads and summarizes content through `registry`, which checks the rights of the current request."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._manifests = ByteLimitedCache[ManifestSummary](_MAX_CACHED_BYTES, _manifest_summary_bytes)
        self._configs = ByteLimitedCache[ConfigSummary](
            _MAX_CACHED_BYTES, lambda summary: _summary_bytes((summary.platform, summary.created))
        )
        self._thread_lock = asyncio.Lock()
        """Held while a thread parses a large manifest or blob."""

    async def read_summary(self, repo: RepositoryName, digest: Digest, size: int | None = None) -> ManifestSummary:
        """Reads a manifest and returns its summary, or `UNREADABLE`. `size`: the size of the manifest in bytes; None:
        unknown. The caller must first check that the repository has the manifest and that the client may see it. If
        the summary is cached, this method checks neither."""
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
        return await self.summarize(manifest)

    async def summarize(self, manifest: Manifest) -> ManifestSummary:
        """Returns the summary of a manifest of any size. The manifest keeps its parsed body, so its properties are then
        quick to read. Caches the summary only if the manifest has at most `MAX_ROW_BYTES`."""
        summary = await self.run_in_thread_if_large(len(manifest.body), lambda: parse_summary(manifest))
        return summary if len(manifest.body) > MAX_ROW_BYTES else self._manifests.put(manifest.digest, summary)

    async def read_config_summary(self, repo: RepositoryName, config: Descriptor) -> ConfigSummary:
        """Reads a config and returns its summary. The summary is empty if the repository does not have the config, if
        the config is larger than `MAX_ROW_BYTES`, or if it is not the config of an image."""
        key = (repo, config.digest)  # by repository, because a repository may show only its own blobs
        cached = self._configs.get(key)
        if cached is not None:
            return cached
        summary = await self.read_and_parse(
            repo, config.digest, MAX_ROW_BYTES, partial(_parse_config_summary, config.digest)
        )
        return ConfigSummary() if summary is None else self._configs.put(key, summary)

    async def read_config(self, repo: RepositoryName, config: Descriptor) -> ImageConfig | None:
        """Returns the config of an image. Returns None if the repository does not have the config, if the config is
        larger than `MAX_IMAGE_CONFIG_BYTES`, or if it is not the config of an image."""
        return await self.read_and_parse(
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

    async def read_and_parse(
        self,
        repo: RepositoryName,
        digest: Digest,
        max_bytes: int,
        parse: Callable[[bytes], T],
        *,
        max_on_loop_bytes: int = _MAX_ON_LOOP_BYTES,
    ) -> T | None:
        """Reads a blob and returns the result of `parse`. Returns None if the repository does not have the blob, or if
        the blob is larger than `max_bytes`. If the blob is larger than `max_on_loop_bytes`, first waits until no other
        blob is parsed in a thread, then reads the blob and parses it in a thread. So waiting blobs take no memory."""
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
        """Calls `parse` and returns its result. Calls it in a thread if `size` is larger than `_MAX_ON_LOOP_BYTES`,
        otherwise on the event loop. `size`: how many bytes `parse` parses."""
        if size <= _MAX_ON_LOOP_BYTES:
            return parse()
        async with self._thread_lock:
            return await finish_in_thread(parse)


async def _read(reader: BlobReader) -> bytes:
    return b"".join([bytes(piece) async for piece in reader])


def parse_summary(manifest: Manifest) -> ManifestSummary:
    """Returns the summary of a manifest; `UNREADABLE` if the manifest is malformed."""
    try:
        manifest.config, manifest.layers, manifest.manifests  # noqa: B018  parses the body and caches the result
    except RegistryError:  # an earlier version of this program accepted the malformed manifest
        return UNREADABLE
    created = manifest.annotations.get(_CREATED_ANNOTATION, "")[:64]  # no valid time is longer
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
    """Returns the summary of a config. The summary is empty if `data` is not the config of an image."""
    parsed = parse_config(digest, data)
    if parsed is None:
        return ConfigSummary()
    return ConfigSummary(parsed.platform, parsed.view.created.isoformat() if parsed.view.created else "")


def _predicates(layers: Iterable[Descriptor]) -> frozenset[str]:
    """Returns the predicate types of the layers, at most `MAX_PREDICATES`."""
    predicates: set[str] = set()
    for layer in layers:
        predicate = (layer.annotations or {}).get(_PREDICATE_TYPE_ANNOTATION)
        if predicate:
            predicates.add(predicate[:200])  # longer than any known type; limits the memory of the summary
        if len(predicates) == MAX_PREDICATES:
            break
    return frozenset(predicates)


def is_image(manifest: Manifest) -> bool:
    """Returns whether a manifest describes an image for one platform. False for an index and for other artifacts."""
    config = manifest.config
    return manifest.media_type != OCI_ARTIFACT and config is not None and config.media_type in IMAGE_CONFIGS


def index_entry(entry: Descriptor) -> IndexEntry:
    """Returns what a summary contains of an index entry."""
    platform = entry.platform if isinstance(entry.platform, Mapping) else {}
    kind = (entry.annotations or {}).get("vnd.docker.reference.type")
    return IndexEntry(entry.digest, entry.media_type, platform_text(platform), kind == _ATTESTATION)


def _manifest_summary_bytes(summary: ManifestSummary) -> int:
    """Returns the approximate memory of a summary in bytes."""
    entries = (text for entry in summary.entries for text in (entry.digest, entry.media_type, entry.platform))
    texts = (summary.created, summary.artifact_type or "", *summary.predicates, *entries)
    return _summary_bytes(texts) + _OBJECT_BYTES * len(summary.entries)


def _summary_bytes(texts: Iterable[str]) -> int:
    """Returns the approximate memory, in bytes, of a summary with these texts. Adds three objects to the texts: the
    summary, and the digest and media type of a config."""
    return 3 * _OBJECT_BYTES + sum(map(sys.getsizeof, texts))
