"""The order of tags for retention after the clock of the machine was ahead for some time and was then set back."""

from __future__ import annotations

import pytest

from storage.retention import TagPosition
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import push_image
from tests.fakes.upkeep_store import APP, Clock

YEAR_DAYS = 365.0


async def push_daily(store: StoredRegistry, clock: Clock, *tags: str) -> None:
    """Pushes an image for each tag, one per day."""
    for tag in tags:
        await push_image(store, APP, tag, tag)
        clock.pass_days(1)


async def tags_until(store: StoredRegistry, position: TagPosition | None) -> set[str]:
    """Returns the tags at this position or before it; all tags if it is None."""
    tags = await store.retention.tag_facts(APP, None)
    return {tag.name for tag in tags if position is None or position.is_same_or_older_than(tag)}


async def newest_tags(store: StoredRegistry, count: int) -> set[str]:
    return await tags_until(store, await store.retention.nth_newest(APP, count))


async def test_tags_from_the_future_are_in_their_place(store: StoredRegistry, clock: Clock) -> None:
    """Tags that were pushed while the clock was ahead are newer than those before, and older than those after the clock
    was set back."""
    await push_daily(store, clock, "d", "e")
    clock.pass_days(YEAR_DAYS)
    await push_daily(store, clock, "f", "c")
    clock.pass_days(-YEAR_DAYS)
    await push_daily(store, clock, "b", "a")

    in_order = ["a", "b", "c", "f", "e", "d"]
    for count in range(1, 7):
        assert await newest_tags(store, count) == set(in_order[:count])


async def test_a_tag_that_was_pushed_again_in_the_future_has_its_earlier_place(
    store: StoredRegistry, clock: Clock
) -> None:
    """The tag history does not record that a tag was pushed again with the same manifest. If that happened while the
    clock was ahead, the tag has the place of its earlier push."""
    await push_daily(store, clock, "c", "b", "a")
    clock.pass_days(YEAR_DAYS)
    await push_daily(store, clock, "b")
    clock.pass_days(-YEAR_DAYS)
    assert [await newest_tags(store, count) for count in (1, 2)] == [{"a"}, {"a", "b"}]


@pytest.mark.parametrize("pushes_while_behind", [False, True])
async def test_a_clock_that_is_behind_keeps_the_order(
    store: StoredRegistry, clock: Clock, pushes_while_behind: bool
) -> None:
    """While the clock is behind, the times of many tags are in the future. The tags keep their order, and tags that are
    pushed meanwhile are the newest."""
    await push_daily(store, clock, "d", "c", "b", "e")
    clock.pass_days(-2.5)
    in_order = ["e", "b", "c", "d"]
    if pushes_while_behind:
        await push_image(store, APP, "f", "f")
        in_order.insert(0, "f")
    for count in range(1, len(in_order)):
        assert await newest_tags(store, count) == set(in_order[:count])


async def test_a_clock_that_is_set_back_during_a_run_loses_no_tag(store: StoredRegistry, clock: Clock) -> None:
    """If the clock is set back after the newest tags were found and before the tags are judged, the newest tags stay
    those that were found. A tag that is pushed meanwhile is newer than all."""
    await push_daily(store, clock, "a", "b")
    clock.pass_days(YEAR_DAYS)
    await push_daily(store, clock, "c")
    position = await store.retention.nth_newest(APP, 1)
    clock.pass_days(-YEAR_DAYS)
    assert await tags_until(store, position) == {"c"}
    position = await store.retention.nth_newest(APP, 1)
    clock.pass_days(1)
    await push_daily(store, clock, "d")
    assert "d" in await tags_until(store, position)
