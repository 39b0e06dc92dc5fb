"""A cache of answers that were made from versioned data. An answer is valid until the version of the data changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest

from storage.versioned_cache import (
    MAX_REMEMBERED_KEYS,
    MAX_VALUE_DIVISOR,
    MIN_FREE_DIVISOR,
    SETTLED_MISSES,
    VersionedCache,
)

CAPACITY = 100 * MAX_VALUE_DIVISOR
"""The capacity of the cache. Each answer states how much of the capacity it uses. Keys that are numbers use nothing."""


class DataVersion:
    """The version of the data from which the answers are made. A test changes it."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> object:
        return self.number


@pytest.fixture
def data_version() -> DataVersion:
    return DataVersion()


@pytest.fixture
def cache(data_version: DataVersion) -> VersionedCache[str]:
    return VersionedCache(data_version, CAPACITY)


def test_an_answer_is_valid_while_the_version_stays_the_same(cache: VersionedCache[str]) -> None:
    """An answer is returned for its own key only, as long as the version does not change."""
    cache.put("key", "answer", 1, version=0)
    assert cache.get("key") == cache.get("key") == "answer"
    assert cache.get("other") is None


def test_a_new_version_invalidates_all_answers(data_version: DataVersion, cache: VersionedCache[str]) -> None:
    """After the version has changed, no earlier answer is returned. This also holds if the version changes back to an
    earlier value."""
    cache.put("key", "answer", 1, version=0)
    data_version.number = 1
    assert cache.get("key") is None
    data_version.number = 0
    assert cache.get("key") is None


def test_an_answer_of_an_earlier_version_is_not_cached(data_version: DataVersion, cache: VersionedCache[str]) -> None:
    """If an answer was made from an earlier version of the data, it is not cached, because it may be out of date."""
    assert cache.get("key") is None
    data_version.number = 1
    cache.put("key", "stale", 1, version=0)
    assert cache.get("key") is None
    cache.put("key", "stale", 1, version=0)
    assert cache.get("key") is None
    cache.put("key", "fresh", 1, version=1)
    assert cache.get("key") == "fresh"


def test_the_size_of_the_cache_is_limited(cache: VersionedCache[str]) -> None:
    """When the cache is full, the oldest answers are evicted, and the newest answer is cached."""
    for number in range(3 * MAX_VALUE_DIVISOR):
        cache.put(number, str(number), CAPACITY // MAX_VALUE_DIVISOR, version=0)
        assert cache.get(number) == str(number)
        assert sum(cache.get(other) is not None for other in range(3 * MAX_VALUE_DIVISOR)) <= MAX_VALUE_DIVISOR
    assert cache.get(2 * MAX_VALUE_DIVISOR) == str(2 * MAX_VALUE_DIVISOR)
    assert cache.get(0) is None


def test_a_very_large_answer_is_not_cached(cache: VersionedCache[str]) -> None:
    """A very large answer is not cached, so that it does not evict all other answers."""
    cache.put(1, "answer", 1, version=0)
    cache.put(2, "answer", CAPACITY // MAX_VALUE_DIVISOR + 1, version=0)
    assert cache.get(2) is None
    assert cache.get(1) == "answer"


def test_the_size_of_a_repeated_answer_counts_once(cache: VersionedCache[str]) -> None:
    """If the same answer is put into the cache several times, its size counts once."""
    cache.put(1, "answer", CAPACITY // MAX_VALUE_DIVISOR, version=0)
    for _ in range(3 * MAX_VALUE_DIVISOR):
        cache.put(2, "answer", CAPACITY // MAX_VALUE_DIVISOR, version=0)
    assert cache.get(1) == cache.get(2) == "answer"


def fill(cache: VersionedCache[str], share: float) -> None:
    """Fills a share of the cache with answers that are half as large as the largest that the cache stores."""
    for number in range(int(share * 2 * MAX_VALUE_DIVISOR)):
        cache.put(-1 - number, "answer", CAPACITY // (2 * MAX_VALUE_DIVISOR), version=0)


def test_a_full_cache_takes_answers_from_the_second_request_on(
    data_version: DataVersion, cache: VersionedCache[str]
) -> None:
    """If the cache is nearly full, an answer should be cached when it is requested for the second time. The first
    request no longer counts after many requests for other answers."""
    assert cache.get("key") is None
    fill(cache, 1.0)
    assert not cache.should_cache("key")
    assert cache.should_cache("key")
    assert not any(cache.should_cache(number) for number in range(MAX_REMEMBERED_KEYS))
    assert not cache.should_cache("key")
    assert cache.should_cache(MAX_REMEMBERED_KEYS - 1)


def test_a_request_before_a_change_counts(data_version: DataVersion, cache: VersionedCache[str]) -> None:
    """An answer should be cached at the second request, even if the version has changed since the first one."""
    assert cache.get("key") is None
    assert not cache.should_cache("key")
    data_version.number = 1
    assert cache.get("key") is None
    assert cache.should_cache("key")


def test_a_cache_with_room_takes_answers_from_the_first_request_on(
    data_version: DataVersion, cache: VersionedCache[str]
) -> None:
    """While the cache has room, an answer should be cached at its first request, but only when many answers were not
    found since the last change of the data. So answers are not cached for nothing while the data changes constantly."""
    for version in range(2):
        data_version.number = version
        assert cache.get("key") is None
        assert not any(cache.should_cache((version, number)) for number in range(SETTLED_MISSES))
        assert all(cache.should_cache((version, "more", number)) for number in range(SETTLED_MISSES))


def test_answers_requested_once_leave_a_part_of_the_cache_free(cache: VersionedCache[str]) -> None:
    """Answers that are requested only once fill the cache up to a part, which is left to answers that are requested
    again."""
    assert cache.get("key") is None
    for number in range(SETTLED_MISSES):
        cache.should_cache(number)
    fill(cache, 1 - 1 / MIN_FREE_DIVISOR)
    assert cache.should_cache("first")
    cache.put("first", "answer", 1, version=0)
    assert not cache.should_cache("second")
    assert cache.should_cache("second")


@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: (1, text.encode(), None)], ids=["text", "tuple"])
def test_the_memory_of_keys_counts(data_version: DataVersion, wrap: Callable[[str], Hashable]) -> None:
    """The cache counts the text of a key, also in a tuple, because clients choose parts of some keys. So many small
    answers under long keys do not exceed the capacity, and an answer under a very long key is not cached."""
    capacity = 1_000_000
    cache: VersionedCache[str] = VersionedCache(data_version, capacity)
    keys = [wrap(str(number).zfill(10_000)) for number in range(200)]
    for key in keys:
        cache.put(key, "answer", 1, version=0)
    cached_count = sum(cache.get(key) is not None for key in keys)
    assert 90 <= cached_count <= 100
    longest = wrap("x" * (capacity // MAX_VALUE_DIVISOR))
    cache.put(longest, "answer", 1, version=0)
    assert cache.get(longest) is None
    assert sum(cache.get(key) is not None for key in keys) == cached_count
