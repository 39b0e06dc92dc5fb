"""Answers that are kept until the database changes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from storage.metadata.connection import connect, create
from storage.metadata.remember import Remembered


@pytest.fixture
def file(tmp_path: Path) -> Path:
    db = create(tmp_path / "some.db")
    db.execute("CREATE TABLE word (text TEXT); INSERT INTO word VALUES ('first')")
    db.close()
    return tmp_path / "some.db"


@pytest.fixture
def writing(file: Path) -> Iterator[apsw.Connection]:
    db = connect(file)
    yield db
    db.close()


class Looking:
    """Looks words up, and counts how often it was asked to."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, db: apsw.Connection, prefix: str) -> list[str]:
        self.times += 1
        rows = db.execute("SELECT text FROM word WHERE text LIKE ? || '%' ORDER BY text", (prefix,)).fetchall()
        return [str(text) for (text,) in rows]


def _size(_: object) -> int:
    return 100


def test_the_same_question_is_looked_up_once(file: Path, writing: apsw.Connection) -> None:
    """As long as nothing changes, the database is asked once; another question is another answer."""
    look = Looking()
    remembered = Remembered(connect(file, read_only=True))
    assert remembered.get(look, "f", weight=_size) == remembered.get(look, "f", weight=_size) == ["first"]
    assert look.times == 1
    assert remembered.get(look, "x", weight=_size) == []
    assert look.times == 2


def test_a_commit_of_another_connection_is_seen_at_once(file: Path, writing: apsw.Connection) -> None:
    """The first answer after a commit is the new one; before the commit it is the old one."""
    look = Looking()
    remembered = Remembered(connect(file, read_only=True))
    assert remembered.get(look, "f", weight=_size) == ["first"]
    for number in range(20):
        writing.execute("BEGIN IMMEDIATE")
        writing.execute("INSERT INTO word VALUES (?)", (f"further {number:02}",))
        assert len(remembered.get(look, "f", weight=_size)) == 1 + number
        writing.execute("COMMIT")
        assert len(remembered.get(look, "f", weight=_size)) == 2 + number


def test_a_commit_is_seen_after_a_checkpoint_too(file: Path, writing: apsw.Connection) -> None:
    """The count that answers are kept under goes on when the WAL starts anew."""
    look = Looking()
    remembered = Remembered(connect(file, read_only=True))
    for number in range(5):
        assert len(remembered.get(look, "", weight=_size)) == 1 + number
        writing.execute("INSERT INTO word VALUES ('more')")
        writing.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    assert len(remembered.get(look, "", weight=_size)) == 6


def test_what_is_kept_has_a_bound(file: Path, writing: apsw.Connection) -> None:
    """Answers that no longer fit are right all the same; they are looked up again."""
    look = Looking()
    remembered = Remembered(connect(file, read_only=True), room=250)
    for _ in range(2):
        for prefix in ("f", "fi", "fir"):
            assert remembered.get(look, prefix, weight=_size) == ["first"]
    assert look.times == 4


def test_a_failure_is_not_kept(file: Path, writing: apsw.Connection) -> None:
    """What raised once is asked again."""
    remembered = Remembered(connect(file, read_only=True))
    times = []

    def fail(_: apsw.Connection) -> None:
        times.append(1)
        raise LookupError

    for _ in range(2):
        with pytest.raises(LookupError):
            remembered.get(fail, weight=_size)
    assert len(times) == 2
