"""A window of time that counts only the time in which a server recorded pulls."""

from __future__ import annotations

from storage.recorded_periods import ALWAYS_RECORDED, MAX_SILENT_SECONDS, RecordedPeriods

DAY = 86400.0
NOW = 100 * DAY


def test_all_time_counts_if_the_server_was_never_off() -> None:
    """If no gap is known, a window begins its length before its end."""
    assert ALWAYS_RECORDED.start_of_window(14 * DAY, NOW) == NOW - 14 * DAY
    assert RecordedPeriods([(50 * DAY, NOW)]).start_of_window(14 * DAY, NOW) == NOW - 14 * DAY


def test_a_window_is_longer_by_each_gap_inside_it() -> None:
    """A window is extended by the gaps that it contains, also by those that it contains only after it was extended.
    Gaps before the window do not matter."""
    recorded = RecordedPeriods([(10 * DAY, 50 * DAY), (70 * DAY, 80 * DAY), (90 * DAY, NOW)])
    assert recorded.start_of_window(10 * DAY, NOW) == 90 * DAY
    assert recorded.start_of_window(12 * DAY, NOW) == 78 * DAY
    assert recorded.start_of_window(20 * DAY, NOW) == 70 * DAY
    assert recorded.start_of_window(25 * DAY, NOW) == 45 * DAY


def test_the_time_before_the_first_period_does_not_count() -> None:
    """Before its first period, no server has run on the store: a command may have imported content weeks before the
    first start. So a window that is longer than all periods has no begin."""
    recorded = RecordedPeriods([(80 * DAY, 85 * DAY), (90 * DAY, NOW)])
    assert recorded.start_of_window(15 * DAY, NOW) == 80 * DAY
    assert recorded.start_of_window(15.1 * DAY, NOW) == 0.0


def test_the_time_since_the_last_record_is_a_gap_if_it_is_long() -> None:
    """If the last record is older than `MAX_SILENT_SECONDS`, no server has run since then. Otherwise the server runs,
    and its next record is due."""
    recorded = RecordedPeriods([(0.0, 80 * DAY)])
    assert recorded.start_of_window(14 * DAY, NOW) == 66 * DAY
    assert recorded.start_of_window(DAY, 80 * DAY + MAX_SILENT_SECONDS) == 79 * DAY + MAX_SILENT_SECONDS


def test_periods_in_the_future_do_not_count() -> None:
    """A period that was stored while the clock was ahead counts only up to the present time."""
    recorded = RecordedPeriods([(0.0, NOW + DAY), (NOW + 2 * DAY, NOW + 3 * DAY)])
    assert recorded.start_of_window(14 * DAY, NOW) == NOW - 14 * DAY
