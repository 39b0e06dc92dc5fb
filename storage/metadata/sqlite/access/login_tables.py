"""The keys that sign the tokens of `/token`, and the throttling of failed logins (GCRA)."""

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
    rows: list[Any] = db.execute(_KEYS, (now,)).fetchall()
    return [SigningKey(*row) for row in rows]


def ensure_key(db: apsw.Connection, by: Actor, now: float, make: Callable[[], SigningKey]) -> SigningKey:
    for key in signing_keys(db, now):
        if key.retired is None:
            return key
    made = make()
    _add(db, made)
    increment_epoch(db)
    record(db, by, now, "key.make", made.id)
    return made


def rotate_key(db: apsw.Connection, by: Actor, now: float, key: SigningKey, keep: float) -> None:
    db.execute("UPDATE signing_key SET retired = ?, until = ? WHERE retired IS NULL", (now, now + keep))
    db.execute("UPDATE signing_key SET until = min(until, ?) WHERE until IS NOT NULL", (now + keep,))
    db.execute("DELETE FROM signing_key WHERE until <= ?", (now,))
    _add(db, key)
    increment_epoch(db)
    record(db, by, now, "key.rotate", key.id, {"keep": keep})


def _add(db: apsw.Connection, key: SigningKey) -> None:
    db.execute("INSERT INTO signing_key (id, secret, created) VALUES (?, ?, ?)", (key.id, key.secret, key.created))


def throttled_until(db: apsw.Connection, now: float, key: str) -> float:
    until: float | None = db.execute("SELECT until FROM login_pace WHERE key = ? AND until > ?", (key, now)).get
    return until or 0.0


def note_failure(db: apsw.Connection, now: float, keys: Mapping[str, float]) -> None:
    """Adds the cost of a failed login to each key, and deletes keys that are not throttled any more."""
    db.execute("DELETE FROM login_pace WHERE until <= ?", (now,))
    db.executemany(
        "INSERT INTO login_pace (key, until) VALUES (?1, ?2 + ?3) "
        "ON CONFLICT (key) DO UPDATE SET until = max(until, ?2) + ?3",
        ((key, now, cost) for key, cost in keys.items()),
    )


def clear_failures(db: apsw.Connection, keys: Sequence[str]) -> None:
    db.executemany("DELETE FROM login_pace WHERE key = ?", ((key,) for key in keys))
