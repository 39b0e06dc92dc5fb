"""Creates, opens, lists and deletes the files of partial blobs. All functions block.

A *partial blob* is a blob whose download has not ended. A partial blob has a pair of files in the directory
`partials/`:

- The data file (`.data`) holds the bytes of the blob.
- The state file (`.state`) says which bytes are stored.

The *owner* of a pair is the process that holds the lock on its state file. When the state file has been deleted, there
is no owner any more. Only the owner changes or deletes the files. Other processes that have the files open are
*followers*: they read the bytes while the owner stores more.

After the owner has deleted a pair, a new pair can get the same paths. A follower must not combine the state file of the
deleted pair with the data file of the new pair. Therefore the order of these steps is fixed:

- To create a pair, the owner creates the state file first, then the data file.
- To delete a pair, the owner writes a final status to the state file, then deletes the data file, then the state file.
- A follower opens the state file, then opens the data file, then reads the status from the state file. If the status is
  `INCOMPLETE`, the owner had not begun to delete the pair, so the two files belong together.

A pair is *old* if it was last written before a given time, or during an earlier boot of the machine. It is *idle* if it
is old and has no owner.
"""

from __future__ import annotations

import os
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from storage.blobs.files.partial_state_format import PROGRESS_RECORD_SIZE, PartialProgress, PartialStatus, read_progress
from storage.blobs.files.unreadable_files import has_unreadable_inode, skip_unreadable
from storage.data_dir.durable_files import write_fully
from storage.data_dir.layout import Layout
from storage.data_dir.locks import is_byte_locked, try_lock_byte
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.errors import DigestInvalid, StorageFull
from storage.future_times import repair_write_time
from storage.names import Digest


@dataclass(frozen=True, slots=True)
class PartialPaths:
    """Paths of the files of a partial blob. `state`: the state file. `data`: the data file. `blob`: the file to
    which the owner moves the data file when all bytes are stored."""

    state: Path
    data: Path
    blob: Path

    @classmethod
    def of_blob(cls, layout: Layout, name: str, digest: Digest) -> PartialPaths:
        """Returns the paths for the partial blob with this name (`Layout.partial_name`) and digest."""
        return cls(layout.partial_state(name), layout.partial_data(name), layout.blob(digest))

    def occupied_bytes(self) -> int:
        """Returns the disk space that the data file takes, in bytes, or 0 if there is no data file. The data
        file is sparse: until all bytes are stored, it takes less disk space than its length."""
        try:
            return os.stat(self.data).st_blocks * 512  # stat(2) counts in units of 512 bytes
        except FileNotFoundError:
            return 0


@dataclass(frozen=True, slots=True)
class PartialFilePair:
    """The two open files of a partial blob, as file descriptors, and the progress read from the state file. `is_owner`:
    whether this process is the owner; if so, `state_fd` holds the lock on the state file."""

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
    the owner. Returns None in two cases, in which the caller should try again soon:

    - Another process is creating or deleting the files at this moment.
    - This call has deleted files with unusable bytes.

    `boot`: id of the machine's present boot. Bytes stored during another boot are unusable: they were not synced.
    `reserve`: checks, before files are created, that the disk has enough free space. Raises StorageFull, OSError."""
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
    """Deletes the files of a partial blob if the pair is idle. The pair is old if it was last written before the time
    `before` (seconds since 1970), or during another boot of the machine than `boot`. Returns whether this call deleted
    the files. Raises OSError."""
    if not _is_old(paths, before, boot):
        return False
    state_fd = _open_or_create(system, paths.state)  # the lock needs a state file
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
    """Returns whether `delete_file_pair_if_idle` would delete the files. Raises OSError."""
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
    """If one of the two files cannot be read (`skip_unreadable`), logs a warning and returns False. If both can be
    read, returns whether the pair is idle, like `_is_idle`. Raises other OSErrors."""
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
    """Returns whether the open file `fd` is still at `path`. If the file was deleted, moved or replaced, returns
    False."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def delete_file_pair(system: System, paths: PartialPaths, state_fd: int, final_status: PartialStatus) -> None:
    """Writes the final status to the state file, which followers can have open, and deletes both files. Only the owner
    may call this function. Raises OSError if a file cannot be deleted."""
    progress = read_progress(state_fd)
    with suppress(OSError):  # without the status, the followers notice the end when the owner releases its lock
        write_progress(system, state_fd, replace(progress or PartialProgress("", 0), status=final_status, extents=()))
    with suppress(FileNotFoundError):
        system.unlink(paths.data)
    with suppress(FileNotFoundError):
        system.unlink(paths.state)


def close_data(threads: Executor, data_fd: int) -> None:
    """Closes a data file. If the data file was deleted, a thread of `threads` closes it, because the call blocks while
    the file system frees the blocks of a deleted file."""
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
    """Opens a state file, or creates it, and returns its descriptor. If another process creates the file at the same
    moment, returns None. Raises OSError."""
    with suppress(FileNotFoundError):
        return system.open(path, os.O_RDWR)
    with suppress(FileExistsError):
        return system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    return None


def _open_as_owner(system: System, paths: PartialPaths, state_fd: int, size: int, boot: str) -> PartialFilePair | None:
    """Opens the pair after this process has locked the state file:

    - If the state file was deleted before the lock was acquired, returns None.
    - If the state file is empty, sets up a new pair.
    - If the stored bytes cannot be used, deletes both files and returns None.

    Raises StorageFull, OSError."""
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
    """Opens the data file and returns its descriptor. If the data file is missing and all bytes are stored, opens the
    file at `paths.blob`: an earlier owner may have moved the data file there and then died. Returns None if there is no
    file to open."""
    with suppress(FileNotFoundError):
        return os.open(paths.data, os.O_RDWR | os.O_CLOEXEC)
    if list(progress.extents) == [(0, progress.size)]:
        with suppress(FileNotFoundError):
            return os.open(paths.blob, os.O_RDWR | os.O_CLOEXEC)
    return None


def _open_as_follower(paths: PartialPaths, state_fd: int) -> PartialFilePair | None:
    """Opens the pair while another process is the owner. If the owner is creating or deleting the files at this moment,
    returns None."""
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
    """Creates the data file, sparse and with its full length, and writes the state file. Raises StorageFull if
    the disk has less free space than the blob needs. After an error, tries to delete both files."""
    data_fd = -1
    try:
        file_system = os.fstatvfs(state_fd)
        if size > file_system.f_bavail * file_system.f_frsize:
            raise StorageFull(f"there is no room for a blob of {size} bytes")
        with suppress(FileNotFoundError):
            system.unlink(paths.data)
        data_fd = system.open(paths.data, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        system.truncate(data_fd, size)
        write_fully(system, state_fd, memoryview(bytes(PROGRESS_RECORD_SIZE)), 0)
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
    """Returns whether the pair was last written before the time `before` or during another boot than `boot`. If neither
    file exists, returns False. If the write time of a file is in the future, corrects it (`repair_write_time`)."""
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
    for path in (paths.data, paths.state):  # the state file's time counts only if there is no data file
        with suppress(FileNotFoundError):
            return repair_write_time(path, os.stat(path)) < before
    return False
