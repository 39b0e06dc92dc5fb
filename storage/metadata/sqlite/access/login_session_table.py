"""The table of login sessions. A session begins when a person logs in with a browser.

AccountUnknown means that the session does not exist or has expired. All functions take a connection. The caller runs
the functions that change something inside a transaction, and commits the transaction. `by` is the actor (an account or
a command) that the audit log names, `now` the time in seconds since 1970.

Each request with a session reads the row of the session, so a change of the session takes effect at once. For this
reason, no function here increments the *epoch*, the number whose changes invalidate the rights that processes cache.
"""

from __future__ import annotations

import json
from typing import Any, Final

import apsw

from storage.access import AccountName, AccountUnknown, LoginSession
from storage.content import Actor
from storage.future_times import CLOCK_MARGIN_SECONDS
from storage.metadata.sqlite.access.account_table import check_version, name_from_database
from storage.metadata.sqlite.access.audit_table import record

MAX_SESSIONS_PER_ACCOUNT: Final = 20
"""Largest number of sessions of an account. A further login ends the least recently used session. The limit prevents a
client that logs in again and again from filling the disk."""
_SESSION = (
    "SELECT id, account, method, created, expires, seen, address, user_agent, version, stamp, groups, secret "
    "FROM login_session"
)
"""Reads the fields of `LoginSession`, and the hash of the session's secret (column `secret`). `version` is the version
of the account at the login. `stamp` is a hash of the account's line in the htpasswd file, or of the settings of the
OpenID provider. A session becomes invalid when the line or the settings change."""
_SESSION_BY_ID = _SESSION + " WHERE id = ? AND expires > ?"
_SESSIONS_OF_ACCOUNT = _SESSION + " WHERE account = ? AND expires > ? ORDER BY created DESC, id"
_DELETE_EXCESS = """
DELETE FROM login_session WHERE id IN (
    SELECT id FROM login_session WHERE account = ?1 ORDER BY iif(seen <= ?2, seen, 0) DESC, created DESC, id
     LIMIT -1 OFFSET ?3)"""
"""Deletes the sessions of the account ?1, except the ?3 most recently used sessions (LIMIT -1: no limit). `seen` is the
time of a session's last use. A time after ?2 was stored while the clock was ahead. Such a time counts as 0. Otherwise
the sessions with such times would stay, and new sessions with right times would be deleted."""


def _session_from_row(row: tuple[Any, ...]) -> LoginSession:
    """Converts a row of the query `_SESSION` to a session."""
    session_id, account, method, created, expires, seen, address, user_agent, version, stamp, groups, _ = row
    return LoginSession(
        id=session_id,
        account=name_from_database(account),
        method=method,
        created=created,
        expires=expires,
        seen=seen,
        address=address,
        user_agent=user_agent,
        version=version,
        stamp=stamp,
        groups=tuple(json.loads(groups)),
    )


def find_session(db: apsw.Connection, now: float, session_id: str) -> tuple[LoginSession, bytes]:
    """Returns a session and the hash of its secret. Raises AccountUnknown."""
    row = db.execute(_SESSION_BY_ID, (session_id, now)).get
    if row is None:
        raise AccountUnknown("there is no such session, or it has ended")
    return _session_from_row(row), row[-1]


def sessions_of_account(db: apsw.Connection, now: float, account: AccountName) -> list[LoginSession]:
    """Returns the sessions of an account that have not expired, the newest first."""
    rows: list[Any] = db.execute(_SESSIONS_OF_ACCOUNT, (account, now)).fetchall()
    return [_session_from_row(row) for row in rows]


def add_session(db: apsw.Connection, by: Actor, now: float, new_session: LoginSession, secret_hash: bytes) -> None:
    """Adds a session, and deletes expired sessions. If the account then has more than `MAX_SESSIONS_PER_ACCOUNT`
    sessions, deletes its least recently used sessions. Raises Unauthorized if the account no longer has the version
    `new_session.version`, for example after a change of the password. If `new_session.version` is None, accepts every
    version."""
    check_version(db, new_session.account, new_session.version)
    _delete_expired(db, now)
    db.execute(
        "INSERT INTO login_session (id, account, method, secret, created, expires, seen, address, user_agent, version, "
        "stamp, groups) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            *(new_session.id, new_session.account, new_session.method, secret_hash),
            *(new_session.created, new_session.expires, new_session.seen, new_session.address, new_session.user_agent),
            *(new_session.version, new_session.stamp, json.dumps(new_session.groups)),
        ),
    )
    db.execute(_DELETE_EXCESS, (new_session.account, now + CLOCK_MARGIN_SECONDS, MAX_SESSIONS_PER_ACCOUNT))
    record(db, by, now, "session.start", new_session.account, {"session": new_session.id, "how": new_session.method})


def end_session(db: apsw.Connection, by: Actor, now: float, session_id: str) -> None:
    """Deletes a session, and all expired sessions. Raises AccountUnknown."""
    ended_session, _ = find_session(db, now, session_id)
    db.execute("DELETE FROM login_session WHERE id = ?", (session_id,))
    _delete_expired(db, now)
    record(db, by, now, "session.end", ended_session.account, {"session": session_id})


def end_sessions_of_account(
    db: apsw.Connection, by: Actor, now: float, account: AccountName, except_id: str | None
) -> int:
    """Deletes the sessions of an account, except the session with the id `except_id`; None: deletes all sessions of the
    account. Returns how many sessions were deleted that had not expired."""
    _delete_expired(db, now)
    db.execute("DELETE FROM login_session WHERE account = ? AND id IS NOT ?", (account, except_id))
    ended_count = db.changes()
    if ended_count:
        record(db, by, now, "session.end", account, {"sessions": ended_count})
    return ended_count


def save_session_use(db: apsw.Connection, session_id: str, used_at: float) -> None:
    """Stores `used_at`, the time of a request with the session (seconds since 1970). Keeps a stored time that is later
    by up to `CLOCK_MARGIN_SECONDS`. Replaces a stored time that is even later: it was stored while the clock was
    ahead."""
    db.execute(
        "UPDATE login_session SET seen = ?2 WHERE id = ?1 AND (seen < ?2 OR seen > ?3)",
        (session_id, used_at, used_at + CLOCK_MARGIN_SECONDS),
    )


def _delete_expired(db: apsw.Connection, now: float) -> None:
    db.execute("DELETE FROM login_session WHERE expires <= ?", (now,))
