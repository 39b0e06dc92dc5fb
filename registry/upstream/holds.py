"""How long an endpoint wants no requests of a kind, as its 429s say. Kept in Records, so all processes know it.

Each kind by itself: Docker Hub limits the manifests it gives, and goes on answering HEADs and sending blobs meanwhile.
"""

from __future__ import annotations

import email.utils
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum

from registry.upstream.addresses import place
from registry.upstream.answers import as_count
from storage.content import Allowance
from storage.errors import StorageFailed, StorageFull, TooManyRequests
from storage.interface import Records

log = logging.getLogger(__name__)

LOOKED = 1.0
"""Seconds for which what Records said is not asked for again."""
LONGEST = 3600.0
"""Seconds an upstream may keep us waiting; it may mean a day, but we ask again after this."""
LONGEST_DATE = 64
"""Characters of a date in `Retry-After`."""
PAUSE = 5.0
"""Seconds without requests after a 429 that names no time."""


class Kind(StrEnum):
    """What a request is for, as far as limits tell requests apart."""

    MANIFEST = "manifest"
    HEAD = "head"
    """Of a manifest."""
    BLOB = "blob"
    LIST = "list"
    LOGIN = "login"
    """An endpoint that is asked how to log in."""


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that `Retry-After` asks for (RFC 9110, 10.2.3: a count or a date); None: it does not."""
    text = headers.get("retry-after", "").strip()
    if (count := as_count(text)) is not None:
        return float(count)
    if len(text) > LONGEST_DATE:
        return None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


class Holds:
    """One upstream's. `clock`: seconds since 1970."""

    def __init__(self, name: str, records: Records, clock: Callable[[], float]) -> None:
        self._name = name
        self._records = records
        self._clock = clock
        self._known: dict[str, tuple[float, float]] = {}  # until when, as of when

    async def heed(self, url: str, kind: Kind) -> None:
        """Raises TooManyRequests while whoever answers at `url` wants no requests of that kind. Nothing is sent for
        that."""
        key, now = _key(self._name, url, kind), self._clock()
        until, looked = self._known.get(key, (0.0, -math.inf))
        if not 0 <= now - looked < LOOKED:
            kept = await self._records.allowance(key)
            until = _later(until, kept.until if kept else 0.0, now)
            self._known[key] = until, now
        if (wait := _wait(until, now)) > 0:
            raise self.refusal(wait)

    async def hold(self, url: str, kind: Kind, headers: Mapping[str, str]) -> TooManyRequests:
        """The error for a 429; until the time it names, `heed` raises it too."""
        key, now = _key(self._name, url, kind), self._clock()
        wait = self._asked(headers, now)
        until = _later(self._known.get(key, (0.0, 0.0))[0], now + wait, now)
        self._known[key] = until, now
        try:
            await self._records.note_allowance(key, Allowance(now, until=until))
        except (StorageFailed, StorageFull) as error:
            log.warning("that %s limits us could not be kept for the other workers: %s", self._name, error)
        return self.refusal(wait)

    def passing(self, headers: Mapping[str, str]) -> TooManyRequests:
        """The error for a 429 of somebody who is not asked first, such as a redirect's target: it holds nothing."""
        return self.refusal(self._asked(headers, self._clock()))

    def _asked(self, headers: Mapping[str, str], now: float) -> float:
        asked = retry_after(headers, now)
        return min(PAUSE if asked is None else asked, LONGEST)

    def refusal(self, wait: float) -> TooManyRequests:
        """The error while nothing may be asked for so many seconds."""
        seconds = max(1, math.ceil(wait))
        return TooManyRequests(
            f"the upstream registry {self._name} wants fewer requests; it may be asked again in {seconds} s",
            retry_after=seconds,
        )


async def held_until(records: Records, name: str, endpoints: Iterable[str], now: float) -> float | None:
    """When manifests may be asked for again, in seconds since 1970; None: they may be now, at one of `endpoints`."""
    ends = []
    for endpoint in endpoints:
        kept = await records.allowance(_key(name, endpoint, Kind.MANIFEST))
        if kept is None or _wait(kept.until, now) <= 0:
            return None
        ends.append(kept.until)
    return min(ends, default=None)


def _key(name: str, url: str, kind: Kind) -> str:
    return f"{name} {place(url)} {kind}"


def _wait(until: float, now: float) -> float:
    """Seconds left. A time further away than any that is asked for is from before the clock was set back."""
    return until - now if until - now <= LONGEST else 0.0


def _later(one: float, other: float, now: float) -> float:
    return max(until if _wait(until, now) > 0 else 0.0 for until in (one, other))
