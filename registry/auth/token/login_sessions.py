"""Login sessions: a person logs in with a browser, either with a password or at the OpenID provider.

The browser keeps the text of a session, `ID.SECRET`, in a cookie. `ID` is the key of the session's row in the store.
The row contains the account, the method of the login, and a hash of `SECRET` (`stored_secrets`). Each login creates a
new id and a new secret, to prevent session fixation.

Each request with the session reads the row, so all workers refuse a session that was ended. `registry.auth.revocation`
refuses a session after its account is removed or disabled, after the account's password or admin right changes, and
after the settings of the OpenID provider change.
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
from registry.auth.token.stored_secrets import LastUseWrites, has_hash, hash_secret
from storage.access import AccountName, AccountUnknown, LoginSession
from storage.accounts import Accounts
from storage.content import Actor
from storage.errors import RegistryError, Unauthorized
from storage.future_times import CLOCK_MARGIN_SECONDS

log = logging.getLogger(__name__)

SESSION_SECONDS: Final = 8 * 3600.0
"""The lifetime of a session: a working day."""
USE_RECORD_SECONDS: Final = 600.0
"""The time of a session's last request is written to the store at most once in this many seconds."""
WRITE_PAUSE_SECONDS: Final = 60.0
"""After a failure to write the time of a request, this worker writes no such times for this many seconds, because the
disk may be full."""
SESSION_ENDED: Final = "the session is not valid, or has ended; log in again"
"""The text of all errors about a session that is not valid."""
LoginMethod = Literal["password", "openid"]
"""The method with which a person logged in."""
_ID_BYTES, _SECRET_BYTES = 9, 32
"""The number of random bytes in an id, and the number in a secret."""
_SESSION_FORM: Final = re.compile(rf"([0-9a-f]{{{2 * _ID_BYTES}}})\.([0-9a-f]{{{2 * _SECRET_BYTES}}})")
"""Matches the text of a session. The groups are the id and the secret."""


class LoginSessions:
    """Starts, verifies and ends sessions. `clock` returns seconds since 1970; `random(n)` returns n random bytes."""

    def __init__(
        self, accounts: Accounts, clock: Callable[[], float], random: Callable[[int], bytes] = os.urandom
    ) -> None:
        self._accounts = accounts
        self._clock = clock
        self._random = random
        self._last_use_writes = LastUseWrites()
        self._no_writes_until = float("-inf")  # in seconds of `time.monotonic`

    async def start(self, identity: Identity, method: LoginMethod, by: Actor) -> str:
        """Stores a new session for a person who has logged in. Returns the text of the session, for the cookie. If the
        caller is cancelled, the session may be stored nevertheless. `by`: the IP address, the User-Agent and the id of
        the login request. The name in `by` is not used.

        Raises StorageFull, StorageFailed. Raises Unauthorized if the account, for example its password, has changed
        since the login."""
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
            # The session is refused after one of these two has changed. `version`: the version of the account in the
            # store. `stamp`: a hash of the account's line of the htpasswd file, or of the settings of the OpenID
            # provider.
            version=identity.version,
            stamp=identity.stamp,
            groups=identity.groups,
        )
        await self._accounts.add_login_session(session, hash_secret(secret), by=_as_account(by, identity.name))
        return f"{session_id}.{secret}"

    def verify(self, text: str) -> Identity:
        """Returns the identity (the account) of a session, and starts a task that records the time of the request.
        Raises Unauthorized if there is no such session, or if the session was ended or has expired. Does not notice
        changes of the account, such as a new password: `registry.auth.revocation` checks the identity for them."""
        session = self._find(text)
        now = self._clock()
        # If the recorded time is in the future, the clock was set back, and the time is recorded again.
        is_recently_recorded = -CLOCK_MARGIN_SECONDS <= now - session.seen < USE_RECORD_SECONDS
        if not is_recently_recorded and time.monotonic() >= self._no_writes_until:
            self._last_use_writes.start(session.id, partial(self._write_use, session.id, now))
        return Identity(
            session.account,
            version=session.version,
            stamp=session.stamp,
            session=session.id,
            groups=session.groups,
            expires=session.expires,
        )

    async def end(self, text: str, by: Actor) -> None:
        """Ends the session with this text because the person logs out. Does nothing if there is no such session. Raises
        StorageFull, StorageFailed."""
        try:
            session = self._find(text)
            await self._accounts.end_login_session(session.id, by=_as_account(by, session.account))
        except (Unauthorized, AccountUnknown):  # AccountUnknown: the session has ended in the meantime
            return

    async def aclose(self) -> None:
        """Waits for the tasks that record the times of requests."""
        await self._last_use_writes.wait_until_idle()

    def _find(self, text: str) -> LoginSession:
        """Returns the session with this text. Raises Unauthorized if there is no such session."""
        session_parts = _SESSION_FORM.fullmatch(text)
        try:
            session, secret_hash = self._accounts.login_session(session_parts[1] if session_parts else "")
        except AccountUnknown:
            raise Unauthorized(SESSION_ENDED) from None
        if session_parts is None or not has_hash(session_parts[2], secret_hash):
            raise Unauthorized(SESSION_ENDED)
        return session

    async def _write_use(self, session_id: str, now: float) -> None:
        """Writes `now` to the store as the time of the session's last request. If the write fails, logs a warning and
        stops such writes for `WRITE_PAUSE_SECONDS`."""
        try:
            await self._accounts.save_session_use(session_id, now)
        except RegistryError as error:
            self._no_writes_until = time.monotonic() + WRITE_PAUSE_SECONDS
            log.warning("could not record the use of a login session: %s", error)


def _as_account(by: Actor, name: str) -> Actor:
    """Returns a copy of `by` with the name of the account as the actor. The copy is for the audit log."""
    return Actor(name, by.address, by.request_id, by.user_agent)
