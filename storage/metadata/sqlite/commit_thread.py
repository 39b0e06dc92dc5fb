"""Commits all changes that a process makes to the metadata database, in one thread and in batches (`CommitThread`).

`CommitThread.run` queues a change and returns a future, which gets its result after the commit. If the change must
survive a power cut, the commit includes an fsync.

SQLite lets one connection write at a time. With SQLite's busy timeout alone, one of several writing processes can
starve for seconds. So each process holds an exclusive `flock` during its transaction, and the processes queue for this
lock. Changes that arrive while a transaction runs share the next transaction and its fsync.

SQLite commits by appending to a write-ahead log. A *checkpoint* copies the log into the database file. The commit
thread runs the checkpoints and holds the `flock` while they run. Usually a checkpoint runs after the results of a batch
are delivered, so that the batch does not wait for the checkpoint. On a full disk, it runs before the results are
delivered. A failed fsync can leave *gaps* in the log: parts that are not on the disk. The thread closes the gaps before
the next commit: it copies the log into the database file and empties the log
(`storage.metadata.sqlite.write_ahead_log`).

The *reserve* is a file that keeps disk space allocated (`storage.data_dir.reserve`). On a full disk, checkpoints and
changes that free space or revoke rights use this space. Changes that store content fail with StorageFull.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import threading
import time
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
from storage.data_dir.replaced_directory import OpenedDirectory
from storage.data_dir.reserve import Reserve, ReserveUse
from storage.data_dir.system import System
from storage.errors import RegistryError, StorageFailed, StorageFull
from storage.metadata.catalog import UNOBSERVED_COMMITS, CommitObserver
from storage.metadata.sqlite.cross_process_change_counter import is_exactly_one_commit_later
from storage.metadata.sqlite.database import connect, means_full_disk
from storage.metadata.sqlite.lock_watch import LockWatch
from storage.metadata.sqlite.write_ahead_log import CHECKPOINT_FAILED, WriteAheadLog

MAX_BATCH_CHANGES = 256
"""Largest number of changes in one transaction. Limits the time that the first change of a batch waits for the
commit."""
RIGHTS_TABLE = "access"
"""Table with the epoch: a number that every transaction that changes rights increments."""
log = logging.getLogger("storage.metadata")
T = TypeVar("T")
Change = Callable[[apsw.Connection], T]
"""Function that makes a change through the given connection, inside a transaction. Returns the result of the change."""


@dataclass(slots=True)
class _PendingChange:
    """A change whose outcome has not been delivered to its future.

    `change`, `durable` and `reserve_use` are the arguments of `CommitThread.run`; `future` is what `run` returned. At
    the latest attempt, `change` returned `result` or failed with `error`. `is_committed` is true once the transaction
    with the change is committed."""

    change: Change[Any]
    durable: bool
    reserve_use: ReserveUse
    future: UncancellableFuture[Any]
    result: Any = None
    error: BaseException | None = None
    is_committed: bool = False

    def fail(self, error: BaseException) -> None:
        """Sets the error of the change, unless the change was committed or has an error already."""
        if not self.is_committed and self.error is None:
            self.error = _as_registry_error(error)

    def deliver(self) -> None:
        """Gives the future its result or error. Does so in a callback on the event loop of the future, because the
        commit thread calls this method. Does nothing if the event loop is closed."""
        if self.error is None:
            set_outcome = partial(self.future.set_result, self.result)
        else:
            set_outcome = partial(self.future.set_exception, self.error)
        with suppress(RuntimeError):
            self.future.get_loop().call_soon_threadsafe(set_outcome)


class CommitThread:
    """Makes changes in the order in which `run` was called. All later changes of the process wait for a change, so a
    change must not wait for anything but the database."""

    def __init__(
        self,
        layout: Layout,
        system: System,
        read_version: Callable[[], object],
        reserve: Reserve,
        observer: CommitObserver = UNOBSERVED_COMMITS,
        directory: OpenedDirectory | None = None,
    ) -> None:
        """Starts the thread, which opens the database. Raises apsw.Error, OSError.

        - `read_version`: returns the data version, a value that every commit of any process changes.
        - `observer`: measures the changes.
        - `directory`: the data directory that this process has opened. None: the directory to which the path in
          `layout` leads now. Once the path leads to another directory, all changes are refused.

        The caller must not close `reserve`, or the connection that `read_version` uses, before `close` returns."""
        self._layout = layout
        self._system = system
        self._read_version = read_version
        self._reserve = reserve
        self._observer = observer
        self._directory = directory or OpenedDirectory(layout)
        self._rights_changed = False
        self._versions_with_same_rights: tuple[object, object] = (None, None)
        """Data versions before and after this thread's last commit that changed no rights, for `has_same_rights`."""
        self._queue: queue.SimpleQueue[_PendingChange | None] = queue.SimpleQueue()
        self._wal = WriteAheadLog(layout.metadata, system, reserve)
        self._fsync_enabled: bool | None = None  # None: `_set_fsync` was not called yet
        self._log_name_is_durable = False  # whether the file name of the write-ahead log survives a power cut
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(opened,), name="metadata", daemon=True)
        self._thread.start()
        opened.result()  # waits until the database is open; raises the error if it cannot be opened

    def run(
        self, change: Change[T], *, durable: bool = True, reserve_use: ReserveUse = ReserveUse.NONE
    ) -> UncancellableFuture[T]:
        """Queues `change`, to be called in a transaction. Returns a future that gets the result of `change` once the
        transaction is committed.

        `durable`: whether the commit must survive a power cut. `reserve_use`: how much of the reserve the change may
        use on a full disk (`ReserveUse.NONE` for changes that store content).

        A change that fails is rolled back, and the future raises the RegistryError that `change` raised, StorageFull,
        DataDirectoryReplaced, or, for any other error, StorageFailed. If the task that awaits the future is cancelled,
        the change still runs to its end, and only then the task is cancelled."""
        future: UncancellableFuture[T] = UncancellableFuture(loop=asyncio.get_running_loop())
        self._observer.on_queued(future)
        self._queue.put(_PendingChange(change, durable, reserve_use, future))
        return future

    def has_same_rights(self, before: object, after: object) -> bool:
        """Returns True if rights that were read at the data version `before` are known to be valid at the data version
        `after`. The thread knows this about two versions only: the versions before and after its newest commit that
        changed no rights and was the only commit between them. For all other versions, returns False, even if the
        rights did not change."""
        return self._versions_with_same_rights == (before, after)

    def close(self) -> None:
        """Waits until all queued changes are made, the thread has ended and the connection is closed."""
        self._queue.put(None)
        self._thread.join()

    def _work(self, opened: Future[None]) -> None:
        """The main function of the thread. Opens the database, and commits batches until `close` is called. `opened`
        gets a result once the database is open, or the error if it cannot be opened."""
        try:
            db = connect(self._layout.metadata)
            lock_fd = self._system.open(self._layout.metadata_lock, os.O_RDWR | os.O_CREAT)
        except BaseException as error:
            opened.set_exception(error)
            return
        db.set_wal_hook(self._wal.note_pages)
        db.set_update_hook(self._note_changed_row)
        opened.set_result(None)
        watch = LockWatch(lock_fd)
        try:
            while batch := self._next_batch():
                try:
                    queued_at = time.monotonic()
                    watch.begin_wait()
                    with Flock(lock_fd):
                        watch.end_wait()
                        locked_at = time.monotonic()
                        self._commit_with_reserve(db, batch)
                    self._observer.on_commit(len(batch), locked_at - queued_at, time.monotonic() - locked_at)
                except BaseException as error:
                    watch.end_wait()
                    # The lock failed, or the error is unexpected. The thread continues, because only this thread can
                    # make the next changes of the process.
                    log.warning("a transaction with changes of the metadata failed", exc_info=error)
                    self._roll_back(db)
                    for pending in batch:
                        pending.fail(error)
                # Delivery wakes the event loop, which then competes with this thread for Python's global interpreter
                # lock. The file lock is released before, so that other processes do not wait meanwhile.
                for pending in batch:
                    pending.deliver()
                if self._wal.is_long:
                    self._lock_and_checkpoint(db, lock_fd)
        finally:
            watch.close()
            self._close_gaps(db, lock_fd)
            db.close()
            os.close(lock_fd)

    def _next_batch(self) -> list[_PendingChange]:
        """Waits for a queued change. Returns this change and the changes that are queued behind it, up to a total of
        `MAX_BATCH_CHANGES`. Returns an empty list if `close` was called and no change is queued."""
        pending = self._queue.get()
        if pending is None:
            return []
        batch = [pending]
        with suppress(queue.Empty):
            while len(batch) < MAX_BATCH_CHANGES:
                pending = self._queue.get_nowait()
                if pending is None:  # `close` was called: the next call of this method returns an empty list
                    self._queue.put(None)
                    break
                batch.append(pending)
        return batch

    def _commit_with_reserve(self, db: apsw.Connection, batch: list[_PendingChange]) -> None:
        """Commits the batch. The disk counts as full if the reserve does not have its full size and cannot be restored
        now.

        - If the disk is full, refuses the changes that must not use the reserve.
        - If the commit finds no space, frees a part of the reserve and repeats the changes that may use the reserve.
        - In both cases, runs a checkpoint after the commits, unless it has refused all changes."""
        disk_is_full = not (self._reserve.is_whole or self._reserve.restore())
        uncommitted = batch
        if disk_is_full:
            for pending in batch:
                pending.error = None if self._reserve.allows(pending.reserve_use) else StorageFull()
            uncommitted = [pending for pending in batch if pending.error is None]
            if not uncommitted:
                return

        def attempt() -> None:
            nonlocal uncommitted
            self._commit(db, uncommitted)
            uncommitted = [
                pending
                for pending in uncommitted
                if pending.reserve_use is not ReserveUse.NONE and isinstance(pending.error, StorageFull)
            ]
            if uncommitted:
                raise StorageFull

        try:
            attempt()
        except StorageFull:
            disk_is_full = True
            with suppress(StorageFull):
                # Frees the reserve part by part. Calls `attempt` after each part, until an attempt succeeds or no part
                # is left.
                self._reserve.spend(attempt, StorageFull)
        if disk_is_full:
            # After a checkpoint has copied the whole log, the next commits overwrite the log and need no new space.
            self._wal.checkpoint(db)

    def _commit(self, db: apsw.Connection, batch: list[_PendingChange]) -> None:
        """Commits all changes in one transaction. If the transaction fails, commits each change in a transaction of its
        own, because the disk may have space for some of the changes. If the error comes before the first change, all
        changes fail. Sets the errors of the changes that failed. Raises an error only if it occurs after a commit."""
        try:
            self._transact(db, batch)
        except BaseException as error:
            is_disk_full = means_full_disk(db, error)  # before the rollback, which replaces the last error of `db`
            self._roll_back(db)
            if any(pending.is_committed for pending in batch):
                raise  # a committed change must not be made again
            if isinstance(error, StorageFailed | StorageFull):  # raised before the first change: all would fail again
                for pending in batch:
                    pending.error = error
            elif len(batch) > 1:
                for pending in batch:
                    self._commit(db, [pending])
            else:
                batch[0].error = _as_registry_error(error, is_disk_full=is_disk_full)

    def _roll_back(self, db: apsw.Connection) -> None:
        with suppress(apsw.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")

    def _transact(self, db: apsw.Connection, batch: list[_PendingChange]) -> None:
        """Makes all changes in one transaction and commits it. If there are several changes, each has a savepoint, so
        that a change that fails is rolled back alone. Raises an error only if the whole transaction fails."""
        # Checks that the path still leads to the opened data directory. A push writes its files by path before this
        # check. If an operator replaces the directory during the push, the files can be in the new directory, but the
        # commit would go to the old database. A check at the beginning of the push would be too early to notice this.
        self._directory.check()
        self._make_log_name_durable(db)
        self._wal.close_gaps(db)
        self._set_fsync(db, any(pending.durable for pending in batch))
        db.execute("BEGIN IMMEDIATE")
        before, self._rights_changed = self._read_version(), False  # `_note_changed_row` sets `_rights_changed` to True
        has_several = len(batch) > 1
        for pending in batch:
            pending.error = None  # an earlier attempt may have set it
            if has_several:
                db.execute("SAVEPOINT change")
            try:
                pending.result = pending.change(db)
            except Exception as error:
                if isinstance(error, apsw.FullError | apsw.IOError | apsw.CantOpenError) or not db.in_transaction:
                    raise  # SQLite may have rolled back the whole batch
                if has_several:
                    db.execute("ROLLBACK TO change")
                pending.error = _as_registry_error(error)
            if has_several:
                db.execute("RELEASE change")
        if all(pending.error is not None for pending in batch):
            db.execute("ROLLBACK")
        else:
            try:
                self._system.commit(lambda: _execute_commit(db), durable=bool(self._fsync_enabled))
            except apsw.Error as error:
                self._wal.note_error(error)
                raise
            for pending in batch:
                pending.is_committed = pending.error is None
            after = self._read_version()
            if not self._rights_changed and is_exactly_one_commit_later(before, after):
                self._versions_with_same_rights = before, after

    def _make_log_name_durable(self, db: apsw.Connection) -> None:
        """Before the first commit, syncs the directory, so that the log's file name survives a power cut. SQLite itself
        does this only if the connection that created the log is also the first to sync it."""
        if not self._log_name_is_durable:
            db.execute("SELECT 1 FROM sqlite_schema").fetchall()  # makes SQLite open the log
            with as_storage_errors():
                sync_directory(self._system, self._layout.root)
            self._log_name_is_durable = True

    def _set_fsync(self, db: apsw.Connection, enabled: bool) -> None:
        """Switches the fsync at each commit on or off. A change that a power cut may undo, such as the progress of an
        upload, needs no fsync. A commit without fsync becomes durable with the next commit that has an fsync."""
        if enabled is not self._fsync_enabled:
            db.pragma("synchronous", "FULL" if enabled else "NORMAL")
            self._fsync_enabled = enabled

    def _note_changed_row(self, _kind: int, _database: str, table: str, _row: int) -> None:
        """SQLite calls this for each row that a change inserts, updates or deletes."""
        if table == RIGHTS_TABLE:
            self._rights_changed = True

    def _close_gaps(self, db: apsw.Connection, lock_fd: int) -> None:
        """Closes the gaps of the log before the thread ends, because other processes may not know of the gaps. Logs
        errors instead of raising them."""
        if not self._wal.may_have_gaps:
            return
        try:
            with Flock(lock_fd):
                self._wal.close_gaps_at_end(db)
        except Exception as error:
            log.error(
                "check the disk: after a disk error, this process could not write the newest changes again before its "
                "end, and a power cut may lose some of these changes: %s",
                error,
            )

    def _lock_and_checkpoint(self, db: apsw.Connection, lock_fd: int) -> None:
        """Locks the file `lock_fd` and runs a checkpoint. Logs errors of both steps instead of raising them."""
        try:
            with Flock(lock_fd):
                self._wal.shorten(db)
        except Exception as error:
            log.warning(CHECKPOINT_FAILED, error, exc_info=error)


def _execute_commit(db: apsw.Connection) -> None:
    db.execute("COMMIT")


def _as_registry_error(error: BaseException, *, is_disk_full: bool = False) -> RegistryError:
    """Converts an error to a RegistryError. Returns a RegistryError as it is. For any other error, returns StorageFull
    if `is_disk_full` is true, and StorageFailed if it is false."""
    if isinstance(error, RegistryError):
        return error
    if is_disk_full:
        return StorageFull()
    failed = StorageFailed("the registry's metadata failed; the server's log says why")
    failed.__cause__ = error  # the HTTP layer logs the cause
    return failed
