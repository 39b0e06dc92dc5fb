"""Checks and repairs the metadata database (`SqliteConsistency`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import apsw

from storage.consistency import BlobRecord, CheckedPage, Key, Problem, ProblemCode
from storage.data_dir.reserve import ReserveUse
from storage.errors import QuotaExceeded, StorageFailed
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.search import index_tables
from storage.metadata.sqlite.upkeep import consistency_repairs, manifest_checks
from storage.metadata.sqlite.upkeep.table_checks import TABLE_CHECKS, TableCheck
from storage.metadata.sqlite.upkeep.usage_checks import USAGE_CHECKS
from storage.names import Digest

MAX_DATABASE_ERRORS: Final = 100
"""Largest number of errors that SQLite reports in one check."""
_ROOT_PAGE: Final = re.compile(r"Tree (\d+)\b")
"""Finds the number of the first page of the damaged table or index in a damage message of SQLite. Messages without this
number contain the name of the table."""
_CHECKS_BY_AREA: Final[dict[str, TableCheck]] = {check.area: check for check in (*TABLE_CHECKS, *USAGE_CHECKS)}
T = TypeVar("T")


class SqliteConsistency:
    """Implements `storage.consistency.Consistency`, which describes the methods. Reads run in a separate thread,
    because a check of a large database takes minutes. Repairs may use the whole disk reserve (`ReserveUse.ALL`), so
    that they are possible on a full disk."""

    areas: Sequence[str] = (manifest_checks.AREA, *_CHECKS_BY_AREA)
    """The area of manifests, and one area for each item of `TABLE_CHECKS` and `USAGE_CHECKS`."""

    def __init__(
        self,
        scans: ScanThread | ImmutableScans,
        writer: CommitThread | ImmutableDatabase,
        clock: Callable[[], float],
    ) -> None:
        """Reads with `scans` and changes through `writer`. `clock` returns the time in seconds since 1970."""
        self._scans = scans
        self._writer = writer
        self._clock = clock

    async def count_rows(self) -> int:
        tables = ["manifest", *(check.table for check in _CHECKS_BY_AREA.values())]
        counts = " + ".join(f"(SELECT count(*) FROM {table})" for table in tables)
        return await self._scan(lambda db: _number(db.execute(f"SELECT {counts}").get))

    async def check_database(self) -> list[Problem]:
        return await self._scan(_check_database)

    async def check(self, area: str, after: Key | None) -> CheckedPage:
        check = _CHECKS_BY_AREA[area].check if area in _CHECKS_BY_AREA else manifest_checks.check
        return await self._scan(lambda db: check(db, after))

    async def recheck(self, problem: Problem) -> Problem | None:
        return await self._scan(lambda db: _recheck(db, problem))

    async def repair(self, problem: Problem) -> str | None:
        if problem.code is ProblemCode.SEARCH_INDEX:
            return await self._rebuild_search_index()
        now = self._clock()

        def repair_current(db: apsw.Connection) -> str | None:
            current = _recheck(db, problem)
            if current is None:
                return "the problem had gone before the repair"
            repair_text = None
            # `with db` makes a savepoint. If a quota or a constraint of the database does not allow the repair, the
            # repair is rolled back, and the result is None.
            with suppress(apsw.ConstraintError, QuotaExceeded), db:
                repair_text = consistency_repairs.repair(db, current, now)
            return repair_text

        return await self._writer.run(repair_current, reserve_use=ReserveUse.ALL)

    async def list_blobs(self, after: int, limit: int) -> list[BlobRecord]:
        def read(db: apsw.Connection) -> list[BlobRecord]:
            rows: list[Any] = db.execute(
                "SELECT id, digest, size, place FROM blob WHERE id > ? ORDER BY id LIMIT ?", (after, limit)
            ).fetchall()
            return [BlobRecord(row_id, Digest(digest), size, place) for row_id, digest, size, place in rows]

        return await self._scan(read)

    async def find_blob(self, digest: Digest) -> BlobRecord | None:
        row: Any = await self._scan(
            lambda db: db.execute("SELECT id, size, place FROM blob WHERE digest = ?", (digest,)).get
        )
        return None if row is None else BlobRecord(row[0], digest, row[1], row[2])

    async def set_size(self, digest: Digest, place: str, size: int) -> bool:
        return await self._writer.run(
            lambda db: consistency_repairs.set_size(db, digest, place, size), reserve_use=ReserveUse.ALL
        )

    async def _rebuild_search_index(self) -> str | None:
        """Replaces the search index by an empty index, which a server then fills. Returns a text for people; None if
        SQLite cannot replace the index."""
        try:
            await self._writer.run(index_tables.rebuild, reserve_use=ReserveUse.ALL)
        except StorageFailed:
            return None  # the pages of the index are so damaged that SQLite cannot free them
        return "dropped the search index; the server builds a new one"

    async def _scan(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs the lookup in the thread for reads, in one transaction. Raises StorageFailed if the database cannot be
        read."""

        def in_transaction(db: apsw.Connection) -> T:
            db.execute("BEGIN")
            try:
                return lookup(db)
            finally:
                db.execute("ROLLBACK")

        try:
            return await self._scans.run(in_transaction)
        except apsw.Error as error:
            raise StorageFailed(f"the database cannot be read: {error}; restore it from a backup") from error


def _check_database(db: apsw.Connection) -> list[Problem]:
    texts = _damage_texts(db)
    index_texts = [text for text in texts if _is_about_search_index(db, text)]
    problems = [
        Problem(ProblemCode.DATABASE, f"{text}; restore the database from a backup")
        for text in texts
        if text not in index_texts
    ]
    if index_texts:
        more = f", and {len(index_texts) - 1} more" if len(index_texts) > 1 else ""
        problems.append(
            Problem(ProblemCode.SEARCH_INDEX, f"{index_texts[0]}{more}; a repair builds the search index again")
        )
    return problems


def _damage_texts(db: apsw.Connection) -> list[str]:
    """Returns the damage messages of SQLite, one for each error."""
    texts: list[str] = []
    # A connection remembers the list of the segments (parts) of a full-text index. The list is old if another
    # connection has merged segments. The check with an old list would report the merged segments as missing.
    index_tables.reload_segment_lists(db)
    try:
        for (text,) in db.execute(f"PRAGMA quick_check({MAX_DATABASE_ERRORS})"):
            # A line such as "*** in database main ***" is a heading.
            texts += [line for line in str(text).split("\n") if line != "ok" and not line.startswith("***")]
    except (apsw.CorruptError, apsw.SQLError) as error:
        # The check ends with an error in two cases. If a page is damaged, `texts` already has a message about the page.
        # If SQLite cannot open a full-text index, the text of the error contains "fts5".
        if not texts and "fts5" not in str(error):
            raise
        texts = texts or [str(error)]
    return texts


def _is_about_search_index(db: apsw.Connection, text: str) -> bool:
    """Returns whether a damage message of SQLite is about the search index, which can be rebuilt from other tables."""
    root_page = _ROOT_PAGE.search(text)
    if root_page is not None:
        name = db.execute("SELECT tbl_name FROM sqlite_schema WHERE rootpage = ?", (int(root_page[1]),)).get
        return isinstance(name, str) and index_tables.is_index_table(name)
    return "fts5" in text or any(index_tables.is_index_table(word) for word in re.findall(r"\w+", text))


def _number(value: Any) -> int:
    return int(value)


def _recheck(db: apsw.Connection, problem: Problem) -> Problem | None:
    """Checks the rows of the problem again. Returns the problem as it is now; None if it does not exist any more."""
    if problem.area in _CHECKS_BY_AREA:
        return _CHECKS_BY_AREA[problem.area].recheck(db, problem.key, problem.code)
    return manifest_checks.recheck(db, problem)
