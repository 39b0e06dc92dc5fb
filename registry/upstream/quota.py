"""How long an endpoint wants no requests of a kind, as its 429s say. Kept in Records, so all processes know it.

Each kind by itself: Docker Hub limits the manifests it gives, and goes on answering HEADs and sending blobs meanwhile.

What an upstream still lets us ask: `ratelimit-remaining` as Docker Hub sends it.

Kept in Records, so all processes know it.
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

log = logging.getLogger(__name__)

LIMIT_CACHED_SECONDS = 1.0
"""Seconds for which what Records said is not asked for again."""
MAX_RETRY_AFTER_SECONDS = 3600.0
"""Seconds an upstream may keep us waiting; it may mean a day, but we ask again after this."""
MAX_DATE_LENGTH = 64
"""Characters of a date in `Retry-After`."""
DEFAULT_RETRY_AFTER_SECONDS = 5.0
"""Seconds without requests after a 429 that names no time."""


class RequestKind(StrEnum):
    """What a request is for, as far as limits tell requests apart."""

    MANIFEST = "manifest"
    HEAD = "head"
    """Of a manifest."""
    BLOB = "blob"
    LIST = "list"
    LOGIN = "login"
    """An endpoint that is asked how to log in."""


def parse_retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that `Retry-After` asks for (RFC 9110, 10.2.3: a count or a date); None: it does not."""
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
    """One upstream's. `clock`: seconds since 1970."""

    def __init__(self, name: str, records: UpstreamRecords, clock: Callable[[], float]) -> None:
        self._name = name
        self._records = records
        self._clock = clock
        self._known: dict[str, tuple[float, float]] = {}  # until when, as of when

    async def raise_if_limited(self, url: str, kind: RequestKind) -> None:
        """Raises TooManyRequests while whoever answers at `url` wants no requests of that kind. Nothing is sent for
        that."""
        key, now = _key(self._name, url, kind), self._clock()
        until, looked = self._known.get(key, (0.0, -math.inf))
        if not 0 <= now - looked < LIMIT_CACHED_SECONDS:
            kept = await self._records.allowance(key)
            until = _later(until, kept.until if kept else 0.0, now)
            self._known[key] = until, now
        if (wait := _wait(until, now)) > 0:
            raise self.refusal(wait)

    async def hold(self, url: str, kind: RequestKind, headers: Mapping[str, str]) -> TooManyRequests:
        """The error for a 429; until the time it names, `raise_if_limited` raises it too."""
        key, now = _key(self._name, url, kind), self._clock()
        wait = self._asked(headers, now)
        until = _later(self._known.get(key, (0.0, 0.0))[0], now + wait, now)
        self._known[key] = until, now
        try:
            await self._records.note_allowance(key, Allowance(now, until=until))
        except (StorageFailed, StorageFull) as error:
            log.warning("that %s limits us could not be kept for the other workers: %s", self._name, error)
        return self.refusal(wait)

    def unrecorded_error(self, headers: Mapping[str, str]) -> TooManyRequests:
        """The error for a 429 of somebody who is not asked first, such as a redirect's target: it holds nothing."""
        return self.refusal(self._asked(headers, self._clock()))

    def _asked(self, headers: Mapping[str, str], now: float) -> float:
        asked = parse_retry_after(headers, now)
        return min(DEFAULT_RETRY_AFTER_SECONDS if asked is None else asked, MAX_RETRY_AFTER_SECONDS)

    def refusal(self, wait: float) -> TooManyRequests:
        """The error while nothing may be asked for so many seconds."""
        seconds = max(1, math.ceil(wait))
        return TooManyRequests(
            f"the upstream registry {self._name} wants fewer requests; it may be asked again in {seconds} s",
            retry_after=seconds,
        )


async def limited_until(records: UpstreamRecords, name: str, endpoints: Iterable[str], now: float) -> float | None:
    """When manifests may be asked for again, in seconds since 1970; None: they may be now, at one of `endpoints`."""
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
    """Seconds left. A time further away than any that is asked for is from before the clock was set back."""
    return until - now if until - now <= MAX_RETRY_AFTER_SECONDS else 0.0


def _later(one: float, other: float, now: float) -> float:
    return max(until if _wait(until, now) > 0 else 0.0 for until in (one, other))


REMAINING_CACHED_SECONDS = 1.0
"""Seconds for which what Records said is not asked for again."""
REMAINING_VALID_SECONDS = 3600.0
"""Seconds after which what remains is not believed any more: a HEAD, which is free, will tell."""


def _first_count(text: str | None) -> int | None:
    """`100` of `100;w=21600`."""
    return parse_count((text or "").partition(";")[0].partition(",")[0])


class RemainingRequests:
    """One upstream's."""

    def __init__(self, name: str, records: UpstreamRecords, clock: Callable[[], float]) -> None:
        self._name = name
        self._records = records
        self._clock = clock
        self._known: Allowance | None = None
        self._looked = -math.inf

    async def look(self) -> None:
        """Learns what the other processes were told."""
        now = self._clock()
        if not 0 <= now - self._looked < REMAINING_CACHED_SECONDS:
            self._known = await self._records.allowance(self._name)
            self._looked = now

    def exhausted(self) -> bool:
        """A tenth of the limit is left, or less. As of what this process heard last; it looks with each request."""
        known = self._known
        if known is None or known.remaining is None or not 0 <= self._clock() - known.at < REMAINING_VALID_SECONDS:
            return False
        return known.remaining <= (known.limit or 0) // 10

    async def note(self, headers: Mapping[str, str]) -> None:
        """Takes what an answer says of it."""
        remaining = _first_count(headers.get("ratelimit-remaining"))
        if remaining is None:
            return
        told = Allowance(self._clock(), remaining, _first_count(headers.get("ratelimit-limit")))
        known = self._known
        if (
            known
            and (known.remaining, known.limit) == (remaining, told.limit)
            and told.at - known.at < REMAINING_VALID_SECONDS / 60
        ):
            return
        self._known = told
        try:
            await self._records.note_allowance(self._name, told)
        except (StorageFailed, StorageFull) as error:
            log.warning("what %s allows could not be kept for the other workers: %s", self._name, error)
