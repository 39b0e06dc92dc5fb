"""The cache of lookup results: what it caches, and its memory. Its keys contain what clients request."""

from __future__ import annotations

import weakref
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from storage.composition import layout_of, prepare_data_dir
from storage.content import UpstreamCheck
from storage.metadata.sqlite.lookup_cache import CACHE_BYTES, LookupCache, bytes_of_record
from storage.metadata.sqlite.read_transaction import SharedReadTransaction
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.names import RepositoryName, Tag
from storage.patterns import NamePattern, NameSet
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import BY, index_of

APP = RepositoryName("team/app")


class TrackedText(str):
    """A text that a weak reference can refer to, unlike `str`."""


async def test_long_names_in_requests_use_the_capacity_of_the_cache(registry: StoredRegistry) -> None:
    """A text after which a page of tags starts counts with its memory, which is four bytes a character if one of the
    characters is an emoji. So the cache keeps only a few of the pages after such texts."""
    await registry.put_manifest(APP, index_of([]), [Tag("v1")], by=BY)
    texts: weakref.WeakSet[TrackedText] = weakref.WeakSet()
    for number in range(600):
        after = TrackedText(f"\U0001f600{number}{'z' * 20_000}")
        texts.add(after)
        for _ in range(2):  # results are cached at the second request
            await registry.metadata.tags(APP, after, 1)
    assert 100 < len(texts) < CACHE_BYTES // (4 * 20_000)


async def test_result_none_is_cached(tmp_path: Path) -> None:
    """A lookup that finds nothing is repeated only after the data has changed. The mirror asks at each request for a
    tag whether the tag is frozen, and nearly no tag is."""
    calls = []

    def lookup(_: apsw.Connection, name: str) -> UpstreamCheck | None:
        calls.append(name)
        return UpstreamCheck(1.0, found=True) if name == "stored" and version > 1 else None

    version = 1
    data = tmp_path / "data"
    prepare_data_dir(data)
    path = layout_of(data).metadata
    with closing(SharedReadTransaction(path)) as shared_reads, closing(ScanThread(path)) as scans:
        cache = LookupCache(lambda: version, shared_reads, scans)
        assert [cache.look_up(bytes_of_record, lookup, "stored") for _ in range(4)] == [None] * 4
        assert [await cache.scan(bytes_of_record, lookup, "scanned") for _ in range(4)] == [None] * 4
        assert calls == ["stored"] * 2 + ["scanned"] * 2  # results are cached at the second request
        version = 2
        assert cache.look_up(bytes_of_record, lookup, "stored") == UpstreamCheck(1.0, found=True)


@pytest.mark.slow
async def test_sets_of_names_use_the_capacity_of_the_cache(registry: StoredRegistry) -> None:
    """A set of names counts with the memory of its patterns. Each login can have a set of its own, which is part of the
    key of a page of repositories. So the cache keeps only a part of many sets, and releases the others."""
    sets: weakref.WeakSet[NameSet] = weakref.WeakSet()
    for number in range(600):
        limits = [NamePattern(f"{number}-{pattern}/{'z' * 80}*x") for pattern in range(45)]
        names = NameSet(frozenset({NamePattern("**")}), limits=frozenset(limits))
        sets.add(names)
        for _ in range(2):
            await registry.metadata.repositories(f"{number}", 1, names)
    assert 100 < len(sets) < CACHE_BYTES // (10 * 45 * 80)
