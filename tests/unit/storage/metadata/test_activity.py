"""The store of activity (numbers of pulls, pushes and mirrored requests) over time."""

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
    log = store.activity
    await log.add(DAY + 1, Activity(pulls=1, fetched_bytes=2**40))
    await log.add(DAY + HOUR_SECONDS - 1, Activity(1, 2, 3, 4, 5, 6))
    await log.add(DAY + 5 * HOUR_SECONDS, Activity(pushes=7))
    await log.add(DAY + DAY_SECONDS, Activity(misses=8))
    first, later, next_day = Activity(2, 2, 3, 4, 2**40 + 5, 6), Activity(pushes=7), Activity(misses=8)
    assert await log.buckets(DAY + 60, HOUR_SECONDS) == [
        ActivityBucket(DAY, first),
        ActivityBucket(DAY + 5 * HOUR_SECONDS, later),
        ActivityBucket(DAY + DAY_SECONDS, next_day),
    ]
    assert await log.buckets(DAY + 3600, HOUR_SECONDS) == [
        ActivityBucket(DAY + 5 * HOUR_SECONDS, later),
        ActivityBucket(DAY + DAY_SECONDS, next_day),
    ]
    assert await log.buckets(DAY + 7200, DAY_SECONDS) == [
        ActivityBucket(DAY, Activity(2, 9, 3, 4, 2**40 + 5, 6)),
        ActivityBucket(DAY + DAY_SECONDS, next_day),
    ]


async def test_old_hours_are_deleted(store: StoredRegistry) -> None:
    """Each hour is kept for a month. It is deleted when activity of a later hour is added."""
    await store.activity.add(DAY, Activity(pulls=1))
    await store.activity.add(DAY + KEEP_SECONDS, Activity(pulls=2))
    assert len(await store.activity.buckets(0, HOUR_SECONDS)) == 2
    await store.activity.add(DAY + KEEP_SECONDS + HOUR_SECONDS, Activity(pulls=3))
    assert [bucket.activity.pulls for bucket in await store.activity.buckets(0, HOUR_SECONDS)] == [2, 3]


async def test_activity_survives_a_restart(tmp_path: Path) -> None:
    """Other processes see it as well."""
    async with clocked_store(tmp_path, Clock()) as store, open_registry(tmp_path, clock=Clock()) as other:
        await store.activity.add(DAY, Activity(pulls=1))
        await other.activity.add(DAY, Activity(pulls=1))
    async with clocked_store(tmp_path, Clock()) as store:
        assert await store.activity.buckets(DAY, DAY_SECONDS) == [ActivityBucket(DAY, Activity(pulls=2))]
