"""Writes logins and denied requests to the audit log. Also stores when each API token was last used.

`AuditBuffer` collects entries of the audit log for a second before it writes them to the store. It combines equal
entries into one entry with a count, and limits the number of different entries, so that clients cannot fill the disk.
If the process dies, the collected entries are lost.

Entries about changes, such as a new account, do not pass through this module: the transaction of the change writes the
entry.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Final, Literal

from registry.auth.rights.principal import Identity
from registry.auth.secret_cache import SecretCache
from registry.auth.token.api_tokens import should_record_use
from registry.auth.token.stored_secrets import LastUseWrites
from registry.single_flight import start_detached
from storage.access import AccountInvalid, AccountName, ApiToken, AuditEntry
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import RegistryError

log = logging.getLogger(__name__)

AUDIT_FLUSH_SECONDS: Final = 1.0
"""How long entries are collected before they are written."""
MAX_COLLECTED_ENTRIES: Final = 1000
"""The largest number of different entries that are collected before they are written. Further entries are discarded,
and only their number is recorded. A token bucket of the same size limits the entries about refusals (failed logins and
denied requests)."""
REFUSALS_PER_SECOND: Final = 5.0
"""The rate at which the token bucket for entries about refusals is refilled, in entries per second. Under a steady
attack, these entries take about 100 MB a day for each worker."""
OVERFLOW_ACTION: Final = "audit.overflow"
"""The action of the entry that states how many entries were discarded."""
LOGIN_ACTION: Final = "login"
"""The action in entries about logins."""
REPEAT_SECONDS: Final = 3600.0
"""After a recorded login, equal logins are not recorded for this number of seconds. Logins are equal if they have the
same account, method, API token and address."""


class AuditBuffer:
    """Collects entries of the audit log and writes them to the store, for one process and its event loop. `interval` is
    the time for which entries are collected, in seconds. `clock` returns seconds since 1970."""

    def __init__(
        self, accounts: Accounts, clock: Callable[[], float], *, interval: float = AUDIT_FLUSH_SECONDS
    ) -> None:
        self._accounts = accounts
        self._clock = clock
        self._interval = interval
        self._collected: dict[tuple[object, ...], AuditEntry] = {}
        """The collected entries, by `_entry_key`."""
        self._discarded = 0
        """The number of entries that were discarded since the last flush."""
        self._allowed_refusals = float(MAX_COLLECTED_ENTRIES)
        """The level of the token bucket at the time `_allowance_updated_at`: the number of entries about refusals that
        may be added."""
        self._allowance_updated_at = clock()
        self._timer: asyncio.Task[None] | None = None
        """The task that waits for the end of the interval and then writes the entries; None if no such task runs."""
        self._write_lock = asyncio.Lock()
        """Held while entries are written, so that `aclose` waits for a running write."""
        self._closed = False

    def add(self, entry: AuditEntry) -> None:
        """Combines the entry with an equal collected entry. If there is none, adds the entry. If a limit does not allow
        that, discards the entry and counts it. Never waits and never raises."""
        key = _entry_key(entry)
        equal_entry = self._collected.get(key)
        if equal_entry is not None:
            self._collected[key] = replace(equal_entry, count=equal_entry.count + entry.count)
        elif len(self._collected) < MAX_COLLECTED_ENTRIES and (entry.outcome == "ok" or self._take_allowance()):
            self._collected[key] = entry
        else:
            self._discarded += entry.count
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
        """Adds an entry with the current time: the actor `by` did or tried the action `action` on `target`.
        `outcome` says whether the action succeeded. Never waits and never raises."""
        self.add(
            AuditEntry(
                self._clock(), by.name, action, target, outcome, by.address, by.request_id, by.user_agent, detail
            )
        )

    async def flush(self) -> None:
        """Waits until no other write is running. Then writes the collected entries to the store. If this fails, logs an
        error and discards the entries."""
        async with self._write_lock:
            await self._write_collected()

    async def _write_collected(self) -> None:
        """Writes the collected entries, and an entry with the number of discarded entries. If this fails, logs an error
        and discards the entries."""
        entries, self._collected = list(self._collected.values()), {}
        discarded, self._discarded = self._discarded, 0
        if discarded:
            entries.append(AuditEntry(self._clock(), "system", OVERFLOW_ACTION, count=discarded))
        if not entries:
            return
        try:
            await self._accounts.add_audit_entries(entries)
        except RegistryError as error:
            log.error("could not write %d entries of the audit log, which are lost: %s", len(entries), error)

    async def aclose(self) -> None:
        """Waits until no other write is running, and then writes the collected entries. May be called more than
        once."""
        self._closed = True
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            await asyncio.gather(timer, return_exceptions=True)
        await self.flush()

    def _take_allowance(self) -> bool:
        """Returns whether one more entry about a refusal may be added. If it may, lowers the level of the token bucket
        by one. The level rises by `REFUSALS_PER_SECOND` in each second, to at most `MAX_COLLECTED_ENTRIES`."""
        now = self._clock()
        added_allowance = max(0.0, now - self._allowance_updated_at) * REFUSALS_PER_SECOND
        self._allowed_refusals = min(float(MAX_COLLECTED_ENTRIES), self._allowed_refusals + added_allowance)
        self._allowance_updated_at = now
        if self._allowed_refusals < 1.0:
            return False
        self._allowed_refusals -= 1.0
        return True

    async def _flush_later(self) -> None:
        """Waits for the interval and then writes the collected entries."""
        await asyncio.sleep(self._interval)
        self._timer = None
        await self.flush()


def _entry_key(entry: AuditEntry) -> tuple[object, ...]:
    """Returns a key that contains all parts of an entry except its time, its request id and its count. Entries with
    equal keys are combined into one."""
    detail = json.dumps(entry.detail, sort_keys=True, default=str) if entry.detail else ""
    return (entry.actor, entry.action, entry.target, entry.outcome, entry.address, entry.user_agent, detail)


OnLogin = Callable[[str, Literal["ok", "failed", "throttled"]], None]
"""A function that counts a login. Its arguments are the method (see `LoginAudit`) and the outcome. `throttled` means
that the login was refused without a check, because too many logins failed before or too many logins are waiting. The
function must return at once and must not raise errors."""


class LoginAudit:
    """Records logins in the audit log, and uses of API tokens in the store, for one process and its event loop. `clock`
    returns seconds since 1970. The `record_` methods never wait and never raise errors. In their arguments, `by`
    describes the client, and `method` is the method of the login: `password`, `token` (an API token), `issuer` (a token
    of a trusted issuer) or `openid` (a login at the OpenID provider)."""

    def __init__(
        self,
        accounts: Accounts,
        buffer: AuditBuffer,
        clock: Callable[[], float],
        on_login: OnLogin = lambda *_: None,
    ) -> None:
        self._accounts = accounts
        self._buffer = buffer
        self._on_login = on_login
        self._clock = clock
        self._recorded_at = SecretCache[float]()
        """When a login was last recorded. The key consists of account, method, id of the API token, and address."""
        self._last_use_writes = LastUseWrites()

    def record_success(self, identity: Identity, method: str, by: Actor) -> None:
        """Records a login that succeeded, unless the same login was recorded in the last `REPEAT_SECONDS`."""
        self._on_login(method, "ok")
        name, now = identity.name or "", self._clock()
        key = self._recorded_at.key_of(name, method, identity.token or "", by.address)
        recorded_at = self._recorded_at.get(key)
        # A `recorded_at` in the future is ignored, because the clock was set back in the meantime.
        if recorded_at is not None and recorded_at <= now < recorded_at + REPEAT_SECONDS:
            return
        self._recorded_at.put(key, now)
        detail: dict[str, object] = {"how": method}
        if identity.token is not None:
            detail["token"] = identity.token
        self._buffer.record(replace(by, name=name), LOGIN_ACTION, name, "ok", detail)

    def record_failure(
        self, user: str, method: str, reason: str, by: Actor, outcome: Literal["failed", "throttled"] = "failed"
    ) -> None:
        """Records a failed login. `reason` is a text for the audit log; the client does not see it. `user` is the text
        that the client sent as its user name. The log has this text only if it follows the rules for account names,
        because any other text could be a password that a person typed into the wrong field."""
        self._on_login(method, outcome)
        detail = {"how": method, "reason": reason}
        self._buffer.record(replace(by, name="anonymous"), LOGIN_ACTION, _account_name_or_empty(user), "failed", detail)

    def record_token_use(self, token: ApiToken) -> None:
        """Starts a task that stores the current time as the last use of an API token. Does nothing if a use was
        recorded in the last hour."""
        now = self._clock()
        if should_record_use(token, now):
            self._last_use_writes.start(token.id, partial(self._write_use, token.id, now))

    async def aclose(self) -> None:
        """Waits until the tasks that `record_token_use` started have ended."""
        await self._last_use_writes.wait_until_idle()

    async def _write_use(self, token_id: str, now: float) -> None:
        """Writes to the store that the token was used at the time `now`. Logs a warning if this fails."""
        try:
            await self._accounts.save_token_use(token_id, now)
        except RegistryError as error:
            log.warning("could not record the use of the API token %s: %s", token_id, error)


def _account_name_or_empty(user: str) -> str:
    """Returns `user` if it is a valid name of an account, or else an empty string."""
    try:
        return AccountName(user)
    except AccountInvalid:
        return ""
