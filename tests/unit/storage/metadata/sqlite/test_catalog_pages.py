"""Lists of the repositories of a set: what they cost does not follow what lies outside it."""

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
    """A connection to a store with 20,000 repositories, and how many steps SQLite took in it: a row that is looked at
    takes at least three."""

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db
        self.steps = 0
        db.trace_v2(apsw.SQLITE_TRACE_PROFILE, self._count)

    def _count(self, event: dict[str, Any]) -> None:
        self.steps += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    def page(self, names: NameSet, after: str | None, limit: int) -> tuple[list[str], bool, int]:
        """A page's items, whether more follow, and the steps it took."""
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
    """Three small prefixes among many: first pages, last pages and pages between cost what they hold."""
    names = NameSet.of(["team03/**", "team55/**", "team97/**"])
    inside = [name for name in NAMES if name in names]
    for after in (None, "team03/app120", "team03/app199", "team60", "team97/app150", "zzz"):
        following = [name for name in inside if after is None or name > after]
        items, more, steps = store.page(names, after, 100)
        assert (items, more) == (following[:100], len(following) > 100)
        assert steps < 300 + 20 * 100, after


def test_a_page_of_a_set_that_asks_more_looks_inside_its_prefixes(store: Counting) -> None:
    """A pattern with something after its first star is tried on the names with its prefix, and on no others; those of
    a guarded segment, and those below one that the pattern does not go below, are passed over."""
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
    """Where nothing can be passed over, a page ends when it has looked at so much, and says where the next one goes on;
    each gets further, and together they hold what there is."""
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
    """Wherever it starts."""
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
    """Names that leave a pattern late, and many places from which no other letter leads on: to find where the set goes
    on costs about what a look at the name does, and the page pays for it."""
    db = connect(data / "entrepot.db")
    with closing(db), db:
        db.executemany("INSERT INTO repository (name, created, manifests) VALUES (?, 0, 1)", ((n,) for n in names))
        lookups.repositories(db, None, 100, within)  # makes what matches
        with count_instructions() as count:
            assert lookups.repositories(db, None, 100, within).more
        assert count.total < 3_000_000
