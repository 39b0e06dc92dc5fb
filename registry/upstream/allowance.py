"""What an upstream still lets us ask: `ratelimit-remaining` as Docker Hub sends it, and `Retry-After`.

Kept in Records, so all processes know it.
"""

from __future__ import annotations

import email.utils
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from registry.upstream.answers import as_count
from storage.content import Allowance
from storage.errors import StorageFailed, StorageFull, TooManyRequests
from storage.interface import Records

log = logging.getLogger(__name__)

LOOKED = 1.0
"""Seconds for which what Records said is not asked for again."""
BELIEVED = 3600.0
"""Seconds after which what remains is not believed any more: a HEAD, which is free, will tell."""
LONGEST = 3600.0
"""Seconds an upstream may keep us waiting; it may mean a day, but we ask again after this."""
PAUSE = 5.0
"""Seconds without requests after a 429 that names no time."""


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that `Retry-After` asks for (RFC 9110, 10.2.3: a count or a date); None: it does not."""
    text = headers.get("retry-after", "").strip()
    if (count := as_count(text)) is not None:
        return float(count)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return None


def _first_count(text: str | None) -> int | None:
    """`100` of `100;w=21600`."""
    return as_count((text or "").partition(";")[0].partition(",")[0])


class Allowances:
    """One upstream's."""

    def __init__(self, name: str, records: Records, clock: Callable[[], float]) -> None:
        self._name = name
        self._records = records
        self._clock = clock
        self._known: Allowance | None = None
        self._looked = -math.inf

    async def heed(self) -> None:
        """Raises TooManyRequests while the upstream wants no requests. Nothing is sent for that."""
        now = self._clock()
        if not 0 <= now - self._looked < LOOKED:
            self._known = await self._records.allowance(self._name)
            self._looked = now
        if self._known and (wait := min(self._known.until - now, LONGEST)) > 0:
            raise self._refusal(wait)

    def exhausted(self) -> bool:
        """A tenth of the limit is left, or less. As of what this process heard last; it asks Records with each
        request."""
        known = self._known
        if known is None or known.remaining is None or not 0 <= self._clock() - known.at < BELIEVED:
            return False
        return known.remaining <= (known.limit or 0) // 10

    async def note(self, headers: Mapping[str, str]) -> None:
        """Takes what an answer says of it."""
        remaining = _first_count(headers.get("ratelimit-remaining"))
        if remaining is None:
            return
        limit = _first_count(headers.get("ratelimit-limit"))
        known = self._known
        told = Allowance(self._clock(), remaining, limit, known.until if known else 0.0)
        if known and (known.remaining, known.limit) == (remaining, limit) and told.at - known.at < BELIEVED / 60:
            return
        await self._keep(told)

    async def refused(self, headers: Mapping[str, str]) -> TooManyRequests:
        """The error for a 429; until the time it names, `heed` raises it too."""
        now = self._clock()
        asked = retry_after(headers, now)
        wait = min(PAUSE if asked is None else asked, LONGEST)
        known = self._known or Allowance(now)
        remaining = _first_count(headers.get("ratelimit-remaining"))
        told = replace(known, at=now, until=now + wait)
        if remaining is not None:
            told = replace(told, remaining=remaining, limit=_first_count(headers.get("ratelimit-limit")))
        await self._keep(told)
        return self._refusal(wait)

    def _refusal(self, wait: float) -> TooManyRequests:
        seconds = max(1, math.ceil(wait))
        return TooManyRequests(
            f"the upstream registry {self._name} wants fewer requests; it may be asked again in {seconds} s",
            retry_after=seconds,
        )

    async def _keep(self, allowance: Allowance) -> None:
        self._known = allowance
        try:
            await self._records.note_allowance(self._name, allowance)
        except (StorageFailed, StorageFull) as error:
            log.warning("what %s allows could not be kept for the other workers: %s", self._name, error)
