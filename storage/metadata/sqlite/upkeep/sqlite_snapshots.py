"""Copies the metadata database into files while processes use the database. Reads and changes the copies
(`SqliteSnapshots`).

A copy is made in one read transaction, so it has the state of one moment. Writers do not wait for this transaction, but
the write-ahead log grows with each commit until the transaction ends.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import apsw

from storage.backups import BackupFailed, SnapshotBlob, SnapshotTotals
from storage.data_dir.durable_files import sync_file
from storage.data_dir.system import DISK_FULL_ERRNOS, System
from storage.metadata.sqlite.access.account_table import SELECT_INSTANCE_ID
from storage.metadata.sqlite.database import connect, newest_table_version
from storage.metadata.sqlite.upkeep.damage_changes import mark_blob_damaged, mark_blob_healed
from storage.names import Digest
from storage.outbox import EventAction

PAGES_PER_STEP: Final = 1024
"""Number of pages that are copied between two reports of the progress."""
UNFINISHED_JOB_MESSAGE: Final = "it had not ended when this backup was made"
"""In a copy, the message of each job that had not ended when the copy was made."""
MAX_EVENTS_PER_SECOND: Final = 1000
"""On average, a registry adds fewer events per second than this. A restore skips this many event numbers for each
second since the newest event in the copy."""
MIN_EVENT_GAP: Final = 1_000_000_000
"""How many event numbers a restore skips in addition, in case a wrong clock makes the measured time too short."""
_TOTALS: Final = """
SELECT (SELECT count(*) FROM repository WHERE manifests > 0), (SELECT count(*) FROM manifest),
       (SELECT count(*) FROM tag), count(*), coalesce(sum(size), 0) FROM blob"""


class SqliteSnapshots:
    """Implements `storage.backups.Snapshots`, which describes the methods."""

    def __init__(self, database: Path, clock: Callable[[], float] = time.time, *, system: System | None = None) -> None:
        """`database`: the metadata database that `write` copies. `clock` returns seconds since 1970. `system` creates
        and syncs the copies; None: in the real file system."""
        self._database = database
        self._system = system or System()
        self._clock = clock

    async def write(self, path: Path, on_pages: Callable[[int, int], None]) -> None:
        loop = asyncio.get_running_loop()
        stopping = threading.Event()

        def report(done: int, total: int) -> None:
            loop.call_soon_threadsafe(on_pages, done, total)

        executor = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        copying = loop.run_in_executor(executor, partial(self._copy, path, report, stopping))
        try:
            await asyncio.shield(copying)
        finally:
            stopping.set()
            if not copying.done():
                await asyncio.wait([copying])
            executor.shutdown()

    def _copy(self, path: Path, report: Callable[[int, int], None], stopping: threading.Event) -> None:
        """Copies the database. Returns early, with an incomplete copy, if `stopping` is set."""
        target: apsw.Connection | None = None
        try:
            os.close(self._system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            target = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)
            target.pragma("synchronous", "off")  # `sync_file` makes the copy durable at the end
            with closing(connect(self._database, read_only=True)) as source, closing(target):
                # In this transaction, `source` keeps the state of one moment. Without the transaction, SQLite would
                # begin the copy again after each commit of another connection.
                source.execute("BEGIN; SELECT 1 FROM sqlite_schema")
                with target.backup("main", source, "main") as backup:
                    while not backup.done and not stopping.is_set():
                        backup.step(PAGES_PER_STEP)
                        report(backup.page_count - backup.remaining, backup.page_count)
                source.execute("ROLLBACK")
                if stopping.is_set():
                    return
                target.pragma("journal_mode", "delete")  # a copy is one file, without a write-ahead log
                self._clean_copy(target)
            sync_file(self._system, path)
        except (apsw.Error, OSError) as error:
            raise _failure(f"cannot copy the database to {path}", error) from error

    def _clean_copy(self, db: apsw.Connection) -> None:
        """Marks the unfinished jobs in a new copy as stopped, and deletes three things from the copy:

        - The upload sessions, because a backup does not have their bytes.
        - The login sessions of browsers. Otherwise, a restore could make a session valid again that has been ended
          since, for example because it was stolen.
        - The events, because this registry sends them to its webhooks. Only the row of the newest event stays, for its
          number. The list of events does not show this row, and the row no longer names the client."""
        db.execute(
            "DELETE FROM upload; DELETE FROM login_session; DELETE FROM event_delivery; DELETE FROM event_reader; "
            "DELETE FROM event WHERE id < (SELECT max(id) FROM event); "
            "UPDATE event SET kept = 0, actor = '', address = '', request_id = '', user_agent = '', reason = ''; "
            "UPDATE job SET state = 'stopped', ended = ?1, updated = ?1, message = ?2 "
            "WHERE state IN ('queued', 'running')",
            (self._clock(), UNFINISHED_JOB_MESSAGE),
        )

    @contextmanager
    def open(self, path: Path) -> Iterator[SqliteSnapshot]:
        try:
            uri = f"file:{quote(str(path.absolute()))}?immutable=1"
            db = apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
        except apsw.Error as error:
            raise _failure(f"cannot read {path}", error) from error
        with closing(db):
            yield SqliteSnapshot(db, path)

    def mark_damaged(self, path: Path, digests: Sequence[Digest], reason: str) -> None:
        with self._open_for_changes(path) as db:
            for digest in digests:
                place = db.execute("SELECT place FROM blob WHERE digest = ?", (digest,)).get
                mark_blob_damaged(db, digest, str(place or ""), reason, "", self._clock())

    def mark_healed(self, path: Path, places: Mapping[Digest, str]) -> None:
        with self._open_for_changes(path) as db:
            for digest, place in places.items():
                mark_blob_healed(db, digest, place, self._clock())

    def mark_restored(self, path: Path, copied_at: float) -> None:
        restored_at = max(self._clock(), copied_at)
        with self._open_for_changes(path) as db:
            # `since`: the time from which on all pulls are recorded. A copy from an earlier version may lack the table;
            # a migration then creates the table with the time of the migration.
            if _has_table(db, "pull_recording"):
                earlier = db.execute("SELECT max(since) FROM pull_recording").get
                restored_at = max(restored_at, float(earlier or 0.0))
                db.execute("DELETE FROM pull_recording; INSERT INTO pull_recording (since) VALUES (?)", (restored_at,))
            if _has_table(db, "event"):
                _increase_event_number(db, copied_at, restored_at)

    @contextmanager
    def _open_for_changes(self, path: Path) -> Iterator[apsw.Connection]:
        """Opens a copy. The changes in the `with` block are one transaction, and are durable after the block. Raises
        BackupFailed."""
        try:
            with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)) as db:
                with db:
                    yield db
                db.pragma("journal_mode", "delete")
            sync_file(self._system, path)
        except (apsw.Error, OSError) as error:
            raise _failure(f"cannot change {path}", error) from error


class SqliteSnapshot:
    """Implements `storage.backups.DatabaseSnapshot`, which describes the methods."""

    def __init__(self, db: apsw.Connection, path: Path) -> None:
        self._db = db
        self._path = path

    @property
    def table_version(self) -> int:
        return int(self._rows("PRAGMA user_version")[0][0])

    @property
    def is_too_new(self) -> bool:
        return self.table_version > newest_table_version()

    @property
    def instance_id(self) -> str:
        has_access_table = self._rows("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'access'")
        return str(self._rows(SELECT_INSTANCE_ID)[0][0]) if has_access_table else ""

    def totals(self) -> SnapshotTotals:
        return SnapshotTotals(*self._rows(_TOTALS)[0])

    def blobs(self, after: str, limit: int, prefix: str = "") -> list[SnapshotBlob]:
        rows = self._rows(
            "SELECT digest, size, place, created FROM blob WHERE digest > ?1 AND digest >= ?2 AND digest < ?3 "
            "ORDER BY digest LIMIT ?4",
            (after, prefix, f"{prefix}~", limit),  # "~" sorts after all characters of a digest
        )
        return [SnapshotBlob(Digest(digest), size, place, created) for digest, size, place, created in rows]

    def _rows(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[Any]:
        try:
            return self._db.execute(sql, parameters).fetchall()
        except apsw.Error as error:
            raise _failure(f"cannot read {self._path}", error) from error


def _increase_event_number(db: apsw.Connection, copied_at: float, restored_at: float) -> None:
    """Increases the number of the only event in the copy. The copied registry may have used further numbers after the
    copy was made, and clients may know these numbers. Because of the increase, events after the restore get numbers
    that the copied registry has never used. If the copy has no event, first adds one that the list of events does not
    show. `copied_at`, `restored_at`: when the copy was made and restored, in seconds since 1970."""
    if db.execute("SELECT max(id) FROM event").get is None:
        db.execute(
            "INSERT INTO event (id, uuid, at, action, repository, media_type, size, actor, address, request_id, "
            "user_agent, reason, kept) VALUES (0, '', ?, ?, '', '', 0, '', '', '', '', '', 0)",
            (copied_at, EventAction.PUSH),
        )
    db.execute(
        "UPDATE event SET id = id + ?1 + CAST(max(?2 - at, 0) * ?3 AS INTEGER); "
        "UPDATE event_list SET kept_from = (SELECT max(id) + 1 FROM event)",
        (MIN_EVENT_GAP, restored_at, MAX_EVENTS_PER_SECOND),
    )


def _has_table(db: apsw.Connection, name: str) -> bool:
    """Returns whether the copy has a table with this name. Copies from earlier versions have fewer tables."""
    return db.execute("SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = ?", (name,)).get is not None


def _failure(what_failed: str, error: apsw.Error | OSError) -> BackupFailed:
    """Converts an error. `what_failed`: the beginning of the message, such as "cannot read FILE"."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, apsw.FullError) or number in DISK_FULL_ERRNOS:
        return BackupFailed(f"{what_failed}: the disk is full; free some space there and run the command again")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return BackupFailed(f"{what_failed}: {reason or error}")
