"""Logins as the audit log has them, and when API tokens were last used. Nothing here waits, and nothing fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from registry.auth.api_tokens import use_is_news
from registry.auth.keeping import Kept
from registry.auth.notes import AuditBuffer
from registry.auth.proof import Proof
from storage.access import AccountInvalid, AccountName, ApiToken, AuditEntry
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import RegistryError

log = logging.getLogger(__name__)

LOGIN: Final = "login"
AGAIN: Final = 3600.0
"""Seconds until a login with the same credential from the same address is a line again."""


class Logins:
    """For one process and its event loop. `clock`: seconds since 1970."""

    def __init__(self, accounts: Accounts, notes: AuditBuffer, clock: Callable[[], float]) -> None:
        self._accounts = accounts
        self._notes = notes
        self._clock = clock
        self._noted = Kept[float]()
        self._using: dict[str, asyncio.Task[None]] = {}

    def succeeded(self, proof: Proof, how: str, by: Actor) -> None:
        """`how`: password, token, issuer, openid."""
        name, now = proof.name or "", self._clock()
        key = self._noted.key_of(name, how, proof.token or "", by.address)
        if now - (self._noted.get(key) or -AGAIN) < AGAIN:
            return
        self._noted.put(key, now)
        detail: dict[str, object] = {"how": how}
        if proof.token is not None:
            detail["token"] = proof.token
        self._notes.add(AuditEntry(now, name, LOGIN, name, "ok", by.address, by.request_id, by.user_agent, detail))

    def failed(self, user: str, how: str, reason: str, by: Actor) -> None:
        """`reason` is for who reads the log; the client is not told. `user` is what somebody typed, perhaps a password
        in the wrong field: what could be no account's name is not kept."""
        detail = {"how": how, "reason": reason}
        entry = AuditEntry(self._clock(), "anonymous", LOGIN, _shown(user), "failed", detail=detail)
        self._notes.add(replace(entry, address=by.address, request_id=by.request_id, user_agent=by.user_agent))

    def used(self, token: ApiToken) -> None:
        """Takes note that an API token is in use, at most once an hour."""
        now = self._clock()
        if use_is_news(token, now) and token.id not in self._using:
            self._using[token.id] = asyncio.create_task(self._note_use(token.id, now))

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
