"""One partial blob inside one process: its open files, its owner, and the bytes that are stored (`ProcessPartial`).

A *partial blob* is a blob that is still being downloaded. Its data file holds the bytes, its state file says which of
them are stored. The *owner* is the one user, in any process, that writes bytes; the lock on the state file decides
which process has it. All users in this process share one `ProcessPartial`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from pathlib import Path

from storage.blobs.files.cross_process_flags import CrossProcessFlags
from storage.blobs.files.extents import Extent, Extents
from storage.blobs.files.partial_file_pairs import (
    PartialFilePair,
    PartialPaths,
    close_data,
    delete_file_pair,
    has_path,
    write_progress,
)
from storage.blobs.files.partial_state_format import (
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


class ProcessPartial:
    """A partial blob in this process. The files stay open while at least one user has called `retain` without
    `release`.

    A *user* is any object; one of the users may be the owner. While the owner is a user of this process, the stored
    extents in memory are right. Otherwise they are those that `refresh` read last from the state file.

    There are two thread locks. `_lock` guards the attributes and is never held during a system call that may wait.
    `_state_file_lock` is held while the state file is written, which may wait for the disk, so the event loop never
    takes it.
    """

    def __init__(
        self,
        system: System,
        reserve: Reserve,
        threads: Executor,
        waiters: PartialWaiters,
        paths: PartialPaths,
        digest: Digest,
        files: PartialFilePair,
    ) -> None:
        """`threads`: computes the digest, and closes files that were deleted. `files`: the open files, which this
        object closes."""
        self.digest = digest
        self.size = files.progress.size
        self.data_fd = files.data_fd
        self.is_notified = False
        self.refreshed_at = 0.0
        self.flags = CrossProcessFlags(files.state_fd)
        self._system = system
        self._reserve = reserve
        self._threads = threads
        self._waiters = waiters
        self._paths = paths
        self._state_fd = files.state_fd
        """-1 after the files were closed."""
        self._boot = files.progress.boot
        self._status = files.progress.status
        self._extents = Extents(files.progress.extents)
        """The stored bytes."""
        self._being_written = Extents()
        """Bytes that a thread of this process is writing now."""
        self._owner: object | None = None
        """The owner, if it is a user of this process."""
        self._owner_is_leaving = False
        """Whether the owner gives up ownership as soon as its running steps have ended."""
        self._running_steps = 0
        self._users = 0
        self._has_no_owner = False
        """Whether no process has an owner."""
        self._version = self._stored_version = 0
        """Counts changes of the progress, and those that are in the state file."""
        self._lock = threading.Lock()
        self._state_file_lock = threading.Lock()
        self._prefix_digest = self._start_digest()

    def _start_digest(self) -> PrefixDigest:
        return PrefixDigest(
            self._system,
            self._threads,
            self.data_fd,
            self.size,
            self.digest.algorithm,
            self._prefix_bytes,
            self._run_while_open,
        )

    # Users and owner

    @property
    def is_open(self) -> bool:
        """Whether the files are open."""
        return self._state_fd >= 0

    def retain(self) -> bool:
        """Adds a user, for which the files stay open, and returns True. Returns False if they are closed already."""
        with self._lock:
            if self._state_fd < 0:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        """Removes a user. The last one closes the files."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            state_fd, self._state_fd = self._state_fd, -1
        os.close(state_fd)
        close_data(self._threads, self.data_fd)

    def _run_while_open(self, step: Callable[[], None]) -> None:
        """Calls `step` and keeps the files open during the call. Does nothing if they are closed already."""
        if self.retain():
            try:
                step()
            finally:
                self.release()

    @property
    def is_incomplete(self) -> bool:
        """Whether the partial blob has been neither committed nor dropped."""
        return self._status is PartialStatus.INCOMPLETE

    @property
    def is_owned_here(self) -> bool:
        """Whether the owner is a user of this process."""
        return self._owner is not None

    def is_owner(self, user: object) -> bool:
        """Returns whether `user` is the owner."""
        return self._owner is user and not self._owner_is_leaving and self.is_incomplete

    def take_ownership(self, user: object, *, has_file_lock: bool = False) -> bool:
        """Makes `user` the owner if there is none in any process, and returns whether it is the owner now.
        `has_file_lock`: this process holds the lock on the state file already. Raises OSError."""
        with self._lock:
            if not self.is_incomplete:
                return False
            if self._owner is not None:
                return self._owner is user and not self._owner_is_leaving
            if not has_file_lock and not (try_lock_byte(self._state_fd) and self._load_progress()):
                return False
            self._owner, self._has_no_owner = user, False
            # The digest starts again, because an owner in another process may have rewritten bytes hashed here.
            self._prefix_digest = self._start_digest()
        self._prefix_digest.notify()
        return True

    def _load_progress(self) -> bool:
        """Loads the progress that the previous owner stored, right after this process has locked the state file. If the
        partial blob was committed or dropped, releases that lock and returns False."""
        progress = read_progress(self._state_fd)
        if progress is not None and progress.status is not PartialStatus.INCOMPLETE:
            self._status = progress.status
        elif progress is None or not has_path(self._state_fd, self._paths.state):
            self._status = PartialStatus.DROPPED
        if progress is None or not self.is_incomplete:
            unlock_byte(self._state_fd)
            return False
        self._extents = Extents(progress.extents)
        return True

    def give_up_ownership(self, user: object) -> None:
        """Ends the ownership of `user`, if it is the owner, as soon as its running steps have ended."""
        with self._lock:
            if self._owner is not user:
                return
            self._owner_is_leaving = True
            if self._running_steps == 0:
                self._remove_owner()

    def _remove_owner(self) -> None:
        self._owner, self._owner_is_leaving = None, False
        self._has_no_owner = True
        self._prefix_digest.stop()
        self.flags.clear_started()
        with suppress(OSError):
            unlock_byte(self._state_fd)
        self._waiters.notify(self)

    @contextmanager
    def owner_step(self, user: object) -> Iterator[None]:
        """Context manager around a step that only the owner may do. `user` stays the owner, and the files stay open,
        until the step has ended. Raises PartialLost if `user` is not the owner."""
        with self._lock:
            if not self.is_owner(user):
                raise PartialLost("this process does not own the partial blob any more")
            self._running_steps += 1
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._running_steps -= 1
                if self._owner_is_leaving and self._running_steps == 0:
                    self._remove_owner()
            self.release()

    # Stored bytes

    def refresh(self) -> None:
        """Reads the progress that an owner in another process has stored. Raises StorageFailed."""
        if self._owner is not None:
            return
        with as_storage_errors():
            # The lock is checked before the progress is read, so that nothing an owner stored before it left is missed.
            has_no_owner = not is_byte_locked(self._state_fd)
            progress = read_progress(self._state_fd)
        with self._lock:
            if self._owner is not None:
                return
            self._has_no_owner = has_no_owner
            if progress is not None and self.is_incomplete:
                self._status = progress.status
                if progress.status is PartialStatus.INCOMPLETE:
                    self._extents = Extents(progress.extents)

    def available_from(self, offset: int) -> int | None:
        """Returns the end of the stored bytes that begin at `offset`: the offset of the first missing byte, or `size`
        once the blob is committed. Returns None if the byte at `offset` is not stored yet; for `offset` equal to
        `size`, if the digest is not verified yet. Raises PartialLost (no owner is left to download the byte),
        DigestInvalid."""
        with self._lock:
            if self._status is PartialStatus.COMMITTED:
                return self.size
            if self._status is PartialStatus.WRONG_DIGEST:
                raise DigestInvalid("the upstream sent other bytes than the digest says", {"expected": self.digest})
            if (end := self._extents.reach(offset)) > offset:
                return end
            if self._has_no_owner or self._status is PartialStatus.DROPPED:
                raise PartialLost()
            return None

    async def wait(self, offset: int) -> int:
        """Waits until `available_from(offset)` returns a number, and returns that number. Raises PartialLost,
        DigestInvalid, StorageFailed."""
        if not self.retain():
            raise PartialLost("this process has released the partial blob")
        try:
            self.refresh()
            if (end := self.available_from(offset)) is not None:
                return end
            return await self._waiters.wait(self, offset)
        finally:
            self.release()

    @property
    def owner_failures(self) -> PartialFailures:
        """The failures that owners have reported. Raises StorageFailed."""
        with as_storage_errors():
            return read_failures(self._state_fd)

    def missing(self) -> list[Extent]:
        """Returns the ranges of bytes that are not stored, in order. Raises StorageFailed."""
        self.refresh()
        with self._lock:
            return [] if self._status is PartialStatus.COMMITTED else self._extents.gaps(0, self.size)

    def _prefix_bytes(self) -> int:
        """Returns the number of stored bytes before the first gap; 0 if the owner is not in this process."""
        with self._lock:
            return 0 if self._owner is None else self._extents.reach(0)

    # Steps of the owner. They block; call them inside `owner_step`.

    def write_at(self, offset: int, data: memoryview) -> None:
        """Writes `data` at `offset`, except for bytes that are stored already or that another thread is writing,
        because stored bytes must not change after a reader got them. Raises SizeInvalid, StorageFailed, and
        StorageFull, after which the partial blob is dropped."""
        stop = offset + len(data)
        if offset < 0 or stop > self.size:
            raise SizeInvalid(f"the blob has {self.size} bytes; {offset} to {stop} lie outside")
        with self._lock:
            gaps = self._extents.gaps(offset, stop)
            new_parts = [part for gap in gaps for part in self._being_written.gaps(*gap)]
            for part in new_parts:
                self._being_written.add(*part)
        try:
            self._reserve.require_room()
            with as_storage_errors():
                self._write(offset, data, new_parts)
                self._store_progress()
        except StorageFull:
            self.drop(PartialStatus.DROPPED)  # to free space for other requests
            raise
        self._waiters.notify(self)
        self._prefix_digest.notify()

    def _write(self, offset: int, data: memoryview, parts: list[Extent]) -> None:
        """Writes the `parts` of `data`, whose first byte belongs at `offset`, and adds them to the stored bytes."""
        is_written = False
        try:
            for start, stop in parts:
                write_fully(self._system, self.data_fd, data[start - offset : stop - offset], start)
            is_written = True
        finally:
            with self._lock:
                for part in parts:
                    self._being_written.remove(*part)
                    if is_written:
                        self._extents.add(*part)
                        self._version += 1

    def _store_progress(self) -> None:
        """Writes the progress to the state file, for other processes. If several threads call this at the same time,
        one write covers the changes of all."""
        needed_version = self._version
        with self._state_file_lock:
            if self._stored_version >= needed_version:
                return
            with self._lock:
                version = self._version
                progress = Progress(self._boot, self.size, self._status, list(self._extents))
            write_progress(self._system, self._state_fd, progress)
            self._stored_version = version

    def report_failure(self, reason: str) -> None:
        """Stores in the state file that one more download has failed, and why. Raises OSError."""
        failures = PartialFailures(read_failures(self._state_fd).times + 1, reason)
        write_fully(self._system, self._state_fd, memoryview(encode_failures(failures)), RECORD_SIZE)

    def finish_digest(self) -> Digest:
        """Returns the digest of the whole data file. Call it when no byte is missing. Raises OSError, also if the file
        has become shorter than the blob."""
        digest = self._prefix_digest.finish()
        if (length := os.fstat(self.data_fd).st_size) != self.size:
            raise OSError(f"the file has {length} bytes, not {self.size}")
        return digest

    def sync(self) -> None:
        """Makes the bytes durable. Raises OSError."""
        self._system.sync(self.data_fd)

    def publish(self, target: Path) -> None:
        """Moves the synced data file to `target`, the path of the blob, durably. Does not fail if a previous owner
        moved it there before it was killed. Raises OSError."""
        try:
            self._system.rename(self._paths.data, target)
        except FileNotFoundError:
            if not has_path(self.data_fd, target):
                raise
        sync_directory(self._system, target.parent)

    def drop(self, final_status: PartialStatus) -> None:
        """Ends the partial blob: stores the final status, deletes the files in `partials/`, and wakes all waiters.
        Keeps the data file if `publish` has moved it. Raises nothing."""
        with self._state_file_lock:
            with self._lock:
                if not self.is_incomplete:
                    return
                self._status = final_status
                self._version += 1
                self._stored_version = self._version
            with suppress(OSError):
                delete_file_pair(self._system, self._paths, self._state_fd, final_status)
        self._waiters.notify(self)
