"""Logins and denials on their way into the audit log: gathered for a second, equal ones counted.

So somebody who knocks a thousand times a second costs one line and one write; one who knocks under ever new names costs
a bounded number of lines, so nobody fills the disk from outside. What is gathered is lost when the process dies; what
changes something has its line in the change's own transaction, and does not come here.

Logins as the audit log has them, and when API tokens were last used. Nothing here waits, and nothing fails.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from registry.auth.rights.principal import Identity
from registry.auth.secret_cache import SecretCache
from registry.auth.token.api_tokens import is_use_due
from registry.request import detached_context
from storage.access import AccountInvalid, AccountName, ApiToken, AuditEntry
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import RegistryError

log = logging.getLogger(__name__)

AUDIT_FLUSH_SECONDS: Final = 1.0
MOST_LINES: Final = 1000
"""Different lines that are gathered at once, and that refusals may add in a row; of more it is only noted how many."""
REFUSALS_PER_SECOND: Final = 5.0
"""Lines a second that refusals may add in the long run: some 100 MB a day for each worker, under a steady attack."""
OVERFLOW_ACTION: Final = "audit.overflow"


class AuditBuffer:
    """For one process and its event loop. `interval` is in seconds."""

    def __init__(
        self, accounts: Accounts, clock: Callable[[], float], *, interval: float = AUDIT_FLUSH_SECONDS
    ) -> None:
        self._accounts = accounts
        self._clock = clock
        self._interval = interval
        self._gathered: dict[tuple[object, ...], AuditEntry] = {}
        self._dropped = 0
        self._left = float(MOST_LINES)
        self._filled = clock()
        self._timer: asyncio.Task[None] | None = None
        self._closed = False

    def add(self, entry: AuditEntry) -> None:
        """Takes note; never waits, never fails."""
        key = _entry_key(entry)
        same = self._gathered.get(key)
        if same is not None:
            self._gathered[key] = replace(same, count=same.count + entry.count)
        elif len(self._gathered) < MOST_LINES and (entry.outcome == "ok" or self._take()):
            self._gathered[key] = entry
        else:
            self._dropped += entry.count
        if self._timer is None and not self._closed:
            self._timer = asyncio.create_task(self._later(), context=detached_context())

    async def flush(self) -> None:
        """Writes what has been gathered. When that fails it is lost, and the log says so."""
        entries, self._gathered = list(self._gathered.values()), {}
        dropped, self._dropped = self._dropped, 0
        if dropped:
            entries.append(AuditEntry(self._clock(), "system", OVERFLOW_ACTION, count=dropped))
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
        self._left = min(float(MOST_LINES), self._left + max(0.0, now - self._filled) * REFUSALS_PER_SECOND)
        self._filled = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    async def _later(self) -> None:
        await asyncio.sleep(self._interval)
        self._timer = None
        await self.flush()


def _entry_key(entry: AuditEntry) -> tuple[object, ...]:
    """All but when it was, and in which request."""
    detail = json.dumps(entry.detail, sort_keys=True, default=str) if entry.detail else ""
    return (entry.actor, entry.action, entry.target, entry.outcome, entry.address, entry.user_agent, detail)


LOGIN_ACTION: Final = "login"
REPEAT_SECONDS: Final = 3600.0
"""Seconds until a login with the same credential from the same address is a line again."""


class LoginAudit:
    """For one process and its event loop. `clock`: seconds since 1970."""

    def __init__(self, accounts: Accounts, notes: AuditBuffer, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._notes = notes
        self._clock = clock
        self._noted = SecretCache[float]()
        self._using: dict[str, asyncio.Task[None]] = {}

    def record_success(self, proof: Identity, how: str, by: Actor) -> None:
        """`how`: password, token, issuer, openid."""
        name, now = proof.name or "", self._clock()
        key = self._noted.key_of(name, how, proof.token or "", by.address)
        if now - (self._noted.get(key) or -REPEAT_SECONDS) < REPEAT_SECONDS:
            return
        self._noted.put(key, now)
        detail: dict[str, object] = {"how": how}
        if proof.token is not None:
            detail["token"] = proof.token
        self._notes.add(
            AuditEntry(now, name, LOGIN_ACTION, name, "ok", by.address, by.request_id, by.user_agent, detail)
        )

    def failed(self, user: str, how: str, reason: str, by: Actor) -> None:
        """`reason` is for who reads the log; the client is not told. `user` is what somebody typed, perhaps a password
        in the wrong field: what could be no account's name is not kept."""
        detail = {"how": how, "reason": reason}
        entry = AuditEntry(self._clock(), "anonymous", LOGIN_ACTION, _shown(user), "failed", detail=detail)
        self._notes.add(replace(entry, address=by.address, request_id=by.request_id, user_agent=by.user_agent))

    def used(self, token: ApiToken) -> None:
        """Takes note that an API token is in use, at most once an hour."""
        now = self._clock()
        if is_use_due(token, now) and token.id not in self._using:
            self._using[token.id] = asyncio.create_task(self._note_use(token.id, now), context=detached_context())

    async def aclose(self) -> None:
        """Waits for what is being noted."""
        await asyncio.gather(*self._using.values(), return_exceptions=True)

    async def _note_use(self, token_id: str, now: float) -> None:
        try:
            await self._accounts.note_use(token_id, now)
        except RegistryError as error:
            log.warning("that an API token is in use could not be noted: %s", error)
        finally:
            self._using.pop(token_id, None)


def _shown(user: str) -> str:
    try:
        return AccountName(user)
    except AccountInvalid:
        return ""
