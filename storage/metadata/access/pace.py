"""Failed attempts to log in, counted by what each has cost (GCRA, as rate limiters count)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import apsw


def pace(db: apsw.Connection, now: float, key: str) -> float:
    until: float | None = db.execute("SELECT until FROM login_pace WHERE key = ? AND until > ?", (key, now)).get
    return until or 0.0


def note_failure(db: apsw.Connection, now: float, keys: Mapping[str, float]) -> None:
    """What has been paid for is forgotten on the way: what is kept is what failures of late have cost."""
    db.execute("DELETE FROM login_pace WHERE until <= ?", (now,))
    db.executemany(
        "INSERT INTO login_pace (key, until) VALUES (?1, ?2 + ?3) "
        "ON CONFLICT (key) DO UPDATE SET until = max(until, ?2) + ?3",
        ((key, now, cost) for key, cost in keys.items()),
    )


def forgive(db: apsw.Connection, keys: Sequence[str]) -> None:
    db.executemany("DELETE FROM login_pace WHERE key = ?", ((key,) for key in keys))
