"""A cache of the results of lookups (`LookupCache`), and how much memory a cached result takes.

A result is returned again until the database changes: any commit of any process evicts all results.
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
"""Approximate bytes of memory that a cached record about a mirrored tag takes, usually None or two numbers."""
_NOTHING: Final = object()
"""Stands in the cache for the result None. For the cache, None means that it has no value for a key."""
T = TypeVar("T")


def bytes_of_page(page: Page[Tag] | Page[RepositoryName], name_set_bytes: int = 0) -> int:
    """Returns the approximate bytes of memory that the page takes, plus `name_set_bytes`. A lookup can be limited to a
    set of names, which is then a part of the cache key: `name_set_bytes` is the memory of this set, in bytes. The next
    two functions return the memory of other results."""
    return _SMALL_VALUE_BYTES + name_set_bytes + sum(64 + len(name) for name in page.items)


def bytes_of_manifest(manifest: Manifest) -> int:
    """Counts the parsed content only for a large manifest: the cache never has that of a small one, because callers get
    a copy (`manifest_for_caller`)."""
    size = len(manifest.body)
    return _SMALL_VALUE_BYTES + (size if size <= LARGE_MANIFEST_BYTES else MEMORY_PER_PARSED_BYTE * size)


def bytes_of_row(_: BlobRow | Descriptor) -> int:
    return _SMALL_VALUE_BYTES


def bytes_of_record(_: UpstreamCheck | FrozenTag | None) -> int:
    return _RECORD_BYTES


def manifest_for_caller(manifest: Manifest) -> Manifest:
    """Returns a copy of a cached manifest, which refers to the same body. Give the copy to the caller of the lookup.

    A manifest keeps its parsed content, which takes several times the memory of the body. If the caller parses the
    copy, the manifest in the cache does not grow. A manifest of more than `LARGE_MANIFEST_BYTES` is not copied, but
    returned itself: all callers share it, and the cache counts its parsed content."""
    if len(manifest.body) > LARGE_MANIFEST_BYTES:
        return manifest
    return Manifest(manifest.body, manifest.media_type, manifest.digest)


class LookupCache:
    """Runs lookups and caches their results. Used from one event loop.

    `version` returns the data version: a value that changes with every commit of any process. `shared_reads` has the
    connection for short lookups, and `scans` runs long ones. On a full disk, both can belong to an *immutable
    database*: one that SQLite reads without writing any file (`storage.metadata.sqlite.immutable_database`)."""

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
        """Calls `lookup` with a connection and `arguments`, and returns its result. Returns the cached result of an
        equal call instead, if no process has committed anything since that call. `bytes_of` returns the approximate
        bytes of memory that a result takes, without the texts in `arguments`, which the cache counts itself. If
        `lookup` raises an error, caches nothing."""
        key = (lookup, *arguments)
        cached = self._results.get(key)
        if cached is not None:
            return cast("T", None if cached is _NOTHING else cached)
        version = self._results.last_version  # the data version that `get` read
        result = lookup(self._shared_reads.connection_at(version), *arguments)
        self._store(key, result, bytes_of, version)
        return result

    async def scan(self, bytes_of: Callable[[T], int], lookup: Callable[..., T], *arguments: object) -> T:
        """Returns the same as `look_up`, but runs the lookup in the thread for long lookups."""
        key = (lookup, *arguments)
        cached = self._results.get(key)
        if cached is not None:
            return cast("T", None if cached is _NOTHING else cached)
        version = self._results.last_version  # the data version that `get` read
        result = await self._scans.run(lambda db: lookup(db, *arguments))
        self._store(key, result, bytes_of, version)
        return result

    def _store(self, key: Hashable, result: T, bytes_of: Callable[[T], int], version: object) -> None:
        """Caches the result of a lookup if it is worth caching."""
        if self._results.should_cache(key):
            self._results.put(key, _NOTHING if result is None else result, bytes_of(result), version)
