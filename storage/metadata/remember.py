"""Answers that are kept until the database changes: pages of lists, whose rows take longer to fetch than to send.

SQLite counts, in the shared memory of its WAL, every commit of any connection in any process; `PRAGMA data_version`
reads that count in about two microseconds. An answer found under the same count is still the answer; under another one
all are forgotten. So no worker ever gives an answer that another one has made stale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import apsw

ENTRIES = 4096
T = TypeVar("T")


class Remembered:
    """Over one connection that only reads. `weigh` bounds what is kept: answers together weigh at most `room`."""

    def __init__(self, db: apsw.Connection, room: int = 16 * 1024 * 1024) -> None:
        self._db = db
        self._room = room
        self._left = room
        self._version: object = None
        self._answers: dict[tuple[object, ...], Any] = {}

    def get(self, look: Callable[..., T], *what: object, weight: Callable[[T], int]) -> T:
        """`look(db, *what)`, or what it gave since the last change. What it raises is not kept. `weight` is about the
        answer's size in bytes."""
        version = self._db.execute("PRAGMA data_version").get
        if version != self._version:
            self._answers.clear()
            self._version, self._left = version, self._room
        key = (look, *what)
        kept = self._answers.get(key)
        if kept is not None:
            return cast("T", kept)
        answer = look(self._db, *what)
        cost = weight(answer)
        if cost <= self._left and len(self._answers) < ENTRIES:
            self._answers[key] = answer
            self._left -= cost
        return answer
