"""Caches the results of *lookups*, functions that read the metadata database (`LookupCache`), and estimates how much
memory a cached result takes.

Each commit by any process evicts all results.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Final, TypeVar, cast

from storage.content import Descriptor, Manifest, Page, UpstreamCheck
from storage.metadata.catalog import BlobRow
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.lookups import LARGE_MANIFEST_BYTES
from storage.metadata.sqlite.read_transaction import SharedReadTransaction
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.names import RepositoryName, Tag
from storage.upstream_tags import FrozenTag
from storage.versioned_cache import VersionedCache

CACHE_BYTES: Final = 24 * 1024 * 1024
"""Approximate capacity of the cache, in bytes of memory. This is enough for 10,000 hosted or 6,000 mirrored tags
with manifests of usual size."""
MEMORY_PER_PARSED_BYTE: Final = 8
"""Approximate bytes of memory that a manifest with its parsed content takes for each byte of its body."""
_SMALL_VALUE_BYTES: Final = 1024
"""Approximate bytes of memory that a cached result of a few fields takes."""
_RECORD_BYTES: Final = 384
"""Approximate bytes of memory that a cached record of the mirror takes. The record is usually None or two numbers."""
_CACHED_NONE: Final = object()
"""Stands in the cache for the result None, because `VersionedCache.get` returns None if it has no value for a key."""
T = TypeVar("T")


def bytes_of_page(page: Page[Tag] | Page[RepositoryName], name_set_bytes: int = 0) -> int:
    """Returns the approximate bytes of memory that the page and the set of names in the cache key take.

    A lookup of repositories has an argument that limits the result to a set of names. The cache keeps the arguments in
    the key. The cache itself counts only the texts in the arguments, so this function adds the set.
    `name_set_bytes`: the bytes of memory that the set takes; 0 if there is no set. For a set that has every name, the
    caller may pass 0, because such a set usually has only the pattern `**` and so takes little memory."""
    return _SMALL_VALUE_BYTES + name_set_bytes + sum(64 + len(name) for name in page.items)


def bytes_of_manifest(manifest: Manifest) -> int:
    """Returns the approximate bytes of memory that a cached manifest takes:

    - For a manifest of at most `LARGE_MANIFEST_BYTES`: without parsed content. Callers parse only copies of the cached
      manifest (`manifest_for_caller`).
    - For a larger manifest: with its parsed content."""
    size = len(manifest.body)
    return _SMALL_VALUE_BYTES + (size if size <= LARGE_MANIFEST_BYTES else MEMORY_PER_PARSED_BYTE * size)


def bytes_of_row(_: BlobRow | Descriptor) -> int:
    return _SMALL_VALUE_BYTES


def bytes_of_record(_: UpstreamCheck | FrozenTag | None) -> int:
    return _RECORD_BYTES


def manifest_for_caller(manifest: Manifest) -> Manifest:
    """Returns the manifest to give to the caller of a lookup:

    - For a manifest of at most `LARGE_MANIFEST_BYTES`: a copy with the same body object. A manifest keeps its parsed
      content, which is several times as large as the body. If the caller parses the copy, the cache does not grow.
    - For a larger manifest: the cached manifest itself. `bytes_of_manifest` counts its parsed content."""
    if len(manifest.body) > LARGE_MANIFEST_BYTES:
        return manifest
    return Manifest(manifest.body, manifest.media_type, manifest.digest)


class LookupCache:
    """Runs lookups and caches their results. All calls come from one event loop.

    `version` returns the data version: a value that changes with every commit of any process. `shared_reads` has the
    connection for short lookups. `scans` runs long lookups. On a full disk, both can belong to an *immutable database*,
    which SQLite reads without writing any file (`storage.metadata.sqlite.immutable_database`)."""

    def __init__(
        self,
        version: Callable[[], object],
        shared_reads: SharedReadTransaction | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
    ) -> None:
        self._shared_reads = shared_reads
        self._scans = scans
        self._results: VersionedCache[Any] = VersionedCache(version, capacity=CACHE_BYTES)

    def look_up(self, bytes_of: Callable[[T], int], lookup: Callable[..., T], *arguments: object) -> T:
        """Calls `lookup` with a connection and `arguments`, and returns the result. May cache the result. If the result
        is cached and no process has committed since then, returns it without calling `lookup`. Raises the errors
        of `lookup`, and caches nothing in this case. `bytes_of` returns the approximate bytes of memory that a result
        takes. It does not count the texts in `arguments`, because the cache counts them."""
        key = (lookup, *arguments)
        cached = self._results.get(key)
        if cached is not None:
            return cast("T", None if cached is _CACHED_NONE else cached)
        version = self._results.last_version  # the data version that `get` read
        result = lookup(self._shared_reads.connection_at(version), *arguments)
        self._store(key, result, bytes_of, version)
        return result

    async def scan(self, bytes_of: Callable[[T], int], lookup: Callable[..., T], *arguments: object) -> T:
        """Does the same as `look_up`, but runs the lookup in the thread for long lookups."""
        key = (lookup, *arguments)
        cached = self._results.get(key)
        if cached is not None:
            return cast("T", None if cached is _CACHED_NONE else cached)
        version = self._results.last_version  # the data version that `get` read
        result = await self._scans.run(lambda db: lookup(db, *arguments))
        self._store(key, result, bytes_of, version)
        return result

    def _store(self, key: Hashable, result: T, bytes_of: Callable[[T], int], version: object) -> None:
        """Caches the result of a lookup, if `VersionedCache.should_cache` returns True for the key."""
        if self._results.should_cache(key):
            self._results.put(key, _CACHED_NONE if result is None else result, bytes_of(result), version)
