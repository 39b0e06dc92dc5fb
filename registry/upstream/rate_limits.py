"""Rate limits of upstreams.

`RateLimitBackoff` pauses requests to an endpoint (one of the URLs of an upstream) after a response with the status 429.
A pause applies to one kind of request at one endpoint, because Docker Hub may refuse GET requests for manifests while
it still answers HEAD requests and sends blobs. `RemainingRequests` reads the number of requests that the upstream still
allows from the header `ratelimit-remaining`.

Both classes store their values in the metadata store (`UpstreamRecords`), so that all worker processes use them. The
record of a value is an `Allowance`, which has either the number of remaining requests or the end of a pause (`until`).
"""

from __future__ import annotations

import email.utils
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from registry.upstream.destinations import loggable_origin
from registry.upstream.upstream_responses import parse_count
from storage.content import Allowance
from storage.errors import StorageFailed, StorageFull, TooManyRequests
from storage.upstream_records import MAX_PAUSE_SECONDS, UpstreamRecords

log = logging.getLogger("registry.upstream")

STORED_VALUES_CACHED_SECONDS = 1.0
"""Time for which a process uses values from the metadata store before it reads them again."""
DEFAULT_PAUSE_SECONDS = 5.0
"""Pause after a 429 without a valid `Retry-After`."""
MAX_DATE_LENGTH = 64
"""Longest date in `Retry-After` that is parsed, in characters."""
REMAINING_VALID_SECONDS = 3600.0
"""Time after which a stored number of remaining requests is ignored as too old. Usually, a newer number arrives
earlier, with the response to a HEAD request: Docker Hub does not count HEAD requests against the limit."""
REMAINING_REWRITE_SECONDS = 60.0
"""Shortest time between two writes of the same number of remaining requests."""


class RequestKind(StrEnum):
    """Kinds of requests that upstreams limit separately."""

    MANIFEST = "manifest"
    """GET of a manifest."""
    HEAD = "head"
    """HEAD of a manifest."""
    BLOB = "blob"
    LIST = "list"
    LOGIN = "login"
    """GET of `/v2/`, which shows how to log in."""


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Returns the pause in seconds that a `Retry-After` header asks for; None: the header is missing or not valid. The
    header contains a number of seconds or a date (RFC 9110, 10.2.3). `headers` has names in lower case. `now` is in
    seconds since 1970."""
    text = headers.get("retry-after", "").strip()
    if (seconds := parse_count(text)) is not None:
        return float(seconds)
    if len(text) > MAX_DATE_LENGTH:
        return None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


class _CachedPause(NamedTuple):
    """A pause as this process knows it. Times are in seconds since 1970."""

    ends_at: float
    """The end of the pause; 0.0: there is no pause."""
    read_at: float
    """When the end was last read from the metadata store or written to it."""


class RateLimitBackoff:
    """The pauses of one upstream after 429 responses. `clock` returns seconds since 1970."""

    def __init__(self, upstream_name: str, records: UpstreamRecords, clock: Callable[[], float]) -> None:
        self._upstream_name = upstream_name
        self._records = records
        self._clock = clock
        self._pauses: dict[str, _CachedPause] = {}
        """The known pauses, by the key of an endpoint and a kind of request (`_pause_key`)."""

    async def raise_if_limited(self, url: str, kind: RequestKind) -> None:
        """Raises TooManyRequests if this kind of request is paused at the endpoint `url`. Does not send a request."""
        key, now = _pause_key(self._upstream_name, url, kind), self._clock()
        ends_at, read_at = self._pauses.get(key, _CachedPause(0.0, -math.inf))
        if not 0 <= now - read_at < STORED_VALUES_CACHED_SECONDS:
            stored = await self._records.allowance(key)
            ends_at = _later_end(ends_at, stored.until if stored else 0.0, now)
            self._pauses[key] = _CachedPause(ends_at, now)
        if (remaining_seconds := _remaining_pause(ends_at, now)) > 0:
            raise self.error_for_pause(remaining_seconds)

    async def record_429(self, url: str, kind: RequestKind, headers: Mapping[str, str]) -> TooManyRequests:
        """Starts the pause that a 429 with these headers asks for. The pause applies to all worker processes. If the
        pause cannot be stored, logs a warning, and only this process pauses. A longer pause that this process knows
        stays unchanged. Returns the error to raise for the 429."""
        key, now = _pause_key(self._upstream_name, url, kind), self._clock()
        pause_seconds = self._pause_seconds(headers, now)
        previous_end = self._pauses[key].ends_at if key in self._pauses else 0.0
        ends_at = _later_end(previous_end, now + pause_seconds, now)
        self._pauses[key] = _CachedPause(ends_at, now)
        try:
            await self._records.save_allowance(key, Allowance(now, until=ends_at))
        except (StorageFailed, StorageFull) as error:
            log.warning("cannot store the rate limit of %s for the other workers: %s", self._upstream_name, error)
        return self.error_for_pause(pause_seconds)

    def error_for_429(self, headers: Mapping[str, str]) -> TooManyRequests:
        """Returns the error to raise for a 429 with these headers, but starts no pause. For a 429 that another server
        than the endpoint sent, such as the target of a redirect."""
        return self.error_for_pause(self._pause_seconds(headers, self._clock()))

    def error_for_pause(self, seconds: float) -> TooManyRequests:
        """Returns the error for a request that may be sent again in `seconds` seconds."""
        whole_seconds = max(1, math.ceil(seconds))
        return TooManyRequests(
            f"the upstream registry {self._upstream_name} wants fewer requests; try again in {whole_seconds} s",
            retry_after=whole_seconds,
        )

    def _pause_seconds(self, headers: Mapping[str, str], now: float) -> float:
        """Returns how many seconds to pause after a 429 with these headers."""
        requested_seconds = parse_retry_after(headers, now)
        return min(DEFAULT_PAUSE_SECONDS if requested_seconds is None else requested_seconds, MAX_PAUSE_SECONDS)


async def manifests_limited_until(
    records: UpstreamRecords, upstream_name: str, endpoints: Iterable[str], now: float
) -> float | None:
    """If GET requests for manifests are paused at each of the `endpoints` (URLs), returns when the first of these
    pauses ends. If at least one endpoint has no such pause, or if `endpoints` is empty, returns None. Times are in
    seconds since 1970."""
    pause_ends = []
    for url in endpoints:
        stored = await records.allowance(_pause_key(upstream_name, url, RequestKind.MANIFEST))
        if stored is None or _remaining_pause(stored.until, now) <= 0:
            return None
        pause_ends.append(stored.until)
    return min(pause_ends, default=None)


def _pause_key(upstream_name: str, url: str, kind: RequestKind) -> str:
    """Returns the key under which the pause for a kind of request at an endpoint is stored."""
    return f"{upstream_name} {loggable_origin(url)} {kind}"


def _remaining_pause(ends_at: float, now: float) -> float:
    """Returns the seconds until a pause ends; 0 or less: the pause has ended. Returns 0.0 if the end is more than
    MAX_PAUSE_SECONDS in the future: such an end was stored before the system clock was set back."""
    return ends_at - now if ends_at - now <= MAX_PAUSE_SECONDS else 0.0


def _later_end(first_end: float, second_end: float, now: float) -> float:
    """Returns the later of two ends of pauses. An end that has passed, or that is more than MAX_PAUSE_SECONDS in the
    future, counts as 0.0, which means no pause."""
    return max(ends_at if _remaining_pause(ends_at, now) > 0 else 0.0 for ends_at in (first_end, second_end))


def _leading_count(text: str | None) -> int | None:
    """Returns the number at the start of a `ratelimit-*` header: 100 for `100;w=21600`; None if there is no number."""
    return parse_count((text or "").partition(";")[0].partition(",")[0])


class RemainingRequests:
    """The number of requests that one upstream still allows. `clock` returns seconds since 1970."""

    def __init__(self, upstream_name: str, records: UpstreamRecords, clock: Callable[[], float]) -> None:
        self._upstream_name = upstream_name
        self._records = records
        self._clock = clock
        self._latest: Allowance | None = None
        """The latest known numbers of remaining and of allowed requests; None: no numbers are known."""
        self._read_at = -math.inf
        """When `_latest` was last read from the metadata store, in seconds since 1970."""

    async def refresh(self) -> None:
        """Reads the numbers that a worker process has stored last, unless this process has read them within the last
        STORED_VALUES_CACHED_SECONDS."""
        now = self._clock()
        if not 0 <= now - self._read_at < STORED_VALUES_CACHED_SECONDS:
            self._latest = await self._records.allowance(self._upstream_name)
            self._read_at = now

    def is_near_rate_limit(self) -> bool:
        """Returns whether the number of remaining requests is at most a tenth of the number of requests that the
        upstream allows. Uses the numbers of the last `refresh` or `record`. Returns False if these numbers are unknown
        or older than REMAINING_VALID_SECONDS."""
        latest = self._latest
        if latest is None or latest.remaining is None or not 0 <= self._clock() - latest.at < REMAINING_VALID_SECONDS:
            return False
        return latest.remaining <= (latest.limit or 0) // 10

    async def record(self, headers: Mapping[str, str]) -> None:
        """Stores the numbers in the headers of a response, for all worker processes. Does nothing if the headers
        have no valid `ratelimit-remaining`, or if the same numbers were stored within the last
        REMAINING_REWRITE_SECONDS."""
        remaining = _leading_count(headers.get("ratelimit-remaining"))
        if remaining is None:
            return
        allowance = Allowance(self._clock(), remaining, _leading_count(headers.get("ratelimit-limit")))
        latest = self._latest
        if (
            latest
            and (latest.remaining, latest.limit) == (remaining, allowance.limit)
            and 0 <= allowance.at - latest.at < REMAINING_REWRITE_SECONDS  # negative: the clock was set back
        ):
            return
        self._latest = allowance
        try:
            await self._records.save_allowance(self._upstream_name, allowance)
        except (StorageFailed, StorageFull) as error:
            log.warning(
                "cannot store the remaining requests of %s for the other workers: %s", self._upstream_name, error
            )
