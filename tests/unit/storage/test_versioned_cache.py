"""A cache of answers that are valid until the thing from which they were made changes."""

from __future__ import annotations

import pytest

from storage.versioned_cache import MAX_REMEMBERED_KEYS, MAX_VALUE_DIVISOR, VersionedCache

ROOM = 100 * MAX_VALUE_DIVISOR


class VersionedThing:
    """A thing that changes, with a version for each of its states."""

    def __init__(self) -> None:
        self.state = 0

    def __call__(self) -> object:
        return self.state


@pytest.fixture
def thing() -> VersionedThing:
    return VersionedThing()


@pytest.fixture
def remembered(thing: VersionedThing) -> VersionedCache[str]:
    return VersionedCache(thing, ROOM)


def test_what_was_kept_is_given_while_nothing_changes(remembered: VersionedCache[str]) -> None:
    """An answer is returned under its own key only, as long as nothing changes."""
    remembered.put("key", "answer", 1, version=0)
    assert remembered.get("key") == remembered.get("key") == "answer"
    assert remembered.get("other") is None


def test_a_change_ends_all_answers(thing: VersionedThing, remembered: VersionedCache[str]) -> None:
    """After a change, no old answer is returned, whether or not it is still right. A return to an old state does not
    bring old answers back."""
    remembered.put("key", "answer", 1, version=0)
    thing.state = 1
    assert remembered.get("key") is None
    thing.state = 0
    assert remembered.get("key") is None


def test_an_answer_from_before_a_change_is_not_kept(thing: VersionedThing, remembered: VersionedCache[str]) -> None:
    """An answer that was looked up before a change and offered after it is not cached, because it may be out of
    date."""
    assert remembered.get("key") is None
    thing.state = 1
    remembered.put("key", "stale", 1, version=0)
    assert remembered.get("key") is None
    remembered.put("key", "stale", 1, version=0)
    assert remembered.get("key") is None
    remembered.put("key", "fresh", 1, version=1)
    assert remembered.get("key") == "fresh"


def test_what_is_kept_has_a_bound(remembered: VersionedCache[str]) -> None:
    """The size of the cache is limited: the oldest answers are evicted, and the newest stays."""
    for number in range(3 * MAX_VALUE_DIVISOR):
        remembered.put(number, str(number), ROOM // MAX_VALUE_DIVISOR, version=0)
        assert remembered.get(number) == str(number)
        assert sum(remembered.get(other) is not None for other in range(3 * MAX_VALUE_DIVISOR)) <= MAX_VALUE_DIVISOR
    assert remembered.get(2 * MAX_VALUE_DIVISOR) == str(2 * MAX_VALUE_DIVISOR)
    assert remembered.get(0) is None


def test_one_large_answer_does_not_drive_out_all_others(remembered: VersionedCache[str]) -> None:
    """A very large answer is not cached."""
    remembered.put("small", "answer", 1, version=0)
    remembered.put("large", "answer", ROOM // MAX_VALUE_DIVISOR + 1, version=0)
    assert remembered.get("large") is None
    assert remembered.get("small") == "answer"


def test_keeping_an_answer_twice_takes_its_room_once(remembered: VersionedCache[str]) -> None:
    """If two callers offer the same answer, its size counts once."""
    remembered.put("first", "answer", ROOM // MAX_VALUE_DIVISOR, version=0)
    for _ in range(3 * MAX_VALUE_DIVISOR):
        remembered.put("again", "answer", ROOM // MAX_VALUE_DIVISOR, version=0)
    assert remembered.get("first") == remembered.get("again") == "answer"


def test_what_was_asked_once_is_not_wanted_yet(thing: VersionedThing, remembered: VersionedCache[str]) -> None:
    """An answer is worth caching from the second request for it on, even if there was a change in between. Requests
    that were long ago do not count."""
    assert not remembered.should_cache("key")
    thing.state = 1
    assert remembered.should_cache("key")
    assert not any(remembered.should_cache(number) for number in range(MAX_REMEMBERED_KEYS))
    assert not remembered.should_cache("key")
    assert remembered.should_cache(MAX_REMEMBERED_KEYS - 1)
