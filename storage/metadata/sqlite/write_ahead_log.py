"""Copies SQLite's write-ahead log into the database file (`WriteAheadLog`).

SQLite commits by appending to the log. A *checkpoint* copies the log into the database file and syncs that file. The
*reserve* is disk space allocated in advance (`storage.data_dir.reserve`), which checkpoints use on a full disk.
"""

from __future__ import annotations

import logging

import apsw

from storage.data_dir.reserve import Reserve
from storage.errors import StorageFailed, StorageFull
from storage.metadata.sqlite.database import BUSY_TIMEOUT_MILLISECONDS, is_full

CHECKPOINT_LOG_PAGES = 1000
"""A checkpoint runs after a commit if the log then has at least this number of pages. This is SQLite's own default."""
RESTART_LOG_PAGES = 16_000
"""With at least this number of pages in the log, a checkpoint waits until no reader needs the log. The next commit can
then overwrite the log from its beginning, so that the log does not grow further."""
RESTART_WAIT_MILLISECONDS = 200
"""How long a checkpoint waits for the readers of the log. The wait is short, because a reader with a long transaction,
such as a backup, may need the log for minutes, and no process can commit during the wait."""
RESTART_RETRY_PAGES = 4000
"""After a checkpoint has waited for readers in vain, the log has to grow by this number of pages before a checkpoint
waits again."""
CHECKPOINT_FAILED = (
    "cannot copy the write-ahead log of the metadata into the database file; no change is lost, and the next commit "
    "tries again: %s"
)
log = logging.getLogger("storage.metadata")


class WriteAheadLog:
    """The log, as the process sees it that commits. The caller of each method holds the lock of the database's writers
    and calls from one thread. `db` is the connection that commits."""

    def __init__(self, reserve: Reserve) -> None:
        """Checkpoints use `reserve` on a full disk."""
        self._reserve = reserve
        self._pages = 0
        self._restart_pages = RESTART_LOG_PAGES
        """Length of the log, in pages, from which on a checkpoint waits for the log's readers."""
        self._may_have_gaps = False
        """Whether an fsync of the log has failed since the log began (see `note_failed_sync`)."""

    @property
    def is_long(self) -> bool:
        """Whether the log is long enough for a checkpoint."""
        return self._pages >= CHECKPOINT_LOG_PAGES

    def note_pages(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        """SQLite calls this after each commit. `pages`: the length of the log."""
        self._pages = pages
        return apsw.SQLITE_OK

    def note_failed_sync(self) -> None:
        """Notes that SQLite could not sync the log. Before the next commit, `close_gaps` has to be called.

        Linux reports such an error once. It then treats the bytes that it could not write as written, and these bytes
        may belong to earlier commits. After a power cut, SQLite reads the log only up to the first such gap. A later
        commit in the same log would be lost with the gap, even if its own fsync succeeds."""
        self._may_have_gaps = True

    def close_gaps(self, db: apsw.Connection) -> None:
        """Does nothing unless an fsync of the log has failed. Otherwise copies the whole log into the database file and
        syncs that file; the next commit then overwrites the log from its beginning. The copy is complete, because the
        page cache still has the bytes that the kernel could not write. Raises StorageFailed if the copy fails, or if a
        reader needs the log for too long."""
        if not self._may_have_gaps:
            return
        if not self._restart(db):
            raise StorageFailed(
                "the disk could not store the registry's metadata, and the registry accepts no change until it can "
                "store the metadata again; check the disk"
            )
        self._may_have_gaps = False
        log.warning("the metadata is stored completely again after an error of the disk; check the disk")

    def shorten(self, db: apsw.Connection) -> None:
        """Runs a checkpoint. If the log is very long, waits for its readers."""
        if self._pages >= self._restart_pages:
            self._restart(db)
        else:
            self.checkpoint(db)

    def checkpoint(self, db: apsw.Connection) -> None:
        """Runs a checkpoint that does not wait for readers. Logs errors instead of raising them."""
        self._checkpoint(db, apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _restart(self, db: apsw.Connection) -> bool:
        """Runs a checkpoint that waits for a short time until no reader needs the log. Returns whether the next commit
        overwrites the log from its beginning. If readers need the log for longer, a checkpoint waits again only after
        the log has grown by `RESTART_RETRY_PAGES`."""
        self._restart_pages = self._pages + RESTART_RETRY_PAGES
        db.set_busy_timeout(RESTART_WAIT_MILLISECONDS)
        try:
            is_complete = self._checkpoint(db, apsw.SQLITE_CHECKPOINT_RESTART)
        finally:
            db.set_busy_timeout(BUSY_TIMEOUT_MILLISECONDS)
        if is_complete:
            self._restart_pages = RESTART_LOG_PAGES
        return is_complete

    def _checkpoint(self, db: apsw.Connection, mode: int) -> bool:
        """Runs a checkpoint. If the disk is full, uses the reserve. Logs apsw.Error and StorageFull instead of raising
        them. Returns whether the checkpoint was complete. `mode`: one of `apsw.SQLITE_CHECKPOINT_*`."""
        self._pages = 0  # the next commit sets it to the length that the log then has

        def attempt() -> None:
            try:
                db.wal_checkpoint(mode=mode)
            except apsw.Error as error:
                if is_full(db, error):
                    raise StorageFull from error
                raise

        try:
            try:
                attempt()
            except StorageFull:
                self._reserve.spend(attempt, StorageFull)
        except apsw.BusyError as error:
            if mode != apsw.SQLITE_CHECKPOINT_RESTART:  # in that mode, a long read may need the log, which is no fault
                log.warning(CHECKPOINT_FAILED, error)
            return False
        except (apsw.Error, StorageFull) as error:
            if isinstance(error, apsw.IOError) or isinstance(error.__cause__, apsw.IOError):
                self.note_failed_sync()  # a checkpoint syncs the log first
            log.warning(CHECKPOINT_FAILED, error)
            return False
        return True
