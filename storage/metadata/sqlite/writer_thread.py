"""The only writer of metadata in a process: a thread that commits queued changes in batches.

SQLite lets one connection write at a time. With its busy timeout alone, a writer among several processes can starve for
seconds; with one `flock` around each transaction, the processes alternate. Changes that are queued meanwhile share one
transaction and one fsync. Checkpoints run in this thread with the same lock, so that none delays a commit unexpectedly.

On a full disk, changes that free space or take rights away use the reserve (`storage.data_dir.reserve`), and so do
checkpoints; changes that store something are refused.
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
from storage.metadata.sqlite.data_version import is_next
from storage.metadata.sqlite.database import connect, is_full

BATCH = 256
CHECKPOINT_PAGES = 1000
RESTART_PAGES = 16_000
RIGHTS_TABLE = "access"
"""Table with the epoch, which every change of rights increments in its own transaction
(`storage.metadata.sqlite.access.account_table`)."""
log = logging.getLogger("storage.metadata")
T = TypeVar("T")
Change = Callable[[apsw.Connection], T]


@dataclass(slots=True)
class _Waiting:
    change: Change[Any]
    durable: bool
    need: ReserveUse
    done: UncancellableFuture[Any]
    result: Any = None
    error: BaseException | None = None
    committed: bool = False

    def fail(self, error: BaseException) -> None:
        """Sets the error of a change that was not committed and has no error of its own."""
        if not self.committed and self.error is None:
            self.error = _as_registry_error(error)

    def tell(self) -> None:
        """Delivers the result to the event loop, unless that has ended. Called in the writer's thread."""
        if self.error is None:
            end = partial(self.done.set_result, self.result)
        else:
            end = partial(self.done.set_exception, self.error)
        with suppress(RuntimeError):
            self.done.get_loop().call_soon_threadsafe(end)


class WriterThread:
    """Runs changes in order. A change is a function of the connection and never waits for anything."""

    def __init__(self, layout: Layout, system: System, version: Callable[[], object], reserve: Reserve) -> None:
        """`version` returns the database's data version. It and `reserve` must stay usable until `close`."""
        self._layout = layout
        self._system = system
        self._version = version
        self._reserve = reserve
        self._rights_changed = False
        self._same_rights: tuple[object, object] = (None, None)
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._pages = 0
        self._full: bool | None = None
        self._named = False
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(opened,), name="metadata", daemon=True)
        self._thread.start()
        opened.result()

    def run(
        self, change: Change[T], *, durable: bool = True, need: ReserveUse = ReserveUse.GROWTH
    ) -> UncancellableFuture[T]:
        """Runs `change` in a transaction and returns its result once that is committed. `durable`: the commit survives
        a power cut. `need`: how the change may use the reserve of a full disk. Raises what the change raises, and then
        nothing of it is kept; StorageFull, StorageFailed. A cancellation takes effect once the change is made."""
        done: UncancellableFuture[T] = UncancellableFuture(loop=asyncio.get_running_loop())
        self._queue.put(_Waiting(change, durable, need, done))
        return done

    def has_same_rights(self, before: object, after: object) -> bool:
        """Returns whether the only difference between two data versions is one commit of this writer that changed no
        rights. Rights that were read at `before` are then still right."""
        return self._same_rights == (before, after)

    def close(self) -> None:
        """Makes the queued changes, then ends the thread."""
        self._queue.put(None)
        self._thread.join()

    def _work(self, opened: Future[None]) -> None:
        try:
            db = connect(self._layout.metadata)
            lock = self._system.open(self._layout.metadata_lock, os.O_RDWR | os.O_CREAT)
        except BaseException as error:
            opened.set_exception(error)
            return
        db.set_wal_hook(self._note_pages)
        db.set_update_hook(self._note_row)
        opened.set_result(None)
        try:
            while batch := self._next_batch():
                try:
                    with Flock(lock):
                        self._commit_with_room(db, batch)
                except (
                    BaseException
                ) as error:  # from the lock, or unexpected: the thread must go on, or nothing could be written
                    log.warning("a change of the metadata was broken off", exc_info=error)
                    self._roll_back(db)
                    for waiting in batch:
                        waiting.fail(error)
                # Last, since the event loop then competes with this thread for the interpreter's lock.
                for waiting in batch:
                    waiting.tell()
                if self._pages >= CHECKPOINT_PAGES:
                    self._checkpoint_locked(db, lock)
        finally:
            db.close()
            os.close(lock)

    def _next_batch(self) -> list[_Waiting]:
        first = self._queue.get()
        if first is None:
            return []
        batch = [first]
        with suppress(queue.Empty):
            while len(batch) < BATCH:
                following = self._queue.get_nowait()
                if following is None:
                    self._queue.put(None)
                    break
                batch.append(following)
        return batch

    def _commit_with_room(self, db: apsw.Connection, batch: list[_Waiting]) -> None:
        """Commits the batch. Tries changes that find no space, and may use the reserve, again with the reserve."""
        whole = self._reserve.is_whole or self._reserve.restore()
        left = batch
        if not whole:
            for waiting in batch:
                waiting.error = None if self._reserve.allows(waiting.need) else StorageFull()
            left = [waiting for waiting in batch if waiting.error is None]
            if not left:
                return

        def attempt() -> None:
            nonlocal left
            self._commit(db, left)
            left = [waiting for waiting in left if waiting.need and isinstance(waiting.error, StorageFull)]
            if left:
                raise StorageFull

        try:
            attempt()
        except StorageFull:
            whole = False
            with suppress(StorageFull):
                self._reserve.spend(attempt, StorageFull)
        if not whole:
            # Once all of the log is checkpointed, the next commits reuse its space.
            self._checkpoint(db, apsw.SQLITE_CHECKPOINT_PASSIVE)

    def _commit(self, db: apsw.Connection, batch: list[_Waiting]) -> None:
        """Commits all changes in one transaction, each in its own savepoint if there are several. If that fails,
        commits each alone: a small change may fit where a large one does not."""
        try:
            self._transact(db, batch)
        except BaseException as error:
            full = is_full(db, error)
            self._roll_back(db)
            if any(waiting.committed for waiting in batch):
                raise  # a committed change must not be made again
            if len(batch) > 1:
                for waiting in batch:
                    self._commit(db, [waiting])
            else:
                batch[0].error = _as_registry_error(error, full=full)

    def _roll_back(self, db: apsw.Connection) -> None:
        with suppress(apsw.Error):
            if db.in_transaction:
                db.execute("ROLLBACK")

    def _transact(self, db: apsw.Connection, batch: list[_Waiting]) -> None:
        self._name_log(db)
        self._sync_commits(db, any(waiting.durable for waiting in batch))
        db.execute("BEGIN IMMEDIATE")
        before, self._rights_changed = self._version(), False
        several = len(batch) > 1
        for waiting in batch:
            waiting.error = None  # from an attempt together with others
            if several:
                db.execute("SAVEPOINT change")
            try:
                waiting.result = waiting.change(db)
            except Exception as error:
                if isinstance(error, apsw.FullError | apsw.IOError | apsw.CantOpenError) or not db.in_transaction:
                    raise  # SQLite may have rolled back the whole batch
                if several:
                    db.execute("ROLLBACK TO change")
                waiting.error = _as_registry_error(error)
            if several:
                db.execute("RELEASE change")
        if all(waiting.error is not None for waiting in batch):
            db.execute("ROLLBACK")
        else:
            self._system.commit(lambda: _end(db), durable=bool(self._full))
            for waiting in batch:
                waiting.committed = waiting.error is None
            after = self._version()
            if not self._rights_changed and is_next(before, after):
                self._same_rights = before, after

    def _name_log(self, db: apsw.Connection) -> None:
        """Makes the name of the WAL file durable, before the first commit. SQLite does so only if the connection that
        created the file is also the first to sync it."""
        if not self._named:
            db.execute("SELECT 1 FROM sqlite_schema").fetchall()  # opens the WAL
            with as_storage_errors():
                sync_directory(self._system, self._layout.root)
            self._named = True

    def _sync_commits(self, db: apsw.Connection, full: bool) -> None:
        """Switches fsync at commits on or off. The progress of an upload need not survive a power cut and is not worth
        an fsync; the next full commit syncs it as well."""
        if full is not self._full:
            db.pragma("synchronous", "FULL" if full else "NORMAL")
            self._full = full

    def _note_pages(self, _db: apsw.Connection, _name: str, pages: int) -> int:
        self._pages = pages
        return apsw.SQLITE_OK

    def _note_row(self, _kind: int, _database: str, table: str, _row: int) -> None:
        if table == RIGHTS_TABLE:
            self._rights_changed = True

    def _checkpoint_locked(self, db: apsw.Connection, lock: int) -> None:
        try:
            with Flock(lock):
                restart = self._pages >= RESTART_PAGES
                self._checkpoint(db, apsw.SQLITE_CHECKPOINT_RESTART if restart else apsw.SQLITE_CHECKPOINT_PASSIVE)
        except Exception as error:
            log.warning("the metadata could not be checkpointed: %s", error, exc_info=error)

    def _checkpoint(self, db: apsw.Connection, mode: int) -> None:
        """Runs a checkpoint, with the lock held."""
        self._pages = 0

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
            # Nothing is lost: the changes are in the WAL, and the next commit tries again.
            log.warning("the metadata could not be checkpointed: %s", error)


def _end(db: apsw.Connection) -> None:
    db.execute("COMMIT")


def _as_registry_error(error: BaseException, *, full: bool = False) -> RegistryError:
    if isinstance(error, RegistryError):
        return error
    if full:
        return StorageFull()
    failed = StorageFailed("the registry's metadata failed; its log says how")
    failed.__cause__ = error  # for the log: the HTTP layer logs it once
    return failed
