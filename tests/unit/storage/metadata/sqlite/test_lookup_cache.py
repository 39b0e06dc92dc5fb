"""The memory of the cache of lookup results, whose keys contain what clients request."""

from __future__ import annotations

import weakref

import pytest

from storage.metadata.sqlite.lookup_cache import CACHE_BYTES
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
