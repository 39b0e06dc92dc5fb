"""What an upstream still lets us ask: `ratelimit-remaining` as Docker Hub sends it.

Kept in Records, so all processes know it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from registry.upstream.answers import as_count
from storage.content import Allowance
from storage.errors import StorageFailed, StorageFull
from storage.interface import Records

log = logging.getLogger(__name__)

LOOKED = 1.0
"""Seconds for which what Records said is not asked for again."""
BELIEVED = 3600.0
"""Seconds after which what remains is not believed any more: a HEAD, which is free, will tell."""


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

    async def look(self) -> None:
        """Learns what the other processes were told."""
        now = self._clock()
        if not 0 <= now - self._looked < LOOKED:
            self._known = await self._records.allowance(self._name)
            self._looked = now

    def exhausted(self) -> bool:
        """A tenth of the limit is left, or less. As of what this process heard last; it looks with each request."""
        known = self._known
        if known is None or known.remaining is None or not 0 <= self._clock() - known.at < BELIEVED:
            return False
        return known.remaining <= (known.limit or 0) // 10

    async def note(self, headers: Mapping[str, str]) -> None:
        """Takes what an answer says of it."""
        remaining = _first_count(headers.get("ratelimit-remaining"))
        if remaining is None:
            return
        told = Allowance(self._clock(), remaining, _first_count(headers.get("ratelimit-limit")))
        known = self._known
        if known and (known.remaining, known.limit) == (remaining, told.limit) and told.at - known.at < BELIEVED / 60:
            return
        self._known = told
        try:
            await self._records.note_allowance(self._name, told)
        except (StorageFailed, StorageFull) as error:
            log.warning("what %s allows could not be kept for the other workers: %s", self._name, error)
