"""Pages of the catalog for a user who may see only some repositories. The names of these repositories are a set. The
cost of a page depends on the names in the set, not on the other names."""

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

TEAMS, REPOSITORIES_PER_TEAM = 100, 200
NAMES = sorted(f"team{team:02}/app{number:03}" for team in range(TEAMS) for number in range(REPOSITORIES_PER_TEAM))


class CountingConnection:
    """A connection to a store with 20,000 repositories. It counts the steps of SQLite's virtual machine. Each row that
    is read takes at least three steps."""

    def __init__(self, db: apsw.Connection) -> None:
        self.db = db
        self.steps = 0
        db.trace_v2(apsw.SQLITE_TRACE_PROFILE, self._count)

    def _count(self, event: dict[str, Any]) -> None:
        self.steps += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    def page(self, names: NameSet, after: str | None, limit: int) -> tuple[list[str], bool, int]:
        """Returns the items of a page, whether more follow, and the number of steps."""
        self.steps = 0
        page = lookups.repository_page(self.db, after, limit, names)
        return list(page.items), page.more, self.steps


@pytest.fixture
def store(data: Path) -> Iterator[CountingConnection]:
    db = connect(data / "entrepot.db")
    with db:
        db.executemany("INSERT INTO repository (name, created, manifests) VALUES (?, 0, 1)", ((n,) for n in NAMES))
    yield CountingConnection(db)
    db.close()


def test_a_page_reads_only_names_in_the_set(store: CountingConnection) -> None:
    """The set has three prefixes, and few of all names have one of them. The cost of each page depends on the number of
    names on the page."""
    names = NameSet.of(["team03/**", "team55/**", "team97/**"])
    names_in_set = [name for name in NAMES if name in names]
    for after in (None, "team03/app120", "team03/app199", "team60", "team97/app150", "zzz"):
        following = [name for name in names_in_set if after is None or name > after]
        items, more, steps = store.page(names, after, 100)
        assert (items, more) == (following[:100], len(following) > 100)
        assert steps < 300 + 20 * 100, after


def test_a_page_skips_names_that_cannot_match(store: CountingConnection) -> None:
    """A pattern with text after its first star is compared only with names that have its prefix. Names whose first
    segment does not match the pattern are skipped. So are names below a guarded segment, which only a pattern that
    begins with this segment matches."""
    items, more, steps = store.page(NameSet.of(["team4*/app007", "team77/*1"]), None, 100)
    assert (items, more) == ([name for name in NAMES if name in NameSet.of(["team4*/app007", "team77/*1"])], False)
    assert steps < 100 + 10 * 11 * REPOSITORIES_PER_TEAM
    items, more, steps = store.page(NameSet.of(["*", "team0"]), None, 100)
    assert (items, more) == ([], False)
    assert steps < TEAMS * 120
    guarded = [f"team{number:02}" for number in range(99)]
    items, more, steps = store.page(NameSet.of(["**", "team50/app000"], guarded), None, 10)
    assert (items, more) == (["team50/app000", *(name for name in NAMES if name.startswith("team99/"))][:10], True)
    assert steps < 2 * len(guarded) * 25


def test_the_cost_of_a_page_is_limited(store: CountingConnection) -> None:
    """If no names can be skipped, a page ends when its cost reaches a limit. The page then has the position at which
    the next page begins. All pages together have every name of the set."""
    names = NameSet.of(["**"], limits=[f"*/*{'*a*p' * 40}*{number}" for number in range(50)] + ["**/app07*"])
    listed_names: list[str] = []
    page_starts: list[str] = []
    after: str | None = None
    while True:
        page = lookups.repository_page(store.db, after, 10_000, names)
        listed_names += page.items
        if not page.more:
            break
        after = page.next_after or page.items[-1]
        assert not page_starts or after > page_starts[-1]
        page_starts.append(after)
    assert listed_names == [name for name in NAMES if "/app07" in name]
    assert len(page_starts) > 3


def test_a_page_of_all_names_costs_the_same_everywhere(store: CountingConnection) -> None:
    """If the set has all names, each page costs the same, wherever it begins."""
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
def test_names_that_nearly_match_cost_little(names: list[str], within: NameSet, data: Path) -> None:
    """Some names differ from a pattern only near their end, and some sets have many patterns. In both cases, the search
    for the next name of the set costs about as much as reading a name, and counts towards the cost of the page."""
    db = connect(data / "entrepot.db")
    with closing(db), db:
        db.executemany("INSERT INTO repository (name, created, manifests) VALUES (?, 0, 1)", ((n,) for n in names))
        lookups.repository_page(db, None, 100, within)  # builds the matcher of the set, which is cached
        with count_instructions() as count:
            assert lookups.repository_page(db, None, 100, within).more
        assert count.total < 3_000_000
