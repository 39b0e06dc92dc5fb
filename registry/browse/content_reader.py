"""Reads manifests and blobs for people, with bounded work (`ContentReader`).

Manifests and configs never change, so what was read of them is kept in memory by digest. The event loop never parses a
large document: that happens in a thread, one at a time.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from registry.browse.image_config import ImageConfig, parse_config, platform_text
from registry.browse.models import Kind
from registry.upkeep.images.image_files import DOCKER_CONFIG, OCI_CONFIG
from storage.content import INDEXES, OCI_ARTIFACT, Descriptor, Manifest
from storage.errors import BlobUnknown, ManifestUnknown, RegistryError
from storage.interface import Registry
from storage.names import Digest, RepositoryName

T = TypeVar("T")
IMAGE_CONFIGS: Final = frozenset({OCI_CONFIG, DOCKER_CONFIG})
"""Media types of the configs of images."""
MAX_CONFIG_BYTES: Final = 4 * 1024 * 1024
"""A larger config is not read."""
MAX_ROW_BYTES: Final = 256 * 1024
"""For a list, no larger manifest or config is read."""
MAX_PLATFORMS: Final = 100
"""Of an index with more entries, only the first are shown."""
_MAX_ON_LOOP_BYTES: Final = 16 * 1024
"""A larger document is parsed in a thread."""
_MAX_KEPT: Final = 4096
"""How many summaries of manifests, and how many of configs, are kept in memory. Each takes about a kilobyte, that of a
large index up to 50."""
_ATTESTATION: Final = "attestation-manifest"
"""The value of the annotation `vnd.docker.reference.type` of an entry that BuildKit adds to an index."""
_PREDICATE: Final = "in-toto.io/predicate-type"
_CREATED: Final = "org.opencontainers.image.created"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """An entry of an index. `is_attestation`: BuildKit's attestations of another entry."""

    digest: Digest
    media_type: str
    platform: str
    is_attestation: bool


@dataclass(frozen=True, slots=True)
class ManifestSummary:
    """What a list shows of a manifest. `size`: of config and layers; None for an index. `config`: of an image.
    `entries` and `more_entries`: the first entries of an index, and the number of the others. `predicates`: the types
    of the attestations that it contains. `created`: the annotation; empty: there is none."""

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
    """What a list shows of a config. `created`: in RFC 3339; empty if it is not known."""

    platform: str = ""
    created: str = ""


UNREADABLE: Final = ManifestSummary("unreadable")


class ContentReader:
    """Reads through `registry`, which checks the rights of the current request."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._manifests: _Kept[ManifestSummary] = _Kept()
        self._configs: _Kept[ConfigSummary] = _Kept()
        self._thread = asyncio.Lock()
        """Held while a large document is parsed."""

    async def summary(self, repo: RepositoryName, digest: Digest, size: int | None = None) -> ManifestSummary:
        """Returns a summary of a manifest that the repository has; the caller has checked that, and the right to see
        it. `size`: of the manifest, if it is known. A manifest that is too large for a list, damaged, or deleted
        meanwhile is `UNREADABLE`."""
        kept = self._manifests.get(digest)
        if kept is not None:
            return kept
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
        """Returns the summary of a manifest of any size. Afterwards the manifest's properties are parsed."""
        summary = await self.run(len(manifest.body), lambda: summarize(manifest))
        return self._manifests.keep(manifest.digest, summary)

    async def config_summary(self, repo: RepositoryName, config: Descriptor) -> ConfigSummary:
        """Returns a summary of a config; an empty one if the repository does not have it, or it is too large for a
        list or no config of an image."""
        key = (repo, config.digest)  # a repository may serve only its own blobs
        kept = self._configs.get(key)
        if kept is not None:
            return kept
        if config.size > MAX_ROW_BYTES:
            return ConfigSummary()
        parsed = await self.config(repo, config)
        if parsed is None:
            return ConfigSummary()
        created = parsed.view.created
        return self._configs.keep(key, ConfigSummary(parsed.platform, "" if created is None else created.isoformat()))

    async def config(self, repo: RepositoryName, config: Descriptor) -> ImageConfig | None:
        """Returns the config of an image; None if the repository does not have it, or it is no config."""
        data = await self.blob(repo, config.digest, MAX_CONFIG_BYTES)
        return None if data is None else await self.run(len(data), lambda: parse_config(config.digest, data))

    async def blob(self, repo: RepositoryName, digest: Digest, max_bytes: int) -> bytes | None:
        """Returns a blob; None if the repository does not have it, or it is larger than `max_bytes`."""
        try:
            reader = await self._registry.open_blob(repo, digest)
        except BlobUnknown:
            return None
        async with aclosing(reader):
            if reader.descriptor.size > max_bytes:
                return None
            return b"".join([bytes(piece) async for piece in reader])

    async def run(self, size: int, parse: Callable[[], T]) -> T:
        """Calls `parse`, which parses a document of `size` bytes: in a thread if it is large."""
        if size <= _MAX_ON_LOOP_BYTES:
            return parse()
        async with self._thread:
            return await asyncio.to_thread(parse)


def summarize(manifest: Manifest) -> ManifestSummary:
    """Returns the summary of a manifest."""
    try:
        manifest.config, manifest.layers, manifest.manifests  # noqa: B018  parses the body and caches the result
    except RegistryError:  # an earlier version accepted more
        return UNREADABLE
    created = manifest.annotations.get(_CREATED, "")[:64]
    if manifest.media_type in INDEXES:
        entries = manifest.manifests
        first = [index_entry(entry) for entry in entries[:MAX_PLATFORMS]]
        return ManifestSummary(
            "index",
            artifact_type=manifest.artifact_type,
            entries=tuple(first),
            more_entries=len(entries) - len(first),
            created=created,
        )
    size = sum(blob.size for blob in manifest.blobs)
    found = ((layer.annotations or {}).get(_PREDICATE) for layer in manifest.layers)
    predicates = frozenset(predicate[:200] for predicate in found if predicate)
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


def is_image(manifest: Manifest) -> bool:
    """Returns whether a manifest is that of an image of one platform, and not of another artifact."""
    config = manifest.config
    return manifest.media_type != OCI_ARTIFACT and config is not None and config.media_type in IMAGE_CONFIGS


def index_entry(entry: Descriptor) -> IndexEntry:
    """Returns what is shown of an entry of an index."""
    platform = entry.platform if isinstance(entry.platform, Mapping) else {}
    kind = (entry.annotations or {}).get("vnd.docker.reference.type")
    return IndexEntry(entry.digest, entry.media_type, platform_text(platform), kind == _ATTESTATION)


class _Kept(Generic[T]):
    """The values that were used last, at most `_MAX_KEPT`."""

    def __init__(self) -> None:
        self._values: OrderedDict[Hashable, T] = OrderedDict()

    def get(self, key: Hashable) -> T | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def keep(self, key: Hashable, value: T) -> T:
        self._values[key] = value
        if len(self._values) > _MAX_KEPT:
            self._values.popitem(last=False)
        return value
