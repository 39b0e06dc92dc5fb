"""Creates, opens and deletes the files of partial blobs. All calls block.

A partial blob has two files in `partials/`: its bytes (`.data`), and its state (`storage.blobs.files.partial_state`).
The process that holds the lock on the state file owns the partial, as long as the file still has its name. Only the
owner changes the files and their names. The state file is created first and deleted last, and its status changes before
the data file loses its name. So if the state still says `RUNNING` after the data file was opened, both belong together.
"""

from __future__ import annotations

import os
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from storage.blobs.files.partial_state import RECORD_SIZE, PartialStatus, Progress, read_progress
from storage.data_dir.durable_files import write_fully
from storage.data_dir.layout import Layout
from storage.data_dir.locks import try_lock_byte
from storage.data_dir.reserve import Reserve
from storage.data_dir.system import System
from storage.errors import DigestInvalid, StorageFull
from storage.names import Digest


@dataclass(frozen=True, slots=True)
class PartialPaths:
    """Paths of a partial blob's files, and the path of the blob that it becomes."""

    state: Path
    data: Path
    place: Path

    @classmethod
    def of(cls, layout: Layout, name: str, digest: Digest) -> PartialPaths:
        return cls(layout.partial_state(name), layout.partial_data(name), layout.blob(digest))


@dataclass(frozen=True, slots=True)
class OpenedPartial:
    """Both files, open, and the progress in the state file. `owned`: the lock was free, and this opening holds it."""

    state: int
    data: int
    progress: Progress
    owned: bool

    def close(self) -> None:
        os.close(self.state)
        os.close(self.data)


def open_partial(system: System, paths: PartialPaths, size: int, boot: str, reserve: Reserve) -> OpenedPartial | None:
    """Opens the partial of `size` bytes, or creates it. Returns None while another owner is creating or ending it: try
    again soon. Raises StorageFull, OSError."""
    if not paths.state.exists():
        reserve.require_room()
    state = _open_or_create(system, paths.state)
    if state is None:
        return None
    try:
        opened = _take(system, paths, state, size, boot) if try_lock_byte(state) else _join(paths, state)
    except BaseException:
        os.close(state)
        raise
    if opened is None:
        os.close(state)
    return opened


def expire_partial(system: System, paths: PartialPaths, before: float, boot: str) -> bool:
    """Drops the partial if it has no owner, and was last written before `before` or under another run of the machine.
    Returns whether it did."""
    if not _is_stale(paths, before, boot):
        return False
    state = _open_or_create(system, paths.state)
    if state is None:
        return False
    try:
        if not try_lock_byte(state) or not is_named(state, paths.state):
            return False
        drop_partial(system, paths, state, PartialStatus.DROPPED)
        return True
    finally:
        os.close(state)


def partials_in(layout: Layout) -> list[tuple[str, Digest]]:
    """Returns the names and digests of the partials that have at least one file."""
    found = set()
    for file in os.listdir(layout.partials):
        with suppress(DigestInvalid):
            found.add(layout.partial_of(file))
    return sorted(found)


def is_named(fd: int, path: Path) -> bool:
    """Returns whether `path` names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def drop_partial(system: System, paths: PartialPaths, state: int, why: PartialStatus) -> None:
    """Stores the final status for the processes that have the state file open, and deletes both files. For the
    owner."""
    progress = read_progress(state)
    with suppress(OSError):  # on a broken disk, the others learn of it when the lock is released
        write_progress(system, state, replace(progress or Progress("", 0), status=why, extents=()))
    with suppress(FileNotFoundError):
        system.unlink(paths.data)
    with suppress(FileNotFoundError):
        system.unlink(paths.state)


def close_data(threads: Executor, data: int) -> None:
    """Closes the data file. If it was deleted, a thread does it: closing waits while the file system frees its
    blocks."""
    if os.fstat(data).st_nlink:
        os.close(data)
        return
    try:
        threads.submit(os.close, data)
    except RuntimeError:  # the registry is being closed
        os.close(data)


def write_progress(system: System, state: int, progress: Progress) -> None:
    write_fully(system, state, memoryview(progress.encode()), 0)


def _open_or_create(system: System, path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return system.open(path, os.O_RDWR)
    with suppress(FileExistsError):
        return system.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    return None


def _take(system: System, paths: PartialPaths, state: int, size: int, boot: str) -> OpenedPartial | None:
    """Opens the partial whose state file was just locked. Drops one that cannot be continued, and returns None then."""
    if not is_named(state, paths.state):
        return None
    if os.fstat(state).st_size == 0:
        return _set_up(system, paths, state, size, boot)
    progress = read_progress(state)
    if progress is None or (progress.boot, progress.size, progress.status) != (boot, size, PartialStatus.RUNNING):
        data = None
    else:
        data = _open_data(paths, progress)
    if progress is None or data is None:
        drop_partial(system, paths, state, PartialStatus.DROPPED)
        return None
    return OpenedPartial(state, data, progress, owned=True)


def _open_data(paths: PartialPaths, progress: Progress) -> int | None:
    """Opens the data file. An owner that was killed during the commit may have moved it to the blob's path already."""
    with suppress(FileNotFoundError):
        return os.open(paths.data, os.O_RDWR | os.O_CLOEXEC)
    if list(progress.extents) == [(0, progress.size)]:
        with suppress(FileNotFoundError):
            return os.open(paths.place, os.O_RDWR | os.O_CLOEXEC)
    return None


def _join(paths: PartialPaths, state: int) -> OpenedPartial | None:
    """Opens the partial while another process owns it."""
    before = read_progress(state)
    if before is None or before.status is not PartialStatus.RUNNING:
        return None
    try:
        data = os.open(paths.data, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    progress = read_progress(state)
    if progress is None or progress.status is not PartialStatus.RUNNING:
        os.close(data)
        return None
    return OpenedPartial(state, data, progress, owned=False)


def _set_up(system: System, paths: PartialPaths, state: int, size: int, boot: str) -> OpenedPartial:
    """Creates the data file, sparse and of the full length, and the state. Checks once whether the disk has space for
    all of it, so that a blob that cannot fit is refused before any byte is fetched."""
    data = -1
    try:
        found = os.fstatvfs(state)
        if size > found.f_bavail * found.f_frsize:
            raise StorageFull(f"there is no room for a blob of {size} bytes")
        with suppress(FileNotFoundError):
            system.unlink(paths.data)
        data = system.open(paths.data, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        system.truncate(data, size)
        write_fully(system, state, memoryview(bytes(RECORD_SIZE)), 0)
        progress = Progress(boot, size)
        write_progress(system, state, progress)
    except BaseException:
        if data >= 0:
            os.close(data)
        with suppress(OSError):
            drop_partial(system, paths, state, PartialStatus.DROPPED)
        raise
    return OpenedPartial(state, data, progress, owned=True)


def _is_stale(paths: PartialPaths, before: float, boot: str) -> bool:
    try:
        state = os.open(paths.state, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        progress = None
    else:
        try:
            progress = read_progress(state)
        finally:
            os.close(state)
    if progress is not None and progress.boot != boot:
        return True
    for path in (paths.data, paths.state):
        with suppress(FileNotFoundError):
            return os.stat(path).st_mtime < before
    return False
