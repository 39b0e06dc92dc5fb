"""The keys that sign the tokens of `/token`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apsw

from storage.access import SigningKey
from storage.content import Actor
from storage.metadata.access.audit import record
from storage.metadata.access.epoch import raise_epoch

_KEYS = """
SELECT id, secret, created, retired, until FROM signing_key
 WHERE until IS NULL OR until > ? ORDER BY retired IS NOT NULL, retired DESC, id"""


def keys(db: apsw.Connection, now: float) -> list[SigningKey]:
    rows: list[Any] = db.execute(_KEYS, (now,)).fetchall()
    return [SigningKey(*row) for row in rows]


def ensure(db: apsw.Connection, by: Actor, now: float, make: Callable[[], SigningKey]) -> SigningKey:
    for key in keys(db, now):
        if key.retired is None:
            return key
    made = make()
    _add(db, made)
    raise_epoch(db)
    record(db, by, now, "key.make", made.id)
    return made


def rotate(db: apsw.Connection, by: Actor, now: float, key: SigningKey, keep: float) -> None:
    db.execute("UPDATE signing_key SET retired = ?, until = ? WHERE retired IS NULL", (now, now + keep))
    db.execute("UPDATE signing_key SET until = min(until, ?) WHERE until IS NOT NULL", (now + keep,))
    db.execute("DELETE FROM signing_key WHERE until <= ?", (now,))
    _add(db, key)
    raise_epoch(db)
    record(db, by, now, "key.rotate", key.id, {"keep": keep})


def _add(db: apsw.Connection, key: SigningKey) -> None:
    db.execute("INSERT INTO signing_key (id, secret, created) VALUES (?, ?, ?)", (key.id, key.secret, key.created))
