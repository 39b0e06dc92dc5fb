"""The thread of a process that commits all its changes of metadata, in batches (`CommitThread`). Here a pushed tag, a
manifest or a blob's row becomes durable: the future of `CommitThread.run` is set after the commit's fsync.

SQLite lets one connection write at a time. With SQLite's busy timeout alone, one of several writing processes can
starve for seconds. So each transaction holds an exclusive `flock`, for which the processes queue. Changes that arrive
while another transaction runs share the next transaction and its fsync.

SQLite commits by appending to a write-ahead log. A *checkpoint* copies the log into the database file. Checkpoints run
in this thread with the same lock, after the results of a batch are delivered, so that nobody waits for a checkpoint as
part of a commit.

The *reserve* is disk space allocated in advance (`storage.data_dir.reserve`). On a full disk, checkpoints and changes
that free space or take rights away use it; changes that store content are refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import apsw

from storage.data_dir.blocking_calls import UncancellableFuture, as_storage_errors
from storage.data_dir.durable_files import sync_directory
from storage.data_dir.layout import Layout
from storage.data_dir.locks import Flock
from storage.data_dir.reserve import Reserve, ReserveUse
from storage.data_dir.system import System
from storage.errors import RegistryError, StorageFailed, StorageFull
from storage.metadata.sqlite.cross_process_change_counter import is_exactly_one_commit_later
from storage.metadata.sqlite.database import connect, is_full

MAX_BATCH_CHANGES = 256
"""Most changes in one transaction, so that the first of them does not wait long for its commit."""
CHECKPOINT_LOG_PAGES = 1000
"""Pages in the log from which a checkpoint runs after each commit: the value that SQLite itself uses by default."""
RESTART_LOG_PAGES = 16_000
"""Pages in the log from which a checkpoint also waits for readers, so that the log starts over and stops growing."""
RIGHTS_TABLE = "access"
"""Table with the epoch: a counter that every change of rights increments in its own transaction."""
log = logging.getLogger("storage.metadata")
T = TypeVar("T")
Change = Callable[[apsw.Connection], T]
"""Function that makes a change on the connection, inside a transaction, and returns its result."""


@dataclass(slots=True)
class _PendingChange:
    """A change that is queued or in a batch.

    `durable` and `reserve_use` are the arguments of `CommitThread.run`, `future` is what `run` returned. `result` and
    `error` are the outcome so far. `committed` is true once the transaction with the change is committed."""

    change: Change[Any]
    durable: bool
    reserve_use: ReserveUse
    future: UncancellableFuture[Any]
    result: Any = None
    error: BaseException | None = None
    committed: bool = False

    def fail(self, error: BaseException) -> None:
        """Sets the error of a change that was not committed and has no error of its own."""
        if not self.committed and self.error is None:
            self.error = _as_registry_error(error)

    def deliver(self) -> None:
        """Sets the future's result or error in its event loop. Does nothing if the loop is closed. Called in the commit
        thread."""
        if self.error is None:
            set_outcome = partial(self.future.set_result, self.result)
        else:
            set_outcome = partial(self.future.set_exception, self.error)
        with suppress(RuntimeError):
            self.future.get_loop().call_soon_threadsafe(set_outcome)


class CommitThread:
    """Runs changes in the order in which they are queued. A change must not block on anything but the database."""

    def __init__(self, layout: Layout, system: System, version: Callable[[], object], reserve: Reserve) -> None:
        """Starts the thread and opens the database in it. `version` returns the data version: a value that every commit
        of any process changes. `version` and `reserve` must stay usable until `close`. Raises apsw.Error, OSError."""
        self._layout = layout
        self._system = system
        self._version = version
        self._reserve = reserve
        self._rights_changed = False
        self._versions_with_same_rights: tuple[object, object] = (None, None)
        self._queue: queue.SimpleQueue[_PendingChange | None] = queue.SimpleQueue()
        self._log_pages = 0
        self._fsync_enabled: bool | None = None
        self._log_name_synced = False
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(opened,), name="metadata", daemon=True)
        self._thread.start()
        opened.result()

    def run(
        self, change: Change[T], *, durable: bool = True, reserve_use: ReserveUse = ReserveUse.GROWTH
    ) -> UncancellableFuture[T]:
        """Runs `change` in a transaction and returns a future of its result, which is set once the transaction is
        committed.

        `durable`: the commit must survive a power cut. `reserve_use`: how the change may use the reserve on a full
        disk. The future raises what `change` raises, StorageFull or StorageFailed; the change is then rolled back. If
        the task that awaits the future is cancelled, the change is still made, and the task ends afterwards."""
        future: UncancellableFuture[T] = UncancellableFuture(loop=asyncio.get_running_loop())
        self._queue.put(_PendingChange(change, durable, reserve_use, future))
        return future

    def has_same_rights(self, before: object, after: object) -> bool:
        """Returns whether exactly one commit lies between the data versions `before` and `after`, and this thread made
        it, and it changed no rights. Rights that were read at `before` are then still valid at `after`. Knows this for
        the last commit only."""
        return self._versions_with_same_rights == (before, after)

    def close(self) -> None:
        """Makes the queued changes, then ends the thread and closes the connection."""
        self._queue.put(None)
        self._thread.join()

    def _work(self, opened: Future[None]) -> None:
        try:
            db = connect(self._layout.metadata)
            lock = self._system.open(self._layout.metadata_lock, os.O_RDWR | os.O_CREAT)
        except BaseException as error:
            opened.set_exception(error)
            return
        db.set_wal_hook(self._note_log_pages)
        db.set_update_hook(self._note_changed_row)
        opened.set_result(None)
        try:
            while batch := self._next_batch():
                try:
                    with Flock(lock):
                        self._commit_with_room(db, batch)
                except BaseException as error:
                    # The lock failed, or the error is unexpected. The thread continues, because no other can write.
                    log.warning("a transaction with changes of the metadata failed", exc_info=error)
                    self._roll_back(db)
                    for pending in batch:
                        pending.fail(error)
                # Only now, because the event loop then runs and competes with this thread for the interpreter's lock.
                for pending in batch:
                    pending.deliver()
                if self._log_pages >= CHECKPOINT_LOG_PAGES:
                    self._checkpoint_locked(db, lock)
        finally:
            db.close()
            os.close(lock)

    def _next_batch(self) -> list[_PendingChange]:
        """Waits for a change, and returns it with those that are queued behind it. Returns an empty list after
        `close`."""
        first = self._queue.get()
        if first is None:
            return []
        batch = [first]
        with suppress(queue.Empty):
            while len(batch) < MAX_BATCH_CHANGES:
                following = self._queue.get_nowait()
                if following is None:  # `close` was called: end after this batch
                    self._queue.put(None)
                    break
                batch.append(following)
        return batch

    def _commit_with_room(self, db: apsw.Connection, batch: list[_PendingChange]) -> None:
        """Commits the batch. If a change finds no space and may use the reserve, tries it again with the reserve."""
        has_space = self._reserve.is_whole or self._reserve.restore()
        uncommitted = batch
        if not has_space:
            for pending in batch:
                pending.error = None if self._reserve.allows(pending.reserve_use) else StorageFull()
            uncommitted = [pending for pending in batch if pending.error is None]
            if not uncommitted:
                return

        def attempt() -> None:
            nonlocal uncommitted
            self._commit(db, uncommitted)
            uncommitted = [
                pending for pending in uncommitted if pending.reserve_use and isinstance(pending.error, StorageFull)
            ]
            if uncommitted:
                raise StorageFull

        try:
            attempt()
        except StorageFull:
            has_space = False
            with suppress(StorageFull):
                self._reserve.spend(attempt, StorageFull)
        if not has_space:
            # Once all of the log is checkpointed, the next commits reuse the log's space.
            self._checkpoint(db, apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _commit(self, db: apsw.Connection, batch: list[_PendingChange]) -> None:
        """Commits all changes in one transaction. If the transaction fails, commits each change alone, because a small
        change may fit on the disk where a large one does not."""
        try:
            self._transact(db, batch)
        except BaseException as error:
            full = is_full(db, error)
            self._roll_back(db)
            if any(pending.committed for pending in batch):
                raise  # a committed change must not be made again
            if len(batch) > 1:
                for pending in batch:
                    self._commit(db, [pending])
            else:
                batch[0].error = _as_registry_error(error, full=full)

    def _roll_back(self, db: apsw.Connection) -> None:
        with suppress(apsw.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")

    def _transact(self, db: apsw.Connection, batch: list[_PendingChange]) -> None:
        """Makes all changes in one transaction and commits it. Each of several changes has its own savepoint, so that a
        change that fails is rolled back alone. Raises an error only if the whole transaction fails."""
        self._sync_log_name(db)
        self._set_fsync(db, any(pending.durable for pending in batch))
        db.execute("BEGIN IMMEDIATE")
        before, self._rights_changed = self._version(), False
        several = len(batch) > 1
        for pending in batch:
            pending.error = None  # an earlier attempt, in a batch with others, may have set it
            if several:
                db.execute("SAVEPOINT change")
            try:
                pending.result = pending.change(db)
            except Exception as error:
                if isinstance(error, apsw.FullError | apsw.IOError | apsw.CantOpenError) or not db.in_transaction:
                    raise  # SQLite may have rolled back the whole batch
                if several:
                    db.execute("ROLLBACK TO change")
                pending.error = _as_registry_error(error)
            if several:
                db.execute("RELEASE change")
        if all(pending.error is not None for pending in batch):
            db.execute("ROLLBACK")
        else:
            self._system.commit(lambda: _execute_commit(db), durable=bool(self._fsync_enabled))
            for pending in batch:
                pending.committed = pending.error is None
            after = self._version()
            if not self._rights_changed and is_exactly_one_commit_later(before, after):
                self._versions_with_same_rights = before, after

    def _sync_log_name(self, db: apsw.Connection) -> None:
        """Syncs the directory before the first commit, so that the log's file name is durable. SQLite syncs the
        directory only if the connection that created the log is also the first to sync the log."""
        if not self._log_name_synced:
            db.execute("SELECT 1 FROM sqlite_schema").fetchall()  # makes SQLite open the log
            with as_storage_errors():
                sync_directory(self._system, self._layout.root)
            self._log_name_synced = True

    def _set_fsync(self, db: apsw.Connection, enabled: bool) -> None:
        """Switches the fsync at each commit on or off. A change that is not durable, such as the progress of an upload,
        is not worth an fsync of its own; the next commit with fsync also syncs the earlier ones."""
        if enabled is not self._fsync_enabled:
            db.pragma("synchronous", "FULL" if enabled else "NORMAL")
            self._fsync_enabled = enabled

    def _note_log_pages(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._log_pages = pages
        return apsw.SQLITE_OK

    def _note_changed_row(self, _kind: int, _database: str, table: str, _row: int) -> None:
        if table == RIGHTS_TABLE:
            self._rights_changed = True

    def _checkpoint_locked(self, db: apsw.Connection, lock: int) -> None:
        try:
            with Flock(lock):
                restart = self._log_pages >= RESTART_LOG_PAGES
                self._checkpoint(db, apsw.SQLITE_CHECKPOINT_RESTART if restart else apsw.SQLITE_CHECKPOINT_PASSIVE)
        except Exception as error:
            log.warning(
                "the metadata's log could not be checkpointed; the next commit tries again: %s", error, exc_info=error
            )

    def _checkpoint(self, db: apsw.Connection, mode: int) -> None:
        """Runs a checkpoint. The caller holds the lock. `mode`: one of `apsw.SQLITE_CHECKPOINT_*`. A failure is
        logged."""
        self._log_pages = 0

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
        except (apsw.Error, StorageFull) as error:
            # Nothing is lost: the changes are in the log.
            log.warning("the metadata's log could not be checkpointed; the next commit tries again: %s", error)


def _execute_commit(db: apsw.Connection) -> None:
    db.execute("COMMIT")


def _as_registry_error(error: BaseException, *, full: bool = False) -> RegistryError:
    """Returns `error` if it is a RegistryError, otherwise StorageFull if the disk is `full`, otherwise
    StorageFailed."""
    if isinstance(error, RegistryError):
        return error
    if full:
        return StorageFull()
    failed = StorageFailed("the registry's metadata failed; its log says how")
    failed.__cause__ = error  # the HTTP layer logs the cause
    return failed
