"""Logins and denials on their way into the audit log, and the last uses of API tokens.

`AuditBuffer` gathers lines for a second and counts equal ones. So a client that fails a thousand times a second costs
one line and one write, and one that uses a new name each time costs a bounded number of lines: nobody can fill the disk
from outside. Gathered lines are lost if the process dies. Changes do not pass through here: their lines are part of the
change's transaction.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, Literal

from registry.auth.rights.principal import Identity
from registry.auth.secret_cache import SecretCache
from registry.auth.token.api_tokens import is_use_due
from registry.single_flight import start_detached
from storage.access import AccountInvalid, AccountName, ApiToken, AuditEntry
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import RegistryError

log = logging.getLogger(__name__)

AUDIT_FLUSH_SECONDS: Final = 1.0
MOST_LINES: Final = 1000
"""Different lines that are gathered at once, and lines that refusals may add in a burst. Of further ones, only their
number is recorded."""
REFUSALS_PER_SECOND: Final = 5.0
"""Lines a second that refusals may add in the long run: about 100 MB a day for each worker under a steady attack."""
OVERFLOW_ACTION: Final = "audit.overflow"
"""The action of the line that tells how many lines were dropped."""
LOGIN_ACTION: Final = "login"
REPEAT_SECONDS: Final = 3600.0
"""After this time, a login with the same credential from the same address is a new line."""


class AuditBuffer:
    """Gathers lines, for one process and its event loop. `interval` is in seconds."""

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
        """Adds a line. Never waits, never fails."""
        key = _entry_key(entry)
        same = self._gathered.get(key)
        if same is not None:
            self._gathered[key] = replace(same, count=same.count + entry.count)
        elif len(self._gathered) < MOST_LINES and (entry.outcome == "ok" or self._may_add()):
            self._gathered[key] = entry
        else:
            self._dropped += entry.count
        if self._timer is None and not self._closed:
            self._timer = start_detached(self._flush_later())

    def record(
        self,
        by: Actor,
        action: str,
        target: str,
        outcome: Literal["ok", "denied", "failed"],
        detail: Mapping[str, object] | None = None,
    ) -> None:
        """Adds a line about what `by` did or tried to do now."""
        self.add(
            AuditEntry(
                self._clock(), by.name, action, target, outcome, by.address, by.request_id, by.user_agent, detail
            )
        )

    async def flush(self) -> None:
        """Writes the gathered lines. If that fails they are lost, and the log says so."""
        entries, self._gathered = list(self._gathered.values()), {}
        dropped, self._dropped = self._dropped, 0
        if dropped:
            entries.append(AuditEntry(self._clock(), "system", OVERFLOW_ACTION, count=dropped))
        if not entries:
            return
        try:
            await self._accounts.add_audit_entries(entries)
        except RegistryError as error:
            log.error("%d lines of the audit log could not be written: %s", len(entries), error)

    async def aclose(self) -> None:
        """Writes the remaining lines. Idempotent."""
        self._closed = True
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            await asyncio.gather(timer, return_exceptions=True)
        await self.flush()

    def _may_add(self) -> bool:
        """Returns whether a refusal may add a line, and counts it."""
        now = self._clock()
        self._left = min(float(MOST_LINES), self._left + max(0.0, now - self._filled) * REFUSALS_PER_SECOND)
        self._filled = now
        if self._left < 1.0:
            return False
        self._left -= 1.0
        return True

    async def _flush_later(self) -> None:
        await asyncio.sleep(self._interval)
        self._timer = None
        await self.flush()


def _entry_key(entry: AuditEntry) -> tuple[object, ...]:
    """Returns all of a line but its time and its request."""
    detail = json.dumps(entry.detail, sort_keys=True, default=str) if entry.detail else ""
    return (entry.actor, entry.action, entry.target, entry.outcome, entry.address, entry.user_agent, detail)


class LoginAudit:
    """Records logins and uses of API tokens, for one process and its event loop. `clock` gives seconds since 1970. Its
    `record_` methods never wait and never fail."""

    def __init__(self, accounts: Accounts, buffer: AuditBuffer, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._buffer = buffer
        self._clock = clock
        self._recorded = SecretCache[float]()
        self._writes: dict[str, asyncio.Task[None]] = {}

    def record_success(self, identity: Identity, how: str, by: Actor) -> None:
        """Records a login. `how` is `password`, `token`, `issuer` or `openid`."""
        name, now = identity.name or "", self._clock()
        key = self._recorded.key_of(name, how, identity.token or "", by.address)
        if now - (self._recorded.get(key) or -REPEAT_SECONDS) < REPEAT_SECONDS:
            return
        self._recorded.put(key, now)
        detail: dict[str, object] = {"how": how}
        if identity.token is not None:
            detail["token"] = identity.token
        self._buffer.record(replace(by, name=name), LOGIN_ACTION, name, "ok", detail)

    def record_failure(self, user: str, how: str, reason: str, by: Actor) -> None:
        """Records a failed login. `reason` is for readers of the log; the client is not told. `user` is what the person
        typed, perhaps a password in the wrong field, so it is recorded only if it can be an account's name."""
        detail = {"how": how, "reason": reason}
        self._buffer.record(replace(by, name="anonymous"), LOGIN_ACTION, _account_name(user), "failed", detail)

    def record_token_use(self, token: ApiToken) -> None:
        """Records that an API token is in use, at most once an hour."""
        now = self._clock()
        if is_use_due(token, now) and token.id not in self._writes:
            self._writes[token.id] = start_detached(self._write_use(token.id, now))

    async def aclose(self) -> None:
        """Waits for writes that are under way."""
        await asyncio.gather(*self._writes.values(), return_exceptions=True)

    async def _write_use(self, token_id: str, now: float) -> None:
        try:
            await self._accounts.save_token_use(token_id, now)
        except RegistryError as error:
            log.warning("could not record the use of an API token: %s", error)
        finally:
            self._writes.pop(token_id, None)


def _account_name(user: str) -> str:
    """Returns `user` if it can be an account's name, else an empty text."""
    try:
        return AccountName(user)
    except AccountInvalid:
        return ""
