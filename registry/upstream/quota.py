"""Rate limits of upstreams: back-off after a 429 (`RateLimitBackoff`), and the requests that are left as
`ratelimit-remaining` tells (`RemainingRequests`).

Both are kept in Records, so that all processes know them. A 429 applies to one kind of request at one endpoint: Docker
Hub limits manifests and goes on answering HEAD requests and sending blobs.
"""

from __future__ import annotations

import email.utils
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum

from registry.upstream.destinations import loggable_origin
from registry.upstream.upstream_responses import parse_count
from storage.content import Allowance
from storage.errors import StorageFailed, StorageFull, TooManyRequests
from storage.upstream_records import UpstreamRecords

log = logging.getLogger("registry.upstream")

RECORDS_CACHED_SECONDS = 1.0
"""Time for which values read from Records are used without reading them again."""
MAX_RETRY_AFTER_SECONDS = 3600.0
"""Longest pause that an upstream can impose. It may ask for a day; it is asked again after this."""
MAX_DATE_LENGTH = 64
"""Longest date, in characters, that is parsed in `Retry-After`."""
DEFAULT_RETRY_AFTER_SECONDS = 5.0
"""Pause after a 429 without `Retry-After`."""


class RequestKind(StrEnum):
    """Kinds of requests that upstreams limit separately."""

    MANIFEST = "manifest"
    HEAD = "head"
    """HEAD of a manifest."""
    BLOB = "blob"
    LIST = "list"
    LOGIN = "login"
    """Asking an endpoint how to log in."""


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Returns the seconds in `Retry-After` (RFC 9110, 10.2.3: a count or a date); None: there is none."""
    text = headers.get("retry-after", "").strip()
    if (count := parse_count(text)) is not None:
        return float(count)
    if len(text) > MAX_DATE_LENGTH:
        return None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


class RateLimitBackoff:
    """The pauses of one upstream after 429 responses. `clock`: seconds since 1970."""

    def __init__(self, name: str, records: UpstreamRecords, clock: Callable[[], float]) -> None:
        self._name = name
        self._records = records
        self._clock = clock
        self._known: dict[str, tuple[float, float]] = {}
        """For each key, the end of its pause, and when Records was read."""

    async def raise_if_limited(self, url: str, kind: RequestKind) -> None:
        """Raises TooManyRequests while the endpoint at `url` is paused for this kind of request. Sends nothing."""
        key, now = _key(self._name, url, kind), self._clock()
        until, looked = self._known.get(key, (0.0, -math.inf))
        if not 0 <= now - looked < RECORDS_CACHED_SECONDS:
            kept = await self._records.allowance(key)
            until = _later(until, kept.until if kept else 0.0, now)
            self._known[key] = until, now
        if (wait := _wait(until, now)) > 0:
            raise self.error(wait)

    async def record(self, url: str, kind: RequestKind, headers: Mapping[str, str]) -> TooManyRequests:
        """Records a 429 and returns its error. Until the named time, `raise_if_limited` raises it, too."""
        key, now = _key(self._name, url, kind), self._clock()
        wait = self._asked(headers, now)
        until = _later(self._known.get(key, (0.0, 0.0))[0], now + wait, now)
        self._known[key] = until, now
        try:
            await self._records.save_allowance(key, Allowance(now, until=until))
        except (StorageFailed, StorageFull) as error:
            log.warning("cannot record the rate limit of %s for the other workers: %s", self._name, error)
        return self.error(wait)

    def unrecorded_error(self, headers: Mapping[str, str]) -> TooManyRequests:
        """Returns the error for a 429 that pauses nothing, such as that of a redirect's target."""
        return self.error(self._asked(headers, self._clock()))

    def _asked(self, headers: Mapping[str, str], now: float) -> float:
        asked = parse_retry_after(headers, now)
        return min(DEFAULT_RETRY_AFTER_SECONDS if asked is None else asked, MAX_RETRY_AFTER_SECONDS)

    def error(self, wait: float) -> TooManyRequests:
        """Returns the error for a pause of `wait` seconds."""
        seconds = max(1, math.ceil(wait))
        return TooManyRequests(
            f"the upstream registry {self._name} wants fewer requests; it may be asked again in {seconds} s",
            retry_after=seconds,
        )


async def limited_until(records: UpstreamRecords, name: str, endpoints: Iterable[str], now: float) -> float | None:
    """Returns when manifests may be requested again, in seconds since 1970; None: now, at one of `endpoints`."""
    ends = []
    for endpoint in endpoints:
        kept = await records.allowance(_key(name, endpoint, RequestKind.MANIFEST))
        if kept is None or _wait(kept.until, now) <= 0:
            return None
        ends.append(kept.until)
    return min(ends, default=None)


def _key(name: str, url: str, kind: RequestKind) -> str:
    return f"{name} {loggable_origin(url)} {kind}"


def _wait(until: float, now: float) -> float:
    """Returns the seconds left. A time further away than the longest pause was recorded before the clock was set
    back."""
    return until - now if until - now <= MAX_RETRY_AFTER_SECONDS else 0.0


def _later(one: float, other: float, now: float) -> float:
    return max(until if _wait(until, now) > 0 else 0.0 for until in (one, other))


REMAINING_VALID_SECONDS = 3600.0
"""Time after which a recorded number of remaining requests is ignored. A HEAD request, which costs nothing, then brings
a new one."""


def _first_count(text: str | None) -> int | None:
    """Returns `100` of `100;w=21600`."""
    return parse_count((text or "").partition(";")[0].partition(",")[0])


class RemainingRequests:
    """How many requests one upstream still allows."""

    def __init__(self, name: str, records: UpstreamRecords, clock: Callable[[], float]) -> None:
        self._name = name
        self._records = records
        self._clock = clock
        self._known: Allowance | None = None
        self._looked = -math.inf

    async def refresh(self) -> None:
        """Reads what other processes have recorded."""
        now = self._clock()
        if not 0 <= now - self._looked < RECORDS_CACHED_SECONDS:
            self._known = await self._records.allowance(self._name)
            self._looked = now

    def is_exhausted(self) -> bool:
        """Returns whether at most a tenth of the limit is left, as far as this process knows. Every request refreshes
        that."""
        known = self._known
        if known is None or known.remaining is None or not 0 <= self._clock() - known.at < REMAINING_VALID_SECONDS:
            return False
        return known.remaining <= (known.limit or 0) // 10

    async def note(self, headers: Mapping[str, str]) -> None:
        """Records the numbers in a response's headers."""
        remaining = _first_count(headers.get("ratelimit-remaining"))
        if remaining is None:
            return
        allowance = Allowance(self._clock(), remaining, _first_count(headers.get("ratelimit-limit")))
        known = self._known
        if (
            known
            and (known.remaining, known.limit) == (remaining, allowance.limit)
            and allowance.at - known.at < REMAINING_VALID_SECONDS / 60
        ):
            return
        self._known = allowance
        try:
            await self._records.save_allowance(self._name, allowance)
        except (StorageFailed, StorageFull) as error:
            log.warning("cannot record the remaining requests of %s for the other workers: %s", self._name, error)
