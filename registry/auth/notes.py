"""Logins and denials on their way into the audit log: gathered for a second, equal ones counted.

So somebody who knocks a thousand times a second costs one line and one write; one who knocks under ever new names costs
a bounded number of lines, so nobody fills the disk from outside. What is gathered is lost when the process dies; what
changes something has its line in the change's own transaction, and does not come here.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from storage.access import AuditEntry
from storage.accounts import Accounts
from storage.errors import RegistryError

log = logging.getLogger(__name__)

INTERVAL: Final = 1.0
MOST: Final = 1000
"""Different lines that are gathered at once, and that refusals may add in a row; of more it is only noted how many."""
REFUSALS: Final = 5.0
"""Lines a second that refusals may add in the long run: some 100 MB a day for each worker, under a steady attack."""
OVERFLOW: Final = "audit.overflow"


class AuditBuffer:
    """For one process and its event loop. `interval` is in seconds."""

    def __init__(self, accounts: Accounts, clock: Callable[[], float], *, interval: float = INTERVAL) -> None:
        self._accounts = accounts
        self._clock = clock
        self._interval = interval
        self._gathered: dict[tuple[object, ...], AuditEntry] = {}
        self._dropped = 0
        self._left = float(MOST)
        self._filled = clock()
        self._timer: asyncio.Task[None] | None = None
        self._closed = False

    def add(self, entry: AuditEntry) -> None:
        """Takes note; never waits, never fails."""
        key = _likeness(entry)
        same = self._gathered.get(key)
        if same is not None:
            self._gathered[key] = replace(same, count=same.count + entry.count)
        elif len(self._gathered) < MOST and (entry.outcome == "ok" or self._take()):
            self._gathered[key] = entry
        else:
            self._dropped += entry.count
        if self._timer is None and not self._closed:
            self._timer = asyncio.create_task(self._later())

    async def flush(self) -> None:
        """Writes what has been gathered. When that fails it is lost, and the log says so."""
        entries, self._gathered = list(self._gathered.values()), {}
        dropped, self._dropped = self._dropped, 0
        if dropped:
            entries.append(AuditEntry(self._clock(), "system", OVERFLOW, count=dropped))
        if not entries:
            return
        try:
            await self._accounts.note(entries)
        except RegistryError as error:
            log.error("%d lines of the audit log could not be written: %s", len(entries), error)

    async def aclose(self) -> None:
        """Writes the rest. Idempotent."""
        self._closed = True
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            await asyncio.gather(timer, return_exceptions=True)
        await self.flush()

    def _take(self) -> bool:
        """Whether a refusal may add a line."""
        now = self._clock()
        self._left = min(float(MOST), self._left + max(0.0, now - self._filled) * REFUSALS)
        self._filled = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    async def _later(self) -> None:
        await asyncio.sleep(self._interval)
        self._timer = None
        await self.flush()


def _likeness(entry: AuditEntry) -> tuple[object, ...]:
    """All but when it was, and in which request."""
    detail = json.dumps(entry.detail, sort_keys=True, default=str) if entry.detail else ""
    return (entry.actor, entry.action, entry.target, entry.outcome, entry.address, entry.user_agent, detail)
