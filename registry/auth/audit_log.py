"""Records logins and denials in the audit log, and the time of the last use of each API token.

`AuditBuffer` collects lines for a second before it writes them. It replaces equal lines by one line with a count, and
bounds the number of different lines, so that clients cannot fill the disk. If the process dies, the collected lines are
lost.

The audit log also has lines about changes, such as a new account. Those do not pass through this module, because each
is written in the transaction of its change.
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
"""How long lines are collected before they are written."""
MAX_LINES: Final = 1000
"""The most different lines that are collected at once, and the most lines that refusals may add in a burst. The lines
above this number are dropped, and only their number is recorded."""
REFUSALS_PER_SECOND: Final = 5.0
"""The most lines per second that refusals may add in the long run. Under a steady attack these are about 100 MB a day
for each worker."""
OVERFLOW_ACTION: Final = "audit.overflow"
"""The action of the line that says how many lines were dropped."""
LOGIN_ACTION: Final = "login"
REPEAT_SECONDS: Final = 3600.0
"""A repeated login with the same credential from the same address is recorded again only after this time."""


class AuditBuffer:
    """Collects lines of the audit log, for one process and its event loop. `interval` is the time in seconds until they
    are written. `clock` returns seconds since 1970."""

    def __init__(
        self, accounts: Accounts, clock: Callable[[], float], *, interval: float = AUDIT_FLUSH_SECONDS
    ) -> None:
        self._accounts = accounts
        self._clock = clock
        self._interval = interval
        self._collected: dict[tuple[object, ...], AuditEntry] = {}
        self._dropped = 0
        self._allowed_refusals = float(MAX_LINES)
        self._allowance_updated_at = clock()
        self._timer: asyncio.Task[None] | None = None
        self._closed = False

    def add(self, entry: AuditEntry) -> None:
        """Adds a line, or drops and counts it if there are too many. Never waits and never raises."""
        key = _entry_key(entry)
        same = self._collected.get(key)
        if same is not None:
            self._collected[key] = replace(same, count=same.count + entry.count)
        elif len(self._collected) < MAX_LINES and (entry.outcome == "ok" or self._take_refusal_allowance()):
            self._collected[key] = entry
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
        """Adds a line that says that the actor `by` now did `action` on `target`, or tried to. Never waits and never
        raises."""
        self.add(
            AuditEntry(
                self._clock(), by.name, action, target, outcome, by.address, by.request_id, by.user_agent, detail
            )
        )

    async def flush(self) -> None:
        """Writes the collected lines to the store. If this fails, logs an error, and the lines are lost."""
        entries, self._collected = list(self._collected.values()), {}
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
        """Writes the remaining lines. May be called more than once."""
        self._closed = True
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            await asyncio.gather(timer, return_exceptions=True)
        await self.flush()

    def _take_refusal_allowance(self) -> bool:
        """Returns whether a refusal may add a line now, and subtracts the line from the allowance."""
        now = self._clock()
        gained = max(0.0, now - self._allowance_updated_at) * REFUSALS_PER_SECOND
        self._allowed_refusals = min(float(MAX_LINES), self._allowed_refusals + gained)
        self._allowance_updated_at = now
        if self._allowed_refusals < 1.0:
            return False
        self._allowed_refusals -= 1.0
        return True

    async def _flush_later(self) -> None:
        await asyncio.sleep(self._interval)
        self._timer = None
        await self.flush()


def _entry_key(entry: AuditEntry) -> tuple[object, ...]:
    """Returns all parts of a line except its time and its request id. Lines with equal keys are combined."""
    detail = json.dumps(entry.detail, sort_keys=True, default=str) if entry.detail else ""
    return (entry.actor, entry.action, entry.target, entry.outcome, entry.address, entry.user_agent, detail)


class LoginAudit:
    """Records logins and uses of API tokens, for one process and its event loop. `clock` returns seconds since 1970.
    The `record_` methods never wait and never raise."""

    def __init__(self, accounts: Accounts, buffer: AuditBuffer, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._buffer = buffer
        self._clock = clock
        self._recorded_at = SecretCache[float]()
        """When each login was last recorded."""
        self._use_writes: dict[str, asyncio.Task[None]] = {}
        """The running writes of token uses, by the token's id."""

    def record_success(self, identity: Identity, method: str, by: Actor) -> None:
        """Records a login. `method` is `password`, `token`, `issuer` or `openid`."""
        name, now = identity.name or "", self._clock()
        key = self._recorded_at.key_of(name, method, identity.token or "", by.address)
        if now - (self._recorded_at.get(key) or -REPEAT_SECONDS) < REPEAT_SECONDS:
            return
        self._recorded_at.put(key, now)
        detail: dict[str, object] = {"how": method}
        if identity.token is not None:
            detail["token"] = identity.token
        self._buffer.record(replace(by, name=name), LOGIN_ACTION, name, "ok", detail)

    def record_failure(self, user: str, method: str, reason: str, by: Actor) -> None:
        """Records a failed login. `reason` is not sent to the client. `user` is the text that the client sent as the
        name. It is recorded only if it is a valid name, because people type passwords into the wrong field."""
        detail = {"how": method, "reason": reason}
        self._buffer.record(replace(by, name="anonymous"), LOGIN_ACTION, _account_name(user), "failed", detail)

    def record_token_use(self, token: ApiToken) -> None:
        """Records in the store that an API token was used now. Does so at most once an hour for each token."""
        now = self._clock()
        if is_use_due(token, now) and token.id not in self._use_writes:
            self._use_writes[token.id] = start_detached(self._write_use(token.id, now))

    async def aclose(self) -> None:
        """Waits for the writes that are running."""
        await asyncio.gather(*self._use_writes.values(), return_exceptions=True)

    async def _write_use(self, token_id: str, now: float) -> None:
        try:
            await self._accounts.save_token_use(token_id, now)
        except RegistryError as error:
            log.warning("could not record the use of the API token %s: %s", token_id, error)
        finally:
            self._use_writes.pop(token_id, None)


def _account_name(user: str) -> str:
    """Returns `user` if it is a valid name of an account, or else an empty string."""
    try:
        return AccountName(user)
    except AccountInvalid:
        return ""
