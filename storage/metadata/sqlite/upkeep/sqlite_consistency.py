"""Checks and mends the metadata database (`SqliteConsistency`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, TypeVar

import apsw

from storage.consistency import BlobRecord, CheckedPage, Key, Problem
from storage.data_dir.reserve import ReserveUse
from storage.errors import StorageFailed
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep import consistency_repairs, manifest_checks
from storage.metadata.sqlite.upkeep.table_checks import TABLE_CHECKS, TableCheck
from storage.metadata.sqlite.upkeep.usage_checks import USAGE_CHECKS
from storage.names import Digest

MAX_DATABASE_ERRORS: Final = 100
_TABLE_AREAS: Final[dict[str, TableCheck]] = {check.area: check for check in (*TABLE_CHECKS, *USAGE_CHECKS)}
T = TypeVar("T")


class SqliteConsistency:
    """Implements `storage.consistency.Consistency`, which describes the methods. Reads in a thread of its own, because
    a check of a large database takes minutes."""

    areas: Sequence[str] = (manifest_checks.AREA, *_TABLE_AREAS)

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
        tables = [manifest_checks.AREA, *(check.table for check in _TABLE_AREAS.values())]
        counts = " + ".join(f"(SELECT count(*) FROM {table})" for table in tables)
        return await self._scan(lambda db: _number(db.execute(f"SELECT {counts}").get))

    async def check_database(self) -> list[str]:
        rows: list[Any] = await self._scan(
            lambda db: db.execute(f"PRAGMA quick_check({MAX_DATABASE_ERRORS})").fetchall()
        )
        return [text for (text,) in rows if text != "ok"]

    async def check(self, area: str, after: Key | None) -> CheckedPage:
        check = _TABLE_AREAS[area].check if area in _TABLE_AREAS else manifest_checks.check
        return await self._scan(lambda db: check(db, after))

    async def confirm(self, problem: Problem) -> Problem | None:
        return await self._scan(lambda db: _look(db, problem))

    async def repair(self, problem: Problem) -> str | None:
        now = self._clock()

        def mend(db: apsw.Connection) -> str | None:
            found = _look(db, problem)
            if found is None:
                return "it was gone meanwhile"
            done = None
            # If a rule of the database, such as a quota, does not allow the repair, the savepoint is rolled back.
            with suppress(apsw.ConstraintError), db:
                done = consistency_repairs.repair(db, found, now)
            return done

        return await self._writer.run(mend, reserve_use=ReserveUse.RELIEF)

    async def blobs(self, after: int, limit: int) -> list[BlobRecord]:
        def read(db: apsw.Connection) -> list[BlobRecord]:
            rows: list[Any] = db.execute(
                "SELECT id, digest, size, place FROM blob WHERE id > ? ORDER BY id LIMIT ?", (after, limit)
            ).fetchall()
            return [BlobRecord(row_id, Digest(digest), size, place) for row_id, digest, size, place in rows]

        return await self._scan(read)

    async def blob(self, digest: Digest) -> BlobRecord | None:
        row: Any = await self._scan(
            lambda db: db.execute("SELECT id, size, place FROM blob WHERE digest = ?", (digest,)).get
        )
        return None if row is None else BlobRecord(row[0], digest, row[1], row[2])

    async def set_size(self, digest: Digest, place: str, size: int) -> bool:
        return await self._writer.run(
            lambda db: consistency_repairs.set_size(db, digest, place, size), reserve_use=ReserveUse.RELIEF
        )

    async def _scan(self, lookup: Callable[[apsw.Connection], T]) -> T:
        """Runs the lookup in the thread, in one transaction. Raises StorageFailed."""

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


def _number(value: Any) -> int:
    return int(value)


def _look(db: apsw.Connection, problem: Problem) -> Problem | None:
    """Returns the problem as it is now; None if it is gone."""
    if problem.area in _TABLE_AREAS:
        return _TABLE_AREAS[problem.area].look(db, problem.key, problem.code)
    return manifest_checks.look(db, problem)
