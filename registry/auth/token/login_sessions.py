"""Sessions of people who logged in with a browser, with their password or at the OpenID provider.

The browser keeps the text of a session, `ID.SECRET`, in a cookie. `ID` is the key of the session's row in the store,
which has the account and the method of the login. The store keeps only the hash of `SECRET` (`stored_secrets`). Each
login creates a new id and a new secret. This prevents session fixation: if an attacker puts a text into the browser's
cookie before the login, the login does not make this text a valid session.

A worker reads the row for each request with the session, so all workers refuse requests after the session was ended. A
session is also refused when the account is removed or disabled, when the account's password or admin right changes, or
when the settings of the OpenID provider change (`registry.auth.revocation`).
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Final, Literal

from registry.auth.rights.principal import Identity
from registry.auth.token.stored_secrets import UseWrites, has_hash, hash_secret
from storage.access import AccountName, AccountUnknown, LoginSession
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import RegistryError, Unauthorized
from storage.future_times import CLOCK_MARGIN_SECONDS

log = logging.getLogger(__name__)

SESSION_SECONDS: Final = 8 * 3600.0
"""The lifetime of a session: a working day."""
USE_RECORD_SECONDS: Final = 600.0
"""The store records the time of a session's last request at most once in this many seconds."""
WRITE_PAUSE_SECONDS: Final = 60.0
"""If this worker could not record the time of a request, it records no such times for this many seconds, because the
disk may be full."""
SESSION_ENDED: Final = "the session is not valid, or has ended; log in again"
"""The error text for every session that is refused."""
LoginMethod = Literal["password", "openid"]
"""The method with which a person logged in."""
_ID_BYTES, _SECRET_BYTES = 9, 32
"""The numbers of random bytes of an id and of a secret."""
_SESSION_FORM: Final = re.compile(rf"([0-9a-f]{{{2 * _ID_BYTES}}})\.([0-9a-f]{{{2 * _SECRET_BYTES}}})")
"""The text of a session. The groups are the id and the secret."""


class LoginSessions:
    """Starts, verifies and ends sessions. `clock` returns seconds since 1970; `random(n)` returns n random bytes."""

    def __init__(
        self, accounts: Accounts, clock: Callable[[], float], random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._accounts = accounts
        self._clock = clock
        self._random = random
        self._use_writes = UseWrites()
        self._no_writes_until = float("-inf")  # in seconds of `time.monotonic`

    async def start(self, identity: Identity, method: LoginMethod, by: Actor) -> str:
        """Stores a new session for a person who has logged in, and returns the text of the session, for the cookie.
        `by` describes the browser. Raises Unauthorized if the account has changed since the login, for example because
        of a new password. Raises StorageFull, StorageFailed. If the caller is cancelled, the store may keep a session
        that no browser received, until the session expires."""
        assert identity.name is not None
        now = self._clock()
        session_id, secret = self._random(_ID_BYTES).hex(), self._random(_SECRET_BYTES).hex()
        session = LoginSession(
            id=session_id,
            account=AccountName(identity.name),
            method=method,
            created=now,
            expires=now + SESSION_SECONDS,
            seen=now,
            address=by.address,
            user_agent=by.user_agent,
            version=identity.version,
            stamp=identity.stamp,
            groups=identity.groups,
        )
        await self._accounts.add_login_session(session, hash_secret(secret), by=_as_account(by, identity.name))
        return f"{session_id}.{secret}"

    def verify(self, text: str) -> Identity:
        """Returns the identity (the account) of a session, and starts a task that records the request. Raises
        Unauthorized if there is no such session, or if it was ended or has expired. Does not check other reasons why
        the session may be invalid, such as a new password; `registry.auth.revocation` does."""
        session = self._find(text)
        now = self._clock()
        # A recorded time in the future means that the clock was set back. The time is then recorded again.
        is_recorded = -CLOCK_MARGIN_SECONDS <= now - session.seen < USE_RECORD_SECONDS
        if not is_recorded and time.monotonic() >= self._no_writes_until:
            self._use_writes.start(session.id, partial(self._write_use, session.id, now))
        return Identity(
            session.account,
            version=session.version,
            stamp=session.stamp,
            session=session.id,
            groups=session.groups,
            expires=session.expires,
        )

    async def end(self, text: str, by: Actor) -> None:
        """Ends the session with this text, for a logout. Does nothing if there is no such session. Raises StorageFull,
        StorageFailed."""
        try:
            session = self._find(text)
            await self._accounts.end_login_session(session.id, by=_as_account(by, session.account))
        except (Unauthorized, AccountUnknown):  # AccountUnknown: the session has ended in the meantime
            return

    async def aclose(self) -> None:
        """Waits until the tasks that record the times of requests have ended."""
        await self._use_writes.wait_until_idle()

    def _find(self, text: str) -> LoginSession:
        """Returns the session with this text. Raises Unauthorized if there is none."""
        session_parts = _SESSION_FORM.fullmatch(text)
        try:
            session, secret_hash = self._accounts.login_session(session_parts[1] if session_parts else "")
        except AccountUnknown:
            raise Unauthorized(SESSION_ENDED) from None
        if session_parts is None or not has_hash(session_parts[2], secret_hash):
            raise Unauthorized(SESSION_ENDED)
        return session

    async def _write_use(self, session_id: str, now: float) -> None:
        """Writes to the store that a request with the session came at the time `now`. If this fails, logs a
        warning, and stops such writes for `WRITE_PAUSE_SECONDS`."""
        try:
            await self._accounts.save_session_use(session_id, now)
        except RegistryError as error:
            self._no_writes_until = time.monotonic() + WRITE_PAUSE_SECONDS
            log.warning("could not record the use of a login session: %s", error)


def _as_account(by: Actor, name: str) -> Actor:
    """Returns the actor `by` with the name of the account that logs in or out, for the audit log."""
    return Actor(name, by.address, by.request_id, by.user_agent)
