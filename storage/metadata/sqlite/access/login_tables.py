"""The keys that sign the tokens of the endpoint `/token`, and the throttling of failed logins.

Failed logins are counted under throttling keys, which name an account, a client's network, or both. Each failure makes
the time until which a key is throttled later by some seconds (GCRA, the generic cell rate algorithm).

All functions take a connection; the changes run inside a transaction that the caller commits. `by` is the actor whom
the audit log names, `now` the time in seconds since 1970. A change of signing keys increments the *epoch*, a number in
the database: what a process has cached about keys and rights is valid for one epoch only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import apsw

from storage.access import SigningKey
from storage.content import Actor
from storage.metadata.sqlite.access.account_table import increment_epoch
from storage.metadata.sqlite.access.audit_table import record

_KEYS = """
SELECT id, secret, created, retired, until FROM signing_key
 WHERE until IS NULL OR until > ? ORDER BY retired IS NOT NULL, retired DESC, id"""


def signing_keys(db: apsw.Connection, now: float) -> list[SigningKey]:
    """Returns the valid keys: first the one that signs, then those whose tokens are still accepted, newest first."""
    rows: list[Any] = db.execute(_KEYS, (now,)).fetchall()
    return [SigningKey(*row) for row in rows]


def ensure_key(db: apsw.Connection, by: Actor, now: float, make_key: Callable[[], SigningKey]) -> SigningKey:
    """Returns the key that signs. If there is none, makes one with `make_key` and adds it."""
    for key in signing_keys(db, now):
        if key.retired is None:
            return key
    made = make_key()
    _add_key(db, made)
    increment_epoch(db)
    record(db, by, now, "key.make", made.id)
    return made


def rotate_key(db: apsw.Connection, by: Actor, now: float, key: SigningKey, keep: float) -> None:
    """Makes `key` the one that signs. Tokens signed by earlier keys are accepted for at most `keep` more seconds."""
    db.execute("UPDATE signing_key SET retired = ?, until = ? WHERE retired IS NULL", (now, now + keep))
    db.execute("UPDATE signing_key SET until = min(until, ?) WHERE until IS NOT NULL", (now + keep,))
    db.execute("DELETE FROM signing_key WHERE until <= ?", (now,))
    _add_key(db, key)
    increment_epoch(db)
    record(db, by, now, "key.rotate", key.id, {"keep": keep})


def _add_key(db: apsw.Connection, key: SigningKey) -> None:
    db.execute("INSERT INTO signing_key (id, secret, created) VALUES (?, ?, ?)", (key.id, key.secret, key.created))


def throttled_until(db: apsw.Connection, now: float, key: str) -> float:
    """Returns until when the key is throttled (seconds since 1970); 0.0 if it is not throttled."""
    until: float | None = db.execute("SELECT until FROM login_pace WHERE key = ? AND until > ?", (key, now)).get
    return until or 0.0


def note_failure(db: apsw.Connection, now: float, keys: Mapping[str, float]) -> None:
    """Throttles each key longer, by the number of seconds that `keys` has for it. Deletes keys that are not throttled
    any more."""
    db.execute("DELETE FROM login_pace WHERE until <= ?", (now,))
    db.executemany(
        "INSERT INTO login_pace (key, until) VALUES (?1, ?2 + ?3) "
        "ON CONFLICT (key) DO UPDATE SET until = max(until, ?2) + ?3",
        ((key, now, seconds) for key, seconds in keys.items()),
    )


def clear_failures(db: apsw.Connection, keys: Sequence[str]) -> None:
    """Ends the throttling of the keys."""
    db.executemany("DELETE FROM login_pace WHERE key = ?", ((key,) for key in keys))
