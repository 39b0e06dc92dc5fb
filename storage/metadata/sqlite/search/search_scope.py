"""The repositories in which a search may find something (`SearchScope`).

If a person may see only few repositories, a search reads only the rows of these repositories. Otherwise it reads the
rows of all repositories, and leaves out repositories whose names match no pattern of the person's rights. A search
reads at most `MAX_ROWS` rows, for at most `MAX_SECONDS`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import apsw

from storage.content_search import MAX_OFFSET, SearchPage
from storage.metadata.sqlite import lookups
from storage.patterns import NameSet

T = TypeVar("T")
MAX_LISTED_REPOSITORIES: Final = 500
"""If a person may see at most this number of repositories, a search reads only the rows of these repositories."""
MAX_LISTING_COST: Final = 30_000
"""Largest cost of listing the repositories that a person may see. If the list costs more, the search reads the rows of
all repositories. A cost of 1 is the time that it takes to match one character of a name against a few simple patterns:
about half a microsecond. So the largest cost is about 15 ms."""
MAX_ROWS: Final = 3_000
"""Largest number of rows that one search reads. This takes about 30 ms."""

MAX_SECONDS: Final = 0.1
"""Longest time that one `time_limit` block reads rows. The other searches of the process wait meanwhile."""
STEPS_PER_CLOCK_CHECK: Final = 1000
"""Number of steps of SQLite's virtual machine between two checks of the clock. Reading a page of a full-text index also
counts as steps."""


@contextmanager
def time_limit(db: apsw.Connection) -> Iterator[None]:
    """Makes a statement inside the `with` block raise apsw.InterruptError once the block has taken `MAX_SECONDS`."""
    deadline = time.monotonic() + MAX_SECONDS
    db.set_progress_handler(lambda: time.monotonic() > deadline, STEPS_PER_CLOCK_CHECK)
    try:
        yield
    finally:
        db.set_progress_handler(None)


@dataclass(frozen=True)
class SearchScope:
    """The repositories of a search. `within`: the set of their names. `ids`: the row ids of these repositories, by
    name; None: there are too many to list, so the search reads the rows of all repositories of the store."""

    within: NameSet
    ids: dict[str, int] | None

    @classmethod
    def of(cls, db: apsw.Connection, within: NameSet) -> SearchScope:
        """Returns the scope of a search in the set `within`."""
        if within.has_every_name:
            return cls(within, None)
        if not within.patterns:
            return cls(within, {})
        page = lookups.repository_page(db, None, MAX_LISTED_REPOSITORIES, within, cost_limit=MAX_LISTING_COST)
        if page.more:
            return cls(within, None)
        rows: list[Any] = db.execute(
            "SELECT r.name, r.id FROM json_each(?) n JOIN repository r ON r.name = n.value", (json.dumps(page.items),)
        ).fetchall()
        return cls(within, dict(rows))

    @property
    def ids_json(self) -> str | None:
        """The row ids (`ids`) as a JSON array; None if `ids` is None."""
        return None if self.ids is None else json.dumps(list(self.ids.values()))

    @property
    def reads_hidden_rows(self) -> bool:
        """Whether a search also reads rows of repositories outside the scope. If so, every page states that it may be
        incomplete. If only some of these pages stated this, they would reveal whether there are many rows that the
        person may not see."""
        return self.ids is None and not self.within.has_every_name

    def __contains__(self, name: str) -> bool:
        if self.ids is not None:
            return name in self.ids
        return self.within.has_every_name or name in self.within


def read_page(
    db: apsw.Connection,
    scope: SearchScope,
    sql: str,
    values: Sequence[Any],
    offset: int,
    limit: int,
    convert: Callable[[tuple[Any, ...]], tuple[object, T] | None],
) -> SearchPage[T]:
    """Returns a page of entries: skips `offset` entries, and returns at most `limit`. Makes the entries from the rows
    that `sql` selects. The first column of a row is the name of a repository. Leaves out rows of repositories outside
    the scope. `convert` returns a key and an entry for a row, or None if the row does not match the search. Of several
    rows with the same key, only the first makes an entry."""
    if offset > MAX_OFFSET:
        return SearchPage([], is_complete=False)
    entries: dict[object, T] = {}
    is_complete = not scope.reads_hidden_rows
    rows_read = 0
    try:
        with time_limit(db), closing(_rows(db, sql, values)) as rows:
            for row in rows:
                rows_read += 1
                if rows_read > MAX_ROWS:
                    return SearchPage(list(entries.values())[offset:], is_complete=False)
                if row[0] not in scope or (converted := convert(row)) is None or converted[0] in entries:
                    continue
                key, entry = converted
                entries[key] = entry
                if len(entries) > offset + limit:
                    page = list(entries.values())[offset : offset + limit]
                    return SearchPage(page, more=True, is_complete=is_complete)
    except apsw.InterruptError:
        is_complete = False
    return SearchPage(list(entries.values())[offset:], is_complete=is_complete)


def _rows(db: apsw.Connection, sql: str, values: Sequence[Any]) -> Generator[tuple[Any, ...], None, None]:
    """Yields the rows. Closing the generator ends the statement and its read transaction."""
    with closing(db.cursor()) as cursor:
        yield from cursor.execute(sql, tuple(values))
