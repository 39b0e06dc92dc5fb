"""The checks of `entrepot doctor` that compare this machine's clock with the clocks of the upstreams, with the times of
files in the data directory, and with `EARLIEST_PLAUSIBLE_TIME`, a fixed time before the release of this program."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Final

from registry.cli.diagnosis.finding import Finding, ok, problem, warning
from storage.composition import layout_of

CHECK: Final = "clock"
TOLERANCE_SECONDS: Final = 30.0
"""Largest difference from the clock of an upstream that is no finding. The measurement is not exact: the difference
includes the time that a response takes, and Date headers have whole seconds."""
LOGIN_FAILURE_SECONDS: Final = 300.0
"""A larger difference from the clock of an upstream is a problem, not only a warning: logins at upstreams fail, because
the tokens of upstreams are often valid for only five minutes."""
_FUTURE_SECONDS: Final = 60.0
"""If the time of a file is more than this many seconds in the future, the clock was set back after the file was
written."""
EARLIEST_PLAUSIBLE_TIME: Final = 1_767_225_600.0
"""The beginning of 2026, in seconds since 1970. This program is newer, so a clock that shows an earlier time is
wrong."""
_SET_CLOCK_STEP: Final = "set the clock, and let a service keep it right: timedatectl set-ntp true"


def clock_findings(now: float, dates: Mapping[str, tuple[str, float]]) -> list[Finding]:
    """Returns the findings about the clock. `now`: the time in seconds since 1970. `dates`: maps the URL
    of each endpoint to the Date header of its response, and to the time on this machine's clock at which the response
    arrived."""
    findings = [*_program_date_findings(now), *_upstream_clock_findings(dates)]
    what = "the clock agrees with the upstreams"
    if not dates:
        year = time.gmtime(EARLIEST_PLAUSIBLE_TIME).tm_year
        what = f"the clock shows the year {year} or later; no upstream has sent its time"
    return findings or [ok(CHECK, what)]


def _program_date_findings(now: float) -> Iterator[Finding]:
    """Yields a finding if the clock shows a time before `EARLIEST_PLAUSIBLE_TIME`."""
    if now < EARLIEST_PLAUSIBLE_TIME:
        why = "certificates and tokens are not valid yet; what is pushed now looks old to retention"
        clock_text = time.strftime("%Y-%m-%d %H:%M", time.gmtime(now))
        yield problem(CHECK, f"the clock says {clock_text} UTC, but this program is newer", why, _SET_CLOCK_STEP)


def _upstream_clock_findings(dates: Mapping[str, tuple[str, float]]) -> Iterator[Finding]:
    """Yields a finding if the clock of this machine differs from the clocks of all upstreams. The finding names the
    upstream with the smallest difference. A larger difference may be a fault of the upstream's clock."""
    differences: dict[str, float] = {}
    for url, (text, arrived) in dates.items():
        with suppress(ValueError, TypeError, OverflowError):
            differences[url] = arrived - parsedate_to_datetime(text[:64]).timestamp()
    if not differences:
        return
    url, difference = min(differences.items(), key=lambda item: abs(item[1]))
    if abs(difference) <= TOLERANCE_SECONDS:
        return
    direction = "ahead of" if difference > 0 else "behind"
    what = f"the clock is {_duration(abs(difference))} {direction} {url}"
    if abs(difference) > LOGIN_FAILURE_SECONDS:
        why = "logins at upstreams fail, tokens of issuers are refused, and certificates look expired or not valid yet"
        yield problem(CHECK, what, why, _SET_CLOCK_STEP)
    else:
        yield warning(CHECK, what, "tokens are valid for a shorter time than they should be", _SET_CLOCK_STEP)


def file_clock_findings(now: float, data: Path) -> list[Finding]:
    """Returns a finding if a file that the server writes in the data directory has a time in the future. `now`: the
    time in seconds since 1970. Blocks, and never returns if the disk does not respond."""
    layout = layout_of(data)
    files = [layout.metadata, layout.metadata.with_name(layout.metadata.name + "-wal"), layout.reserve, layout.uploads]
    newest: tuple[float, Path] | None = None
    for path in files:
        with suppress(OSError):
            written = path.stat().st_mtime
            newest = max(newest or (written, path), (written, path))
    if newest is None or newest[0] - now <= _FUTURE_SECONDS:
        return []
    what = f"{newest[1]} was written {_duration(newest[0] - now)} in the future"
    why = "the clock was set back: recorded times of pulls and pushes, which retention and eviction use, are wrong"
    return [problem(CHECK, what, why, _SET_CLOCK_STEP)]


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
