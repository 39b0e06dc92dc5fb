"""Pages of repositories whose names are in a set: the cost of a page does not depend on the names outside the set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.database import connect
from storage.patterns import NameSet
from tests.fakes.instruction_count import count_instructions

pytestmark = pytest.mark.slow

TEAMS, EACH = 100, 200
NAMES = sorted(f"team{team:02}/app{number:03}" for team in range(TEAMS) for number in range(EACH))


class Counting:
    """A connection to a store with 20,000 repositories. Counts the steps of SQLite: each row that is read takes at
    least three."""

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db
        self.steps = 0
        db.trace_v2(apsw.SQLITE_TRACE_PROFILE, self._count)

    def _count(self, event: dict[str, Any]) -> None:
        self.steps += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    def page(self, names: NameSet, after: str | None, limit: int) -> tuple[list[str], bool, int]:
        """Returns the items of a page, whether more follow, and the number of steps."""
        self.steps = 0
        found = lookups.repositories(self.db, after, limit, names)
        return list(found.items), found.more, self.steps


@pytest.fixture
def store(data: Path) -> Iterator[Counting]:
    db = connect(data / "entrepot.db")
    with db:
        db.executemany("INSERT INTO repository (name, created, manifests) VALUES (?, 0, 1)", ((n,) for n in NAMES))
    yield Counting(db)
    db.close()


def test_a_page_looks_at_what_is_in_the_set(store: Counting) -> None:
    """With three small prefixes among many names, the first, the last and other pages cost as much as the names that
    they have."""
    names = NameSet.of(["team03/**", "team55/**", "team97/**"])
    inside = [name for name in NAMES if name in names]
    for after in (None, "team03/app120", "team03/app199", "team60", "team97/app150", "zzz"):
        following = [name for name in inside if after is None or name > after]
        items, more, steps = store.page(names, after, 100)
        assert (items, more) == (following[:100], len(following) > 100)
        assert steps < 300 + 20 * 100, after


def test_a_page_of_a_set_that_asks_more_looks_inside_its_prefixes(store: Counting) -> None:
    """A pattern with text after its first star is tried only on names with its prefix. Names of a guarded segment, and
    names below one that the pattern does not match, are skipped."""
    items, more, steps = store.page(NameSet.of(["team4*/app007", "team77/*1"]), None, 100)
    assert (items, more) == ([name for name in NAMES if name in NameSet.of(["team4*/app007", "team77/*1"])], False)
    assert steps < 100 + 10 * 11 * EACH
    items, more, steps = store.page(NameSet.of(["*", "team0"]), None, 100)
    assert (items, more) == ([], False)
    assert steps < TEAMS * 120
    guarded = [f"team{number:02}" for number in range(99)]
    items, more, steps = store.page(NameSet.of(["**", "team50/app000"], guarded), None, 10)
    assert (items, more) == (["team50/app000", *(name for name in NAMES if name.startswith("team99/"))][:10], True)
    assert steps < 2 * len(guarded) * 25


def test_a_page_has_a_price(store: Counting) -> None:
    """If no names can be skipped, a page ends after a bounded cost, with the position at which the next page begins.
    All pages together have every name."""
    names = NameSet.of(["**"], limits=[f"*/*{'*a*p' * 40}*{number}" for number in range(50)] + ["**/app07*"])
    found: list[str] = []
    places: list[str] = []
    after: str | None = None
    while True:
        page = lookups.repositories(store.db, after, 10_000, names)
        found += page.items
        if not page.more:
            break
        after = page.next_after or page.items[-1]
        assert not places or after > places[-1]
        places.append(after)
    assert found == [name for name in NAMES if "/app07" in name]
    assert len(places) > 3


def test_a_page_of_all_looks_at_no_more(store: Counting) -> None:
    """A page of all names costs no more, wherever it begins."""
    for after in (None, "team50", "team99/app198"):
        items, _, steps = store.page(NameSet.of(["**"]), after, 50)
        assert items == [name for name in NAMES if after is None or name > after][:50]
        assert steps < 100 + 10 * 50


@pytest.mark.parametrize(
    ("names", "within"),
    [
        ([f"x{n:04}/{'a' * 230}" for n in range(3000)], NameSet.of([f"*/{'a' * 150}-{n:05}" for n in range(250)])),
        (
            [f"x{n:04}/a{'-' * 229}" for n in range(3000)],
            NameSet.of(["**"], (), [f"*/a{'-' * n}a" for n in range(219, 229)]),
        ),
    ],
)
def test_what_nearly_matches_costs_no_more(names: list[str], within: NameSet, data: Path) -> None:
    """For names that differ from a pattern only near their end, and for sets with many branches, the search for the
    next name costs about as much as reading a name, and counts towards the cost of the page."""
    db = connect(data / "entrepot.db")
    with closing(db), db:
        db.executemany("INSERT INTO repository (name, created, manifests) VALUES (?, 0, 1)", ((n,) for n in names))
        lookups.repositories(db, None, 100, within)  # makes what matches
        with count_instructions() as count:
            assert lookups.repositories(db, None, 100, within).more
        assert count.total < 3_000_000
