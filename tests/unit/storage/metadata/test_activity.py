"""The store of the registry's activity over time: the numbers of pulls, pushes and mirrored requests in each hour."""

from __future__ import annotations

from pathlib import Path

from storage.activity import DAY_SECONDS, HOUR_SECONDS, KEEP_SECONDS, Activity, ActivityBucket
from storage.composition import open_registry
from storage.store.stored_registry import StoredRegistry
from tests.fakes.upkeep_store import Clock, clocked_store

DAY = 19_675 * DAY_SECONDS
"""A midnight in UTC."""


async def test_activity_adds_up(store: StoredRegistry) -> None:
    """Activity adds up by hour and by day. Hours without activity have no bucket."""
    activity = store.activity
    await activity.add(DAY + 1, Activity(pulls=1, fetched_bytes=2**40))
    await activity.add(DAY + HOUR_SECONDS - 1, Activity(1, 2, 3, 4, 5, 6))
    await activity.add(DAY + 5 * HOUR_SECONDS, Activity(pushes=7))
    await activity.add(DAY + DAY_SECONDS, Activity(misses=8))
    first, later, next_day = Activity(2, 2, 3, 4, 2**40 + 5, 6), Activity(pushes=7), Activity(misses=8)
    assert await activity.buckets(DAY + 60, HOUR_SECONDS) == [
        ActivityBucket(DAY, first),
        ActivityBucket(DAY + 5 * HOUR_SECONDS, later),
        ActivityBucket(DAY + DAY_SECONDS, next_day),
    ]
    assert await activity.buckets(DAY + 3600, HOUR_SECONDS) == [
        ActivityBucket(DAY + 5 * HOUR_SECONDS, later),
        ActivityBucket(DAY + DAY_SECONDS, next_day),
    ]
    assert await activity.buckets(DAY + 7200, DAY_SECONDS) == [
        ActivityBucket(DAY, Activity(2, 9, 3, 4, 2**40 + 5, 6)),
        ActivityBucket(DAY + DAY_SECONDS, next_day),
    ]


async def test_old_hours_are_deleted(store: StoredRegistry) -> None:
    """The activity of an hour is kept for `KEEP_SECONDS`. Older hours are deleted when new activity is added."""
    await store.activity.add(DAY, Activity(pulls=1))
    await store.activity.add(DAY + KEEP_SECONDS, Activity(pulls=2))
    assert len(await store.activity.buckets(0, HOUR_SECONDS)) == 2
    await store.activity.add(DAY + KEEP_SECONDS + HOUR_SECONDS, Activity(pulls=3))
    assert [bucket.activity.pulls for bucket in await store.activity.buckets(0, HOUR_SECONDS)] == [2, 3]


async def test_activity_survives_a_restart(tmp_path: Path) -> None:
    """The activity of all processes is added up, and it is kept over a restart."""
    async with clocked_store(tmp_path, Clock()) as store, open_registry(tmp_path, clock=Clock()) as other:
        await store.activity.add(DAY, Activity(pulls=1))
        await other.activity.add(DAY, Activity(pulls=1))
    async with clocked_store(tmp_path, Clock()) as store:
        assert await store.activity.buckets(DAY, DAY_SECONDS) == [ActivityBucket(DAY, Activity(pulls=2))]
