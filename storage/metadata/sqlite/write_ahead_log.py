"""Copies SQLite's write-ahead log into the database file (`WriteAheadLog`).

SQLite commits by appending to the log. A *checkpoint* copies the log into the database file and syncs that file. The
*reserve* is disk space that the registry keeps allocated (`storage.data_dir.reserve`); checkpoints use it on a full
disk.

A failed fsync can leave *gaps* in the log: parts that are not on the disk. Linux reports the error only once, so the
fsync of a later commit can succeed although the gaps remain. After a power cut, SQLite reads the log only up to the
first gap, and later commits are lost. Therefore the log has to be emptied before the next commit
(`WriteAheadLog.close_gaps`).
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import apsw

from storage.data_dir.durable_files import sync_file
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.errors import StorageFailed, StorageFull
from storage.metadata.sqlite.database import BUSY_TIMEOUT_MILLISECONDS, means_full_disk

CHECKPOINT_LOG_PAGES = 2000
"""If the log has at least this number of pages (8 MB) after a commit, a checkpoint runs. On a small disk, a smaller
number applies (`checkpoint_log_pages`). The next commit waits while the checkpoint runs. With 2,000 pages, only about
every 180th commit waits, so the wait does not determine the 99th percentile of the latency."""
PAGE_BYTES = 4096
"""SQLite's default size of a page."""
RESTART_LOG_PAGES = 16_000
"""If the log has at least this number of pages, a checkpoint waits until no reader needs the log. The next commit then
overwrites the log from its beginning, so the log does not grow further."""
RESTART_WAIT_MILLISECONDS = 200
"""Longest time that a checkpoint waits for the readers of the log. No process can commit during this wait."""
RESTART_RETRY_PAGES = 4000
"""After a checkpoint has waited for readers in vain, the log has to grow by this number of pages before a checkpoint
waits again."""
CLOSE_RETRY_SECONDS = 1.0
"""Seconds between two attempts to close the gaps of the log. No process can commit during an attempt."""
CHECKPOINT_FAILED = (
    "cannot copy the write-ahead log of the metadata into the database file; no change is lost, and the next commit "
    "tries again: %s"
)
log = logging.getLogger("storage.metadata")


def checkpoint_log_pages(reserve_bytes: int) -> int:
    """Returns the number of pages in the log from which a checkpoint runs: CHECKPOINT_LOG_PAGES, or the number of pages
    that fit into half of the reserve, whichever is less. `reserve_bytes`: the full size of the reserve. If it is 0
    (there is no reserve), returns CHECKPOINT_LOG_PAGES.

    A checkpoint can make the database file grow by the size of the log. On a full disk, this space comes from the
    reserve. The other half of the reserve is for deletes: they append to the log before they free space."""
    return min(CHECKPOINT_LOG_PAGES, reserve_bytes // (2 * PAGE_BYTES)) or CHECKPOINT_LOG_PAGES


class WriteAheadLog:
    """The write-ahead log of the metadata. Only the commit thread of a process calls the methods. During each call, it
    holds the file lock that excludes other writing processes. `db` is the connection that commits."""

    def __init__(self, database: Path, system: System, reserve: Reserve) -> None:
        """`database`: the database file. Checkpoints use `reserve` on a full disk."""
        self._path = Path(f"{database}-wal")
        self._system = system
        self._reserve = reserve
        self._pages = 0
        self._checkpoint_pages = checkpoint_log_pages(reserve.full_size)
        self._restart_pages = RESTART_LOG_PAGES
        """A checkpoint waits for the log's readers if the log has at least this number of pages."""
        self.may_have_gaps = False
        """Whether an fsync of the log has failed since the log was emptied."""
        self._next_close_at = float("-inf")
        """Time before which `close_gaps` makes no further attempt, in seconds of `time.monotonic`."""

    @property
    def is_long(self) -> bool:
        """Whether the log has enough pages for a checkpoint."""
        return self._pages >= self._checkpoint_pages

    def note_pages(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        """SQLite calls this after each commit. `pages`: the number of pages in the log."""
        self._pages = pages
        return apsw.SQLITE_OK

    def note_error(self, error: apsw.Error) -> None:
        """If `error` comes from a failed fsync, notes that the log may have gaps. Call this with each error of a commit
        or checkpoint."""
        if isinstance(error, apsw.IOError):
            # Every IOError of SQLite has `extendedresult`. Only tests raise IOErrors without it; these count as failed
            # fsyncs.
            result = getattr(error, "extendedresult", apsw.SQLITE_IOERR_FSYNC)
            self.may_have_gaps = self.may_have_gaps or result == apsw.SQLITE_IOERR_FSYNC

    def close_gaps(self, db: apsw.Connection) -> None:
        """If the log may have gaps, copies the log into the database file, syncs that file, and then empties and syncs
        the log. The copy has no gaps, because SQLite reads the log from the page cache. Raises:

        - StorageFull if the disk is full.
        - StorageFailed if the attempt fails for another reason, for example because a reader needs the log for too
          long. For `CLOSE_RETRY_SECONDS` after the start of this attempt, all calls raise StorageFailed without
          another attempt."""
        if not self.may_have_gaps:
            return
        if time.monotonic() >= self._next_close_at:
            self._next_close_at = time.monotonic() + CLOSE_RETRY_SECONDS
            db.set_busy_timeout(RESTART_WAIT_MILLISECONDS)
            try:
                # This mode also empties the log. Otherwise, after a power cut, SQLite would read the log up to the gap,
                # and replace newer pages in the database file by old pages from the log.
                self._try_checkpoint(db, apsw.SQLITE_CHECKPOINT_TRUNCATE)
                sync_file(self._system, self._path)
                self.may_have_gaps, self._next_close_at = False, float("-inf")
            except StorageFull:
                self._next_close_at = float("-inf")  # the caller tries again at once, with space from the reserve
                raise
            except (apsw.Error, OSError) as error:
                log.warning(
                    "after an error of the disk, some of the newest changes may not be on the disk, and writing them "
                    "again failed: %s; the registry accepts no change until this succeeds; check the disk",
                    error,
                )
            finally:
                db.set_busy_timeout(BUSY_TIMEOUT_MILLISECONDS)
        if self.may_have_gaps:
            raise StorageFailed(
                "the disk could not store the registry's metadata, and the registry accepts no change until it can "
                "store the metadata again; check the disk"
            )
        log.warning("after an error of the disk, all changes of the metadata are on the disk again; check the disk")

    def close_gaps_at_end(self, db: apsw.Connection) -> None:
        """Does the work of `close_gaps` before this process ends. Makes an attempt immediately, even after a failed
        attempt. Uses the reserve if the disk is full. Raises StorageFull, StorageFailed."""
        self._next_close_at = float("-inf")
        try:
            self.close_gaps(db)
        except StorageFull:
            self._reserve.spend(lambda: self.close_gaps(db), StorageFull)

    def shorten(self, db: apsw.Connection) -> None:
        """Runs a checkpoint. If the checkpoint has copied the whole log, and no reader needs the log, the next commit
        overwrites the log from its beginning. If the log has at least `_restart_pages` pages, the checkpoint waits for
        the log's readers. Logs errors instead of raising them."""
        if self._pages < self._restart_pages:
            self.checkpoint(db)
            return
        self._restart_pages = self._pages + RESTART_RETRY_PAGES
        db.set_busy_timeout(RESTART_WAIT_MILLISECONDS)
        try:
            if self._run_checkpoint(db, apsw.SQLITE_CHECKPOINT_RESTART):
                self._restart_pages = RESTART_LOG_PAGES
        finally:
            db.set_busy_timeout(BUSY_TIMEOUT_MILLISECONDS)

    def checkpoint(self, db: apsw.Connection) -> None:
        """Runs a checkpoint that does not wait for readers. Logs errors instead of raising them."""
        self._run_checkpoint(db, apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _run_checkpoint(self, db: apsw.Connection, mode: int) -> bool:
        """Runs a checkpoint, and returns whether it succeeded. If the disk is full, uses the reserve. Logs the error of
        a failed checkpoint, unless `mode` is SQLITE_CHECKPOINT_RESTART and a reader still needs the log. `mode`: one of
        `apsw.SQLITE_CHECKPOINT_*`."""
        self._pages = 0  # the next commit calls `note_pages`
        try:
            try:
                self._try_checkpoint(db, mode)
            except StorageFull:
                self._reserve.spend(lambda: self._try_checkpoint(db, mode), StorageFull)
        except apsw.BusyError as error:
            # With SQLITE_CHECKPOINT_RESTART, this error means only that a reader still needs the log.
            if mode != apsw.SQLITE_CHECKPOINT_RESTART:
                log.warning(CHECKPOINT_FAILED, error)
            return False
        except (apsw.Error, StorageFull) as error:
            log.warning(CHECKPOINT_FAILED, error)
            return False
        return True

    def _try_checkpoint(self, db: apsw.Connection, mode: int) -> None:
        """Runs a checkpoint once. Raises StorageFull, apsw.Error."""
        try:
            db.wal_checkpoint(mode=mode)
        except apsw.Error as error:
            self.note_error(error)  # a checkpoint begins with an fsync of the log
            if means_full_disk(db, error):
                raise StorageFull from error
            raise
