"""`ProcessPartial`: the state of one partial blob in this process.

A *partial blob* is a blob that is still being downloaded. It has two files: the data file contains the bytes, and the
state file says which bytes are stored. A *user* is an object that reads or writes the partial blob. All users in this
process share one `ProcessPartial`. Among the users of all processes, only one may write bytes: the *owner*. The
owner's process holds the lock on the state file. To *commit* the partial blob, the owner verifies the data file and
moves it to the stored blobs (`publish`).
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
    is_at_path,
    write_progress,
)
from storage.blobs.files.partial_state_format import (
    PROGRESS_RECORD_SIZE,
    PartialProgress,
    PartialStatus,
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
from storage.errors import DigestInvalid, PartialBlobLost, SizeInvalid, StorageFull
from storage.names import Digest


class ProcessPartial:
    """A partial blob in this process. Each user calls `retain` before it uses the files and `release` afterwards. The
    last `release` closes the files.

    If the owner is in this process, `_extents` is up to date. Otherwise `_extents` has the ranges that `refresh` last
    read from the state file.

    There are two thread locks. `_lock` guards the attributes. It is never held during a system call that may wait for
    the disk. `_state_file_lock` is held while the state file is written, which may wait for the disk. The event loop
    must never take `_state_file_lock`.
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
        """`threads`: compute the digest and close deleted files. `waiters`: the tasks that wait for bytes. `files`: the
        open files; this object closes them."""
        self.digest = digest
        self.size = files.progress.size
        self.data_fd = files.data_fd
        # `PartialWaiters` sets these two attributes.
        self.is_notified = False  # whether `notify` was called since the waiting tasks were last checked
        self.checked_at = 0.0  # when the waiting tasks were last checked, in seconds of the event loop's clock
        self.flags = CrossProcessFlags(files.state_fd)
        self._system = system
        self._reserve = reserve
        self._threads = threads
        self._waiters = waiters
        self._paths = paths
        self._state_fd = files.state_fd  # descriptor of the state file; -1 after the files were closed
        self._boot = files.progress.boot  # id of the machine's boot during which the bytes are written
        self._status = files.progress.status
        self._extents = Extents(files.progress.extents)  # the ranges of bytes that are stored
        self._being_written = Extents()  # the ranges of bytes that threads of this process are writing now
        self._owner: object | None = None  # the owner, if it is a user of this process; otherwise None
        self._owner_is_leaving = False
        """Whether the owner has called `give_up_ownership`, and steps (`owner_step`) of the owner are still running."""
        self._running_steps = 0  # number of steps of the owner that are running
        self._user_count = 0
        """Number of `retain` calls without a `release` so far, plus `_running_steps`. When it falls to 0, the files are
        closed."""
        self._has_no_owner = False
        """True if the partial blob has no owner in any process. This value is out of date until the next `refresh` if a
        user in another process has become the owner, or has stopped being the owner."""
        self._version = 0
        """Number of changes to the *progress* (the stored ranges and the status) so far."""
        self._stored_version = 0  # the `_version` of the progress that is in the state file
        self._lock = threading.Lock()
        self._state_file_lock = threading.Lock()
        self._prefix_digest = self._new_prefix_digest()

    def _new_prefix_digest(self) -> PrefixDigest:
        """Returns a new computation of the digest. It has not hashed any bytes yet."""
        return PrefixDigest(
            self._system,
            self._threads,
            self.data_fd,
            self.size,
            self.digest.algorithm,
            self._prefix_length,
            self._run_while_open,
        )

    # Users and owner

    @property
    def is_open(self) -> bool:
        """Whether the files are open."""
        return self._state_fd >= 0

    def retain(self) -> bool:
        """Adds a user and returns True; the files then stay open until the user calls `release`. Returns False if the
        files are already closed."""
        with self._lock:
            if self._state_fd < 0:
                return False
            self._user_count += 1
            return True

    def release(self) -> None:
        """Removes a user. Closes the files if no users are left."""
        with self._lock:
            self._user_count -= 1
            if self._user_count:
                return
            state_fd, self._state_fd = self._state_fd, -1
        os.close(state_fd)
        close_data(self._threads, self.data_fd)

    def _run_while_open(self, call: Callable[[], None]) -> None:
        """Runs `call` and keeps the files open during the call. Does nothing if the files are already closed."""
        if self.retain():
            try:
                call()
            finally:
                self.release()

    @property
    def still_exists(self) -> bool:
        """False if this process knows that the blob is no longer partial: a process has committed or deleted it."""
        return self._status is PartialStatus.INCOMPLETE

    @property
    def is_owned_here(self) -> bool:
        """Whether the owner is a user of this process."""
        return self._owner is not None

    def is_owner(self, user: object) -> bool:
        """Returns whether `user` is the owner and has not given up ownership."""
        return self._owner is user and not self._owner_is_leaving and self.still_exists

    def take_ownership(self, user: object, *, has_file_lock: bool = False) -> bool:
        """Makes `user` the owner if no process has an owner. Returns whether `user` is the owner after the call.
        `has_file_lock`: whether this process already holds the lock on the state file. Never waits. Raises OSError."""
        with self._lock:
            if not self.still_exists:
                return False
            if self._owner is not None:
                return self._owner is user and not self._owner_is_leaving
            if not has_file_lock and not (try_lock_byte(self._state_fd) and self._load_progress()):
                return False
            self._owner, self._has_no_owner = user, False
            # Hashes again from the first byte. As an earlier owner, this process may have hashed bytes that it did not
            # record in the state file. An owner in another process may have replaced these bytes since then.
            self._prefix_digest = self._new_prefix_digest()
        self._prefix_digest.start_hashing_if_ready()
        return True

    def _load_progress(self) -> bool:
        """Loads the progress that the previous owner stored, and returns True. If the partial blob was committed or
        deleted, unlocks the state file and returns False. Called right after this process has locked the state file."""
        progress = read_progress(self._state_fd)
        if progress is not None and progress.status is not PartialStatus.INCOMPLETE:
            self._status = progress.status
        elif progress is None or not is_at_path(self._state_fd, self._paths.state):
            self._status = PartialStatus.DELETED
        if progress is None or not self.still_exists:
            unlock_byte(self._state_fd)
            return False
        self._extents = Extents(progress.extents)
        return True

    def give_up_ownership(self, user: object) -> None:
        """Ends the ownership of `user` when no more steps are running. Does nothing if `user` is not the owner."""
        with self._lock:
            if self._owner is not user:
                return
            self._owner_is_leaving = True
            if self._running_steps == 0:
                self._remove_owner()

    def _remove_owner(self) -> None:
        """Unlocks the state file and wakes the waiters. Another user can then become the owner."""
        self._owner, self._owner_is_leaving = None, False
        self._has_no_owner = True
        self._prefix_digest.stop()
        self.flags.clear_owner_flags()
        with suppress(OSError):
            unlock_byte(self._state_fd)
        self._waiters.notify(self)

    @contextmanager
    def owner_step(self, user: object) -> Iterator[None]:
        """Context manager around a *step*: work that only the owner may do. Until the step has ended, `user` stays the
        owner and the files stay open. Raises PartialBlobLost if `user` is not the owner."""
        with self._lock:
            if not self.is_owner(user):
                raise PartialBlobLost("this process does not own the partial blob any more")
            self._running_steps += 1
            self._user_count += 1
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
        """Reads the progress that an owner in another process has stored. Does nothing if the owner is in this process.
        Raises StorageFailed."""
        if self._owner is not None:
            return
        with as_storage_errors():
            # Checks the lock before it reads the progress. In the other order, an owner could store bytes and leave
            # between the two calls. `stored_until` would then raise PartialBlobLost for these bytes.
            has_no_owner = not is_byte_locked(self._state_fd)
            progress = read_progress(self._state_fd)
        with self._lock:
            if self._owner is not None:
                return
            self._has_no_owner = has_no_owner
            if progress is not None and self.still_exists:
                self._status = progress.status
                if progress.status is PartialStatus.INCOMPLETE:
                    self._extents = Extents(progress.extents)

    def stored_until(self, offset: int) -> int | None:
        """Looks for the end of the stored bytes from `offset`. The first case that applies decides:

        - The blob is committed: returns `size`.
        - The downloaded bytes have a wrong digest: raises DigestInvalid.
        - The byte at `offset` is stored: returns the offset of the first missing byte after it, at most `size`.
        - The partial blob was deleted, or no owner is left: raises PartialBlobLost.
        - The byte at `offset` is missing, or `offset` is `size`: returns None."""
        with self._lock:
            if self._status is PartialStatus.COMMITTED:
                return self.size
            if self._status is PartialStatus.WRONG_DIGEST:
                raise DigestInvalid("the bytes that the upstream sent have another digest", {"expected": self.digest})
            if (end := self._extents.covered_until(offset)) > offset:
                return end
            if self._has_no_owner or self._status is PartialStatus.DELETED:
                raise PartialBlobLost()
            return None

    async def wait(self, offset: int) -> int:
        """Waits until `stored_until(offset)` returns a number, and returns that number. Raises PartialBlobLost,
        DigestInvalid, StorageFailed."""
        if not self.retain():
            raise PartialBlobLost("this process has closed the partial blob")
        try:
            self.refresh()
            if (end := self.stored_until(offset)) is not None:
                return end
            return await self._waiters.wait(self, offset)
        finally:
            self.release()

    @property
    def owner_failures(self) -> PartialFailures:
        """The failures that owners have reported (`report_failure`). Raises StorageFailed."""
        with as_storage_errors():
            return read_failures(self._state_fd)

    def missing(self) -> list[Extent]:
        """Returns the ranges of bytes that are not stored, in ascending order. Raises StorageFailed."""
        self.refresh()
        with self._lock:
            return [] if self._status is PartialStatus.COMMITTED else self._extents.gaps(0, self.size)

    def _prefix_length(self) -> int:
        """Returns the number of stored bytes before the first gap; 0 if the owner is not in this process."""
        with self._lock:
            return 0 if self._owner is None else self._extents.covered_until(0)

    # Steps of the owner. They block; call them inside `owner_step`.

    def write_at(self, offset: int, data: memoryview) -> None:
        """Writes `data` at `offset`. Skips bytes that are stored or that another thread is writing. Stored bytes must
        never change: a user may have read them. Raises SizeInvalid and StorageFailed. If the disk is full, deletes the
        partial blob and raises StorageFull."""
        stop = offset + len(data)
        if offset < 0 or stop > self.size:
            raise SizeInvalid(f"the blob has {self.size} bytes; {offset} to {stop} lie outside")
        with self._lock:
            gaps = self._extents.gaps(offset, stop)
            new_parts = [part for gap in gaps for part in self._being_written.gaps(*gap)]
            for part in new_parts:
                self._being_written.add(*part)
        try:
            # `open_file_pair` checked `MinFreeSpace` for the whole blob before it created the files. So no check here.
            self._reserve.require_free_space(may_use_min_free=True)
            with as_storage_errors():
                self._write(offset, data, new_parts)
                self._store_progress()
        except StorageFull:
            self.end(PartialStatus.DELETED)  # frees space for other requests
            raise
        self._waiters.notify(self)
        self._prefix_digest.start_hashing_if_ready()

    def _write(self, offset: int, data: memoryview, parts: list[Extent]) -> None:
        """Writes parts of `data`, and adds them to the stored ranges. `offset`: the position of `data` in the blob.
        `parts`: the ranges to write, as positions in the blob."""
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
        """Writes the progress to the state file, for other processes. If several threads call this method at the same
        time, one write can store the changes of all of them."""
        needed_version = self._version
        with self._state_file_lock:
            if self._stored_version >= needed_version:
                return
            with self._lock:
                version = self._version
                progress = PartialProgress(self._boot, self.size, self._status, list(self._extents))
            write_progress(self._system, self._state_fd, progress)
            self._stored_version = version

    def report_failure(self, reason: str) -> None:
        """Counts a failed download of this partial blob in the state file, and stores the reason. Raises OSError."""
        failures = PartialFailures(read_failures(self._state_fd).count + 1, reason)
        write_fully(self._system, self._state_fd, memoryview(encode_failures(failures)), PROGRESS_RECORD_SIZE)

    def finish_digest(self) -> Digest:
        """Returns the digest of the whole data file. Call it when no byte is missing. Raises OSError; one cause is that
        the file does not have the size of the blob."""
        digest = self._prefix_digest.finish()
        if (length := os.fstat(self.data_fd).st_size) != self.size:
            raise OSError(f"the file has {length} bytes, not {self.size}")
        return digest

    def sync(self) -> None:
        """Makes the bytes in the data file durable. Raises OSError."""
        self._system.sync(self.data_fd)

    def publish(self, target: Path) -> None:
        """Moves the synced data file to `target`, the path of the stored blob, and makes the move durable. If a
        previous owner has already moved the file, only makes the move durable. Raises OSError."""
        try:
            self._system.rename(self._paths.data, target)
        except FileNotFoundError:
            if not is_at_path(self.data_fd, target):
                raise
        sync_directory(self._system, target.parent)

    def end(self, final_status: PartialStatus) -> None:
        """Stores the final status, deletes the files of the partial blob in `partials/`, and wakes all waiters. Keeps a
        data file that `publish` has moved. Raises nothing."""
        with self._state_file_lock:
            with self._lock:
                if not self.still_exists:
                    return
                self._status = final_status
                self._version += 1
                self._stored_version = self._version
            with suppress(OSError):
                delete_file_pair(self._system, self._paths, self._state_fd, final_status)
        self._waiters.notify(self)
