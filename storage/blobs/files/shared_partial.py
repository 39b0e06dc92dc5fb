"""A partial blob in one process (`SharedPartial`): two open files, shared by all its users there."""

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
    """The owner in this process is any object. While there is one, the extents in memory are right; otherwise they are
    those that `refresh` read last. The files stay open between `retain` and `release`.

    Two locks: `_lock` guards memory and is never held across a system call that may wait; `_publishing` is held while
    the state file is written, which may wait for the disk, so the event loop never takes it.
    """

    def __init__(
        self,
        system: System,
        reserve: Reserve,
        threads: Executor,
        waiters: PartialWaiters,
        paths: PartialPaths,
        digest: Digest,
        opened: OpenedPartial,
    ) -> None:
        self.digest = digest
        self.size = opened.progress.size
        self.data = opened.data
        self.is_notified = False
        self.refreshed_at = 0.0
        self.flags = PartialFlags(opened.state)
        self._system = system
        self._reserve = reserve
        self._threads = threads
        self._waiters = waiters
        self._paths = paths
        self._state = opened.state
        self._boot = opened.progress.boot
        self._status = opened.progress.status
        self._extents = Extents(opened.progress.extents)
        self._coming = Extents()
        """Bytes that are being written."""
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

    # Users and owner

    @property
    def open(self) -> bool:
        """Whether the files are open."""
        return self._state >= 0

    def retain(self) -> bool:
        """Adds a user of the files. Returns False if they are closed."""
        with self._lock:
            if self._state < 0:
                return False
            self._uses += 1
            return True

    def release(self) -> None:
        """Removes a user; the last one closes the files."""
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
        """Whether the partial is neither committed nor dropped."""
        return self._status is PartialStatus.RUNNING

    @property
    def filled_here(self) -> bool:
        return self._owner is not None

    def is_owner(self, who: object) -> bool:
        """Returns whether `who` owns the partial."""
        return self._owner is who and not self._leaving and self._status is PartialStatus.RUNNING

    def own(self, who: object, *, locked: bool = False) -> bool:
        """Makes `who` the owner if there is none, and returns whether it is the owner now. `locked`: this opening has
        the file's lock already. Raises OSError."""
        with self._lock:
            if self._status is not PartialStatus.RUNNING:
                return False
            if self._owner is not None:
                return self._owner is who and not self._leaving
            if not locked and not (try_lock_byte(self._state) and self._take_over()):
                return False
            self._owner, self._orphan = who, False
            # Start over: another owner may since have written the bytes that this process hashed.
            self._hashed = self._start_digest()
        self._hashed.notify()
        return True

    def _take_over(self) -> bool:
        """Takes the last owner's progress, with the file's lock just taken. Releases the lock and returns False if the
        partial was committed or dropped."""
        progress = read_progress(self._state)
        if progress is not None and progress.status is not PartialStatus.RUNNING:
            self._status = progress.status
        elif progress is None or not is_named(self._state, self._paths.state):
            self._status = PartialStatus.DROPPED
        if progress is None or self._status is not PartialStatus.RUNNING:
            unlock_byte(self._state)
            return False
        self._extents = Extents(progress.extents)
        return True

    def disown(self, who: object) -> None:
        """Ends the ownership of `who`, once its running steps have ended."""
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
        self.flags.end()
        with suppress(OSError):
            unlock_byte(self._state)
        self._waiters.notify(self)

    @contextmanager
    def owner_step(self, who: object) -> Iterator[None]:
        """Runs a step of the owner, which stays the owner until the step has ended. Raises PartialLost if `who` is not
        the owner."""
        with self._lock:
            if self._owner is not who or self._leaving or self._status is not PartialStatus.RUNNING:
                raise PartialLost("this process does not own the partial blob any more")
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

    # Bytes that are there

    def refresh(self) -> None:
        """Reads the progress that an owner in another process has stored. Raises StorageFailed."""
        if self._owner is not None:
            return
        with as_storage_errors():
            orphan = not is_byte_locked(self._state)  # first, so that the last progress of an owner that left is read
            progress = read_progress(self._state)
        with self._lock:
            if self._owner is not None:
                return
            self._orphan = orphan
            if progress is not None and self._status is PartialStatus.RUNNING:
                self._status = progress.status
                if progress.status is PartialStatus.RUNNING:
                    self._extents = Extents(progress.extents)

    def available_from(self, at: int) -> int | None:
        """Returns how far the bytes reach from `at`; `size` once the blob is committed; None if the byte is not there
        yet. Raises PartialLost, DigestInvalid."""
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
        """Waits until `available_from(at)` has an answer. Raises PartialLost, DigestInvalid, StorageFailed."""
        if not self.retain():
            raise PartialLost("this process has released the partial blob")
        try:
            self.refresh()
            if (reached := self.available_from(at)) is not None:
                return reached
            return await self._waiters.wait(self, at)
        finally:
            self.release()

    @property
    def owner_failures(self) -> PartialFailures:
        """Failures that owners have reported. Raises StorageFailed."""
        with as_storage_errors():
            return read_failures(self._state)

    def missing(self) -> list[Extent]:
        """Returns the gaps. Raises StorageFailed."""
        self.refresh()
        with self._lock:
            return [] if self._status is PartialStatus.COMMITTED else self._extents.gaps(0, self.size)

    def _prefix(self) -> int:
        with self._lock:
            return 0 if self._owner is None else self._extents.reach(0)

    # Steps of the owner. They block; call them inside `owner_step`.

    def write_at(self, offset: int, data: memoryview) -> None:
        """Writes the bytes that are neither there nor being written by another thread: bytes never change after they
        were read. Raises SizeInvalid, StorageFull, StorageFailed."""
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
            self.drop(PartialStatus.DROPPED)  # to free space for other requests
            raise
        self._waiters.notify(self)
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
        """Stores the progress for other processes. Of several threads that come together, one stores it for all."""
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
        """Stores one more failure. Raises OSError."""
        failures = PartialFailures(read_failures(self._state).times + 1, reason)
        write_fully(self._system, self._state, memoryview(encode_failures(failures)), RECORD_SIZE)

    def finish_digest(self) -> Digest:
        """Returns the digest of all bytes. Raises OSError, also if the file was truncated since they were read."""
        digest = self._hashed.finish()
        if (length := os.fstat(self.data).st_size) != self.size:
            raise OSError(f"the file has {length} bytes, not {self.size}")
        return digest

    def sync(self) -> None:
        """Makes the bytes durable. Raises OSError."""
        self._system.sync(self.data)

    def publish(self, target: Path) -> None:
        """Moves the synced file to `target`, durably. A former owner that was killed may have moved it already."""
        try:
            self._system.rename(self._paths.data, target)
        except FileNotFoundError:
            if not is_named(self.data, target):
                raise
        sync_directory(self._system, target.parent)

    def drop(self, why: PartialStatus) -> None:
        """Stores the final status, deletes the files in `partials/`, and wakes all waiters. Raises nothing."""
        with self._publishing:
            with self._lock:
                if self._status is not PartialStatus.RUNNING:
                    return
                self._status = why
                self._version += 1
                self._published = self._version
            with suppress(OSError):
                drop_partial(self._system, self._paths, self._state, why)
        self._waiters.notify(self)
