"""Answers that are kept until what they were made of changes."""

from __future__ import annotations

import pytest

from storage.versioned_cache import MAX_REMEMBERED_KEYS, MAX_VALUE_DIVISOR, VersionedCache

ROOM = 100 * MAX_VALUE_DIVISOR


class VersionedThing:
    """A thing that changes, and the mark of its state."""

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
    """Under its own key, and no other."""
    remembered.put("key", "answer", 1, version=0)
    assert remembered.get("key") == remembered.get("key") == "answer"
    assert remembered.get("other") is None


def test_a_change_ends_all_answers(thing: VersionedThing, remembered: VersionedCache[str]) -> None:
    """At the next question, whether or not the answer would be another; going back to an old state brings none back."""
    remembered.put("key", "answer", 1, version=0)
    thing.state = 1
    assert remembered.get("key") is None
    thing.state = 0
    assert remembered.get("key") is None


def test_an_answer_from_before_a_change_is_not_kept(thing: VersionedThing, remembered: VersionedCache[str]) -> None:
    """Looked up before the change and offered after it: it may be stale."""
    assert remembered.get("key") is None
    thing.state = 1
    remembered.put("key", "stale", 1, version=0)
    assert remembered.get("key") is None
    remembered.put("key", "stale", 1, version=0)
    assert remembered.get("key") is None
    remembered.put("key", "fresh", 1, version=1)
    assert remembered.get("key") == "fresh"


def test_what_is_kept_has_a_bound(remembered: VersionedCache[str]) -> None:
    """The oldest give way; what was kept last is there."""
    for number in range(3 * MAX_VALUE_DIVISOR):
        remembered.put(number, str(number), ROOM // MAX_VALUE_DIVISOR, version=0)
        assert remembered.get(number) == str(number)
        assert sum(remembered.get(other) is not None for other in range(3 * MAX_VALUE_DIVISOR)) <= MAX_VALUE_DIVISOR
    assert remembered.get(2 * MAX_VALUE_DIVISOR) == str(2 * MAX_VALUE_DIVISOR)
    assert remembered.get(0) is None


def test_one_large_answer_does_not_drive_out_all_others(remembered: VersionedCache[str]) -> None:
    """It is simply not kept."""
    remembered.put("small", "answer", 1, version=0)
    remembered.put("large", "answer", ROOM // MAX_VALUE_DIVISOR + 1, version=0)
    assert remembered.get("large") is None
    assert remembered.get("small") == "answer"


def test_keeping_an_answer_twice_takes_its_room_once(remembered: VersionedCache[str]) -> None:
    """Two that ask at once both offer what they found."""
    remembered.put("first", "answer", ROOM // MAX_VALUE_DIVISOR, version=0)
    for _ in range(3 * MAX_VALUE_DIVISOR):
        remembered.put("again", "answer", ROOM // MAX_VALUE_DIVISOR, version=0)
    assert remembered.get("first") == remembered.get("again") == "answer"


def test_what_was_asked_once_is_not_wanted_yet(thing: VersionedThing, remembered: VersionedCache[str]) -> None:
    """The second time it is, a change in between or not; what was asked very long ago counts no more."""
    assert not remembered.should_cache("key")
    thing.state = 1
    assert remembered.should_cache("key")
    assert not any(remembered.should_cache(number) for number in range(MAX_REMEMBERED_KEYS))
    assert not remembered.should_cache("key")
    assert remembered.should_cache(MAX_REMEMBERED_KEYS - 1)
