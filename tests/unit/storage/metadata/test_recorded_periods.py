"""The store records the periods in which a server runs and records pulls. The times between them are gaps, in which
nobody could pull."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from storage.composition import prepare_data_dir
from storage.data_dir.system import boot_id
from storage.metadata.sqlite.upkeep import recorded_periods
from storage.recorded_periods import RecordedPeriods
from storage.store.stored_registry import StoredRegistry
from tests.fakes import written_data_dir as previous_release
from tests.fakes.upkeep_store import DAY, START, Clock, clocked_store

HOUR, MINUTE = 3600.0, 60.0


async def mark_every_five_minutes(store: StoredRegistry, clock: Clock, seconds: float) -> None:
    for _ in range(int(seconds // (5 * MINUTE))):
        clock.now += 5 * MINUTE
        await store.pulls.mark_pulls_recorded(clock())


async def test_a_running_server_extends_one_period(store: StoredRegistry, clock: Clock) -> None:
    """While a server runs, one period grows. A short restart of the server does not end it."""
    await store.pulls.mark_pulls_recorded(clock())
    await mark_every_five_minutes(store, clock, HOUR)
    clock.now += 50 * MINUTE
    await store.pulls.mark_pulls_recorded(clock())
    assert await store.retention.recorded_periods() == RecordedPeriods([(START, clock())])


async def test_a_silence_of_more_than_an_hour_is_a_gap(store: StoredRegistry, clock: Clock) -> None:
    """If the server was off for more than an hour, or the clock has jumped ahead, a new period begins."""
    await store.pulls.mark_pulls_recorded(clock())
    await mark_every_five_minutes(store, clock, HOUR)
    stopped = clock()
    clock.pass_days(20)
    await store.pulls.mark_pulls_recorded(clock())
    recorded = await store.retention.recorded_periods()
    assert recorded == RecordedPeriods([(START, stopped), (clock(), clock())])
    assert recorded.start_of_window(HOUR / 2, clock()) == stopped - HOUR / 2


async def test_periods_in_the_future_are_corrected(store: StoredRegistry, clock: Clock) -> None:
    """If the clock was ahead and is set back, the periods of that time are removed, so that the present counts."""
    await store.pulls.mark_pulls_recorded(clock())
    clock.pass_days(30)
    await store.pulls.mark_pulls_recorded(clock())
    clock.now = START + 10 * MINUTE
    await store.pulls.mark_pulls_recorded(clock())
    assert await store.retention.recorded_periods() == RecordedPeriods([(START, clock())])


async def test_a_period_that_ends_in_the_future_is_cut(store: StoredRegistry, clock: Clock) -> None:
    """If the clock is set back within a period, the period ends at the present time."""
    await store.pulls.mark_pulls_recorded(clock())
    await mark_every_five_minutes(store, clock, HOUR)
    clock.now = START + 10 * MINUTE
    await store.pulls.mark_pulls_recorded(clock())
    assert await store.retention.recorded_periods() == RecordedPeriods([(START, clock())])


async def test_the_number_of_periods_is_limited(
    store: StoredRegistry, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the newest periods are kept, however often the server was off."""
    monkeypatch.setattr(recorded_periods, "MAX_PERIODS", 3)
    for _ in range(5):
        clock.pass_days(1)
        await store.pulls.mark_pulls_recorded(clock())
    times = [START + day * DAY for day in (3, 4, 5)]
    assert await store.retention.recorded_periods() == RecordedPeriods([(at, at) for at in times])


async def test_a_store_without_content_has_no_period(store: StoredRegistry) -> None:
    """Nothing is known about a new store, so all time counts as recorded."""
    assert await store.retention.recorded_periods() == RecordedPeriods([])


async def test_an_earlier_version_was_on_until_its_last_known_change(tmp_path: Path) -> None:
    """The store of a version that did not record these periods counts as recorded until its newest pull or change of
    a tag. The time since then may have been a gap."""
    data = tmp_path / "data"
    previous_release.write_data_dir(data, boot_id())
    prepare_data_dir(data)
    with closing(apsw.Connection(str(data / "entrepot.db"))) as db:
        # As if the version before this one had recorded these pulls, one of them with a clock that was ahead.
        for manifest, pulled in enumerate((previous_release.NOW + 5 * DAY, time.time() + DAY), 1):
            db.execute(
                "INSERT OR REPLACE INTO manifest_pull (manifest, upstream, last, pulls) VALUES (?, '', ?, 1)",
                (manifest, pulled),
            )
        db.execute("DROP TABLE recorded_period; PRAGMA user_version = 14")
    clock = Clock(time.time())
    async with clocked_store(data, clock) as store:
        recorded = await store.retention.recorded_periods()
        assert recorded == RecordedPeriods([(0.0, previous_release.NOW + 5 * DAY)])
        assert recorded.start_of_window(DAY, clock()) == previous_release.NOW + 4 * DAY
