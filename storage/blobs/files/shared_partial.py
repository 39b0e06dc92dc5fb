"""A partial blob as one process sees it: two open files, shared by all who asked for it here."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.blobs.files.extents import Extent, Extents
from storage.blobs.files.partial_files import (
    OpenedPartial,
    PartialPaths,
    close_data,
    drop_partial,
    is_named,
    write_progress,
)
from storage.blobs.files.partial_flags import PartialFlags
from storage.blobs.files.partial_state import (
    RECORD_SIZE,
    PartialStatus,
    Progress,
    encode_failures,
    read_failures,
    read_progress,
)
from storage.blobs.files.partial_waiters import PartialWaiters
from storage.blobs.files.prefix_digest import PrefixDigest
from storage.content import PartialFailures
from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.durable_files import sync_directory, write_fully
from storage.data_dir.locks import is_byte_locked, try_lock_byte, unlock_byte
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.errors import DigestInvalid, PartialLost, SizeInvalid, StorageFull
from storage.names import Digest


class SharedPartial:
    """`owner` is whoever owns the partial in this process, any object. What is in memory is the truth while there is
    one, else what `look` last found. The files are open while somebody uses them: `retain` and `release`.

    Two locks: `_lock` for what is in memory, held for no longer than that takes; `_publishing` around writing the state
    file, where the disk may have to be waited for, and the event loop must not.
    """

    def __init__(
        self,
        system: System,
        reserve: Reserve,
        threads: Executor,
        watch: PartialWaiters,
        names: PartialPaths,
        digest: Digest,
        opened: OpenedPartial,
    ) -> None:
        self.digest = digest
        self.size = opened.progress.size
        self.data = opened.data
        self.is_notified = False
        self.refreshed_at = 0.0
        self.marks = PartialFlags(opened.state)
        self._system = system
        self._reserve = reserve
        self._threads = threads
        self._watch = watch
        self._names = names
        self._state = opened.state
        self._boot = opened.progress.boot
        self._status = opened.progress.status
        self._extents = Extents(opened.progress.extents)
        self._coming = Extents()
        """What is being written."""
        self._owner: object | None = None
        self._leaving = False
        self._at_work = 0
        self._uses = 0
        self._orphan = False
        self._version = self._published = 0
        self._lock = threading.Lock()
        self._publishing = threading.Lock()
        self._hashed = self._start_digest()

    def _start_digest(self) -> PrefixDigest:
        return PrefixDigest(
            self._system, self._threads, self.data, self.size, self.digest.algorithm, self._prefix, self._run_kept
        )

    # Who uses it, and whose it is.

    @property
    def open(self) -> bool:
        return self._state >= 0

    def retain(self) -> bool:
        """One more uses the files. False: they are closed."""
        with self._lock:
            if self._state < 0:
                return False
            self._uses += 1
            return True

    def release(self) -> None:
        with self._lock:
            self._uses -= 1
            if self._uses:
                return
            state, self._state = self._state, -1
        os.close(state)
        close_data(self._threads, self.data)

    def _run_kept(self, step: Callable[[], None]) -> None:
        if self.retain():
            try:
                step()
            finally:
                self.release()

    @property
    def running(self) -> bool:
        return self._status is PartialStatus.RUNNING

    @property
    def filled_here(self) -> bool:
        return self._owner is not None

    def is_owner(self, who: object) -> bool:
        return self._owner is who and not self._leaving and self._status is PartialStatus.RUNNING

    def own(self, who: object, *, locked: bool = False) -> bool:
        """Makes `who` the owner where there is none; `locked`: the lock is held already. Raises OSError."""
        with self._lock:
            if self._status is not PartialStatus.RUNNING:
                return False
            if self._owner is not None:
                return self._owner is who and not self._leaving
            if not locked and not (try_lock_byte(self._state) and self._take_over()):
                return False
            self._owner, self._orphan = who, False
            # Anew: what this process hashed before may have been written once more since, by another owner.
            self._hashed = self._start_digest()
        self._hashed.notify()
        return True

    def _take_over(self) -> bool:
        """With the file's lock just taken: goes on from what the last owner told, if the file still counts."""
        progress = read_progress(self._state)
        if progress is not None and progress.status is not PartialStatus.RUNNING:
            self._status = progress.status
        elif progress is None or not is_named(self._state, self._names.state):
            self._status = PartialStatus.DROPPED
        if progress is None or self._status is not PartialStatus.RUNNING:
            unlock_byte(self._state)
            return False
        self._extents = Extents(progress.extents)
        return True

    def let_go(self, who: object) -> None:
        """`who` is the owner no more, once what it is doing has ended."""
        with self._lock:
            if self._owner is not who:
                return
            self._leaving = True
            if self._at_work == 0:
                self._free()

    def _free(self) -> None:
        self._owner, self._leaving = None, False
        self._orphan = True
        self._hashed.stop()
        self.marks.end()
        with suppress(OSError):
            unlock_byte(self._state)
        self._watch.notify(self)

    @contextmanager
    def working(self, who: object) -> Iterator[None]:
        """A step of the owner's. Raises PartialLost. The place stays the owner's until the step has ended."""
        with self._lock:
            if self._owner is not who or self._leaving or self._status is not PartialStatus.RUNNING:
                raise PartialLost("the blob on its way in was given up here")
            self._at_work += 1
            self._uses += 1
        try:
            yield
        finally:
            with self._lock:
                self._at_work -= 1
                if self._leaving and self._at_work == 0:
                    self._free()
            self.release()

    # What is there.

    def look(self) -> None:
        """Learns what the owner in another process has done. Raises StorageFailed."""
        if self._owner is not None:
            return
        with as_storage_errors():
            orphan = not is_byte_locked(self._state)  # asked first: what an owner told before it went is read then
            progress = read_progress(self._state)
        with self._lock:
            if self._owner is not None:
                return
            self._orphan = orphan
            if progress is not None and self._status is PartialStatus.RUNNING:
                self._status = progress.status
                if progress.status is PartialStatus.RUNNING:
                    self._extents = Extents(progress.extents)

    def there(self, at: int) -> int | None:
        """How far the bytes reach from `at`; at `size`: whether the blob is content. None: not there yet. Raises
        PartialLost, DigestInvalid."""
        with self._lock:
            if self._status is PartialStatus.COMMITTED:
                return self.size
            if self._status is PartialStatus.BAD:
                raise DigestInvalid("the upstream sent other bytes than the digest says", {"expected": self.digest})
            if (reached := self._extents.reach(at)) > at:
                return reached
            if self._orphan or self._status is PartialStatus.DROPPED:
                raise PartialLost()
            return None

    async def wait(self, at: int) -> int:
        if not self.retain():
            raise PartialLost("the blob on its way in was let go here")
        try:
            self.look()
            if (reached := self.there(at)) is not None:
                return reached
            return await self._watch.wait(self, at)
        finally:
            self.release()

    @property
    def owner_failures(self) -> PartialFailures:
        """Raises StorageFailed."""
        with as_storage_errors():
            return read_failures(self._state)

    def missing(self) -> list[Extent]:
        """Raises StorageFailed."""
        self.look()
        with self._lock:
            return [] if self._status is PartialStatus.COMMITTED else self._extents.gaps(0, self.size)

    def _prefix(self) -> int:
        with self._lock:
            return 0 if self._owner is None else self._extents.reach(0)

    # The owner's steps. They block; call them inside `working`.

    def write_at(self, offset: int, data: memoryview) -> None:
        """Bytes that are there already, or are being written by somebody else, stay as they are: nobody's bytes change
        after they were read. Raises SizeInvalid, StorageFull, StorageFailed."""
        stop = offset + len(data)
        if offset < 0 or stop > self.size:
            raise SizeInvalid(f"the blob has {self.size} bytes; {offset} to {stop} lie outside")
        with self._lock:
            wanted = [gap for part in self._extents.gaps(offset, stop) for gap in self._coming.gaps(*part)]
            for part in wanted:
                self._coming.add(*part)
        try:
            self._reserve.require_room()
            with as_storage_errors():
                self._write(offset, data, wanted)
                self._publish()
        except StorageFull:
            self.drop(PartialStatus.DROPPED)  # the first bytes to go, so that others can work
            raise
        self._watch.notify(self)
        self._hashed.notify()

    def _write(self, offset: int, data: memoryview, parts: list[Extent]) -> None:
        done = False
        try:
            for start, stop in parts:
                write_fully(self._system, self.data, data[start - offset : stop - offset], start)
            done = True
        finally:
            with self._lock:
                for part in parts:
                    self._coming.remove(*part)
                    if done:
                        self._extents.add(*part)
                        self._version += 1

    def _publish(self) -> None:
        """Tells the other processes. Of several that come together, one tells for all."""
        wanted = self._version
        with self._publishing:
            if self._published >= wanted:
                return
            with self._lock:
                version = self._version
                progress = Progress(self._boot, self.size, self._status, list(self._extents))
            write_progress(self._system, self._state, progress)
            self._published = version

    def report_failure(self, reason: str) -> None:
        """Raises OSError."""
        told = PartialFailures(read_failures(self._state).times + 1, reason)
        write_fully(self._system, self._state, memoryview(encode_failures(told)), RECORD_SIZE)

    def finish_digest(self) -> Digest:
        """Of all the bytes. Raises OSError, also where the file has lost some since they were read."""
        digest = self._hashed.finish()
        if (length := os.fstat(self.data).st_size) != self.size:
            raise OSError(f"the file has {length} bytes, not {self.size}")
        return digest

    def sync(self) -> None:
        self._system.sync(self.data)

    def publish(self, target: Path) -> None:
        """Moves the synced bytes to `target`, durably. An owner that was killed then may have done it before."""
        try:
            self._system.rename(self._names.data, target)
        except FileNotFoundError:
            if not is_named(self.data, target):
                raise
        sync_directory(self._system, target.parent)

    def drop(self, why: PartialStatus) -> None:
        """What became of it, told to all; nothing of it stays in `partials/`. Raises nothing."""
        with self._publishing:
            with self._lock:
                if self._status is not PartialStatus.RUNNING:
                    return
                self._status = why
                self._version += 1
                self._published = self._version
            with suppress(OSError):
                drop_partial(self._system, self._names, self._state, why)
        self._watch.notify(self)
