"""Creates, opens, lists and deletes the files of partial blobs. All functions block.

A *partial blob* is a blob that is still being downloaded. It has a pair of files in the directory `partials/`: the data
file (`.data`) holds its bytes, and the state file (`.state`) says which of them are stored. The process that holds the
lock on the state file is the *owner*, as long as the file has not been deleted. Only the owner changes or deletes the
files. The other processes that have the files open are its *followers*: they read the bytes as they arrive.

A process that opens the two files must not combine the state file of an old pair with the data file of a newer one.
Therefore the owner creates the state file first and deletes it last, and writes the final status to it before it
deletes either file. Another process opens the state file first, then the data file, and then reads the status. If the
status is still `INCOMPLETE`, the two files belong together.

A pair is *old* if it was last written before a given time, or during an earlier boot of the machine. It is *idle* if it
is old and has no owner.
"""

from __future__ import annotations

import os
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from storage.blobs.files.partial_state_format import RECORD_SIZE, PartialProgress, PartialStatus, read_progress
from storage.blobs.files.unreadable_files import has_unreadable_inode, skip_unreadable
from storage.data_dir.durable_files import write_fully
from storage.data_dir.layout import Layout
from storage.data_dir.locks import is_byte_locked, try_lock_byte
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.errors import DigestInvalid, StorageFull
from storage.future_times import past_write_time
from storage.names import Digest


@dataclass(frozen=True, slots=True)
class PartialPaths:
    """Paths of a partial blob's state file (`state`) and data file (`data`), and the path to which the data file is
    moved when the partial blob becomes a blob (`blob`)."""

    state: Path
    data: Path
    blob: Path

    @classmethod
    def of_blob(cls, layout: Layout, name: str, digest: Digest) -> PartialPaths:
        """Returns the paths for the partial blob with this name (`Layout.partial_name`) and digest."""
        return cls(layout.partial_state(name), layout.partial_data(name), layout.blob(digest))

    def occupied_bytes(self) -> int:
        """Returns the disk space that the bytes of the partial blob take. The data file is sparse, so this is less than
        its length until the blob is complete. Returns 0 if there is no data file."""
        try:
            return os.stat(self.data).st_blocks * 512  # stat(2) counts in units of 512 bytes
        except FileNotFoundError:
            return 0


@dataclass(frozen=True, slots=True)
class PartialFilePair:
    """The two open files of a partial blob, as file descriptors, and the progress read from the state file. `is_owner`:
    whether `state_fd` holds the lock on the state file, so that this process is the owner."""

    state_fd: int
    data_fd: int
    progress: PartialProgress
    is_owner: bool

    def close(self) -> None:
        """Closes both files."""
        os.close(self.state_fd)
        os.close(self.data_fd)


def open_file_pair(
    system: System, paths: PartialPaths, size: int, boot: str, reserve: Reserve
) -> PartialFilePair | None:
    """Opens the files of a partial blob of `size` bytes, or creates them. If there is no owner, this process becomes
    the owner. Returns None if another process is creating or deleting the files at this moment, or if this call has
    just deleted files with unusable bytes; the caller should try again soon. `boot`: id of the machine's present boot.
    Bytes from another boot are unusable, because they were not synced. `reserve`: checks, before files are created,
    that the disk has enough free space. Raises StorageFull, OSError."""
    if not paths.state.exists():
        reserve.require_free_space(size=size)
    state_fd = _open_or_create(system, paths.state)
    if state_fd is None:
        return None
    try:
        if try_lock_byte(state_fd):  # the lock makes this process the owner
            pair = _open_as_owner(system, paths, state_fd, size, boot)
        else:
            pair = _open_as_follower(paths, state_fd)
    except BaseException:
        os.close(state_fd)
        raise
    if pair is None:
        os.close(state_fd)
    return pair


def delete_file_pair_if_idle(system: System, paths: PartialPaths, before: float, boot: str) -> bool:
    """Deletes the files of a partial blob if they are idle: old and without an owner. They are old if they were last
    written before the time `before` (seconds since 1970), or during another boot of the machine than `boot`. Returns
    whether the files were deleted. Raises OSError."""
    if not _is_old(paths, before, boot):
        return False
    state_fd = _open_or_create(system, paths.state)  # if only the data file is left, creates the file to lock it
    if state_fd is None:
        return False
    try:
        if not try_lock_byte(state_fd) or not is_at_path(state_fd, paths.state):
            return False
        delete_file_pair(system, paths, state_fd, PartialStatus.DELETED)
        return True
    finally:
        os.close(state_fd)


def _is_idle(paths: PartialPaths, before: float, boot: str) -> bool:
    """Returns whether `delete_file_pair_if_idle` would delete the files. Deletes nothing. Raises OSError."""
    if not _is_old(paths, before, boot):
        return False
    try:
        state_fd = os.open(paths.state, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True  # only the data file is left
    try:
        return not is_byte_locked(state_fd) and is_at_path(state_fd, paths.state)
    finally:
        os.close(state_fd)


def is_file_pair_idle_and_readable(paths: PartialPaths, before: float, boot: str) -> bool:
    """Does what `_is_idle` does, but logs a warning and returns False if one of the two files cannot be read
    (`skip_unreadable`). Raises other OSErrors."""
    with skip_unreadable(paths.state):
        return not has_unreadable_inode(paths.data) and _is_idle(paths, before, boot)
    return False


def list_partial_names(layout: Layout) -> list[tuple[str, Digest]]:
    """Returns the names (`Layout.partial_name`) and digests of the partial blobs that have at least one file."""
    names = set()
    for file_name in os.listdir(layout.partials):
        with suppress(DigestInvalid):
            names.add(layout.parse_partial_file(file_name))
    return sorted(names)


def is_at_path(fd: int, path: Path) -> bool:
    """Returns whether the open file `fd` is still at `path`: False if it has been deleted, moved or replaced."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def delete_file_pair(system: System, paths: PartialPaths, state_fd: int, final_status: PartialStatus) -> None:
    """Writes the final status to the state file, for the followers that have it open, and deletes both files. Only the
    owner may call this. Raises OSError if a file cannot be deleted."""
    progress = read_progress(state_fd)
    with suppress(OSError):  # without the status, the followers notice the end when the owner releases its lock
        write_progress(system, state_fd, replace(progress or PartialProgress("", 0), status=final_status, extents=()))
    with suppress(FileNotFoundError):
        system.unlink(paths.data)
    with suppress(FileNotFoundError):
        system.unlink(paths.state)


def close_data(threads: Executor, data_fd: int) -> None:
    """Closes a data file. If the file has been deleted, a thread of `threads` closes it, because the call then blocks
    while the file system frees the file's blocks."""
    if os.fstat(data_fd).st_nlink:
        os.close(data_fd)
        return
    try:
        threads.submit(os.close, data_fd)
    except RuntimeError:  # the thread pool has been shut down
        os.close(data_fd)


def write_progress(system: System, state_fd: int, progress: PartialProgress) -> None:
    """Writes the progress to the state file. Raises OSError."""
    write_fully(system, state_fd, memoryview(progress.encode()), 0)


def _open_or_create(system: System, path: Path) -> int | None:
    """Opens a state file, or creates it, and returns its descriptor. Returns None if another process creates the file
    at the same moment. Raises OSError."""
    with suppress(FileNotFoundError):
        return system.open(path, os.O_RDWR)
    with suppress(FileExistsError):
        return system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    return None


def _open_as_owner(system: System, paths: PartialPaths, state_fd: int, size: int, boot: str) -> PartialFilePair | None:
    """Opens the pair as the process that has just locked the state file. If the state file is empty, sets up a new
    pair. Returns None if the state file was deleted before it was locked. If the stored bytes cannot be used, deletes
    both files and returns None. Raises StorageFull, OSError."""
    if not is_at_path(state_fd, paths.state):
        return None
    if os.fstat(state_fd).st_size == 0:
        return _set_up(system, paths, state_fd, size, boot)
    progress = read_progress(state_fd)
    if progress is None or (progress.boot, progress.size, progress.status) != (boot, size, PartialStatus.INCOMPLETE):
        data_fd = None
    else:
        data_fd = _open_data(paths, progress)
    if progress is None or data_fd is None:
        delete_file_pair(system, paths, state_fd, PartialStatus.DELETED)
        return None
    return PartialFilePair(state_fd, data_fd, progress, is_owner=True)


def _open_data(paths: PartialPaths, progress: PartialProgress) -> int | None:
    """Opens the data file and returns its descriptor. An earlier owner may have moved the complete data file to the
    blob's path, and then died. So if all bytes are stored and the data file is missing, opens the file at that path.
    Returns None if neither file exists."""
    with suppress(FileNotFoundError):
        return os.open(paths.data, os.O_RDWR | os.O_CLOEXEC)
    if list(progress.extents) == [(0, progress.size)]:
        with suppress(FileNotFoundError):
            return os.open(paths.blob, os.O_RDWR | os.O_CLOEXEC)
    return None


def _open_as_follower(paths: PartialPaths, state_fd: int) -> PartialFilePair | None:
    """Opens the pair while another process is the owner. Returns None if that process is creating or deleting the files
    at this moment."""
    progress_before = read_progress(state_fd)
    if progress_before is None or progress_before.status is not PartialStatus.INCOMPLETE:
        return None
    try:
        data_fd = os.open(paths.data, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    progress = read_progress(state_fd)
    if progress is None or progress.status is not PartialStatus.INCOMPLETE:
        os.close(data_fd)
        return None
    return PartialFilePair(state_fd, data_fd, progress, is_owner=False)


def _set_up(system: System, paths: PartialPaths, state_fd: int, size: int, boot: str) -> PartialFilePair:
    """Creates the data file, sparse and with its full length, and writes the state file. Raises StorageFull if the disk
    has less free space than the blob needs, so that such a download fails before it has filled the disk. After an
    error, deletes both files if it can."""
    data_fd = -1
    try:
        file_system = os.fstatvfs(state_fd)
        if size > file_system.f_bavail * file_system.f_frsize:
            raise StorageFull(f"there is no room for a blob of {size} bytes")
        with suppress(FileNotFoundError):
            system.unlink(paths.data)
        data_fd = system.open(paths.data, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        system.truncate(data_fd, size)
        write_fully(system, state_fd, memoryview(bytes(RECORD_SIZE)), 0)
        progress = PartialProgress(boot, size)
        write_progress(system, state_fd, progress)
    except BaseException:
        if data_fd >= 0:
            os.close(data_fd)
        with suppress(OSError):
            delete_file_pair(system, paths, state_fd, PartialStatus.DELETED)
        raise
    return PartialFilePair(state_fd, data_fd, progress, is_owner=True)


def _is_old(paths: PartialPaths, before: float, boot: str) -> bool:
    """Returns whether the pair was last written before the time `before` or during another boot than `boot`. Returns
    False if neither file exists. Corrects times in the future (`past_write_time`)."""
    try:
        state_fd = os.open(paths.state, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        progress = None
    else:
        try:
            progress = read_progress(state_fd)
        finally:
            os.close(state_fd)
    if progress is not None and progress.boot != boot:
        return True
    for path in (paths.data, paths.state):  # the first file that exists counts
        with suppress(FileNotFoundError):
            return past_write_time(path, os.stat(path)) < before
    return False
