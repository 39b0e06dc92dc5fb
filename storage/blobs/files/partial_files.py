"""The files of partial blobs: found, made, dropped. All calls block.

A partial blob has two files in `partials/`: its bytes, and its state (`storage.blobs.files.partial_state`). Whoever
holds the lock on a state file that still has its name owns the partial, and only the owner changes either file or name.
The state is the first to come and the last to go, and says what became of the bytes before they lose their name; so
whoever opened the state and finds it running after opening the bytes has the two that belong together.
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
    """Where a partial's files are, and where its bytes go in the end."""

    state: Path
    data: Path
    place: Path

    @classmethod
    def of(cls, layout: Layout, name: str, digest: Digest) -> PartialPaths:
        return cls(layout.partial_state(name), layout.partial_data(name), layout.blob(digest))


@dataclass(frozen=True, slots=True)
class OpenedPartial:
    """Two open files, and what the state said. `owned`: the lock was free and is held."""

    state: int
    data: int
    progress: Progress
    owned: bool

    def close(self) -> None:
        os.close(self.state)
        os.close(self.data)


def open_partial(system: System, names: PartialPaths, size: int, boot: str, reserve: Reserve) -> OpenedPartial | None:
    """The partial of `size` bytes, made where there is none. Another owner is about to set it up or to end it: None;
    ask again soon. Raises StorageFull, OSError."""
    if not names.state.exists():
        reserve.require_room()
    state = _open_or_create(system, names.state)
    if state is None:
        return None
    try:
        opened = _take(system, names, state, size, boot) if try_lock_byte(state) else _join(names, state)
    except BaseException:
        os.close(state)
        raise
    if opened is None:
        os.close(state)
    return opened


def expire_partial(system: System, names: PartialPaths, before: float, boot: str) -> bool:
    """Drops what nobody owns and nobody wrote since `before`, or what another run of the machine left behind."""
    if not _is_stale(names, before, boot):
        return False
    state = _open_or_create(system, names.state)
    if state is None:
        return False
    try:
        if not try_lock_byte(state) or not is_named(state, names.state):
            return False
        drop_partial(system, names, state, PartialStatus.DROPPED)
        return True
    finally:
        os.close(state)


def partials_in(layout: Layout) -> list[tuple[str, Digest]]:
    """Those that have a file of either kind: their names and digests."""
    found = set()
    for file in os.listdir(layout.partials):
        with suppress(DigestInvalid):
            found.add(layout.partial_of(file))
    return sorted(found)


def is_named(fd: int, path: Path) -> bool:
    """Whether `path` names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def drop_partial(system: System, names: PartialPaths, state: int, why: PartialStatus) -> None:
    """The owner's: tells all who have it open what became of it, and takes both names away."""
    progress = read_progress(state)
    with suppress(OSError):  # on a broken disk: they learn of it when the lock falls
        write_progress(system, state, replace(progress or Progress("", 0), status=why, extents=()))
    with suppress(FileNotFoundError):
        system.unlink(names.data)
    with suppress(FileNotFoundError):
        system.unlink(names.state)


def close_data(threads: Executor, data: int) -> None:
    """In a thread where its name is gone: the last to close such a file waits while the file system frees its room."""
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


def _take(system: System, names: PartialPaths, state: int, size: int, boot: str) -> OpenedPartial | None:
    """With the lock held. What cannot be gone on with makes way for a new one."""
    if not is_named(state, names.state):
        return None
    if os.fstat(state).st_size == 0:
        return _set_up(system, names, state, size, boot)
    progress = read_progress(state)
    if progress is None or (progress.boot, progress.size, progress.status) != (boot, size, PartialStatus.RUNNING):
        data = None
    else:
        data = _open_data(names, progress)
    if progress is None or data is None:
        drop_partial(system, names, state, PartialStatus.DROPPED)
        return None
    return OpenedPartial(state, data, progress, owned=True)


def _open_data(names: PartialPaths, progress: Progress) -> int | None:
    """An owner that was killed at the very end may have put the bytes in their place already."""
    with suppress(FileNotFoundError):
        return os.open(names.data, os.O_RDWR | os.O_CLOEXEC)
    if list(progress.extents) == [(0, progress.size)]:
        with suppress(FileNotFoundError):
            return os.open(names.place, os.O_RDWR | os.O_CLOEXEC)
    return None


def _join(names: PartialPaths, state: int) -> OpenedPartial | None:
    """While somebody else has the lock."""
    before = read_progress(state)
    if before is None or before.status is not PartialStatus.RUNNING:
        return None
    try:
        data = os.open(names.data, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    progress = read_progress(state)
    if progress is None or progress.status is not PartialStatus.RUNNING:
        os.close(data)
        return None
    return OpenedPartial(state, data, progress, owned=False)


def _set_up(system: System, names: PartialPaths, state: int, size: int, boot: str) -> OpenedPartial:
    """The file of the bytes has its whole length from the start and takes no room yet; whether there is enough is asked
    once, so that a blob that cannot fit is refused before anything of it is fetched."""
    data = -1
    try:
        found = os.fstatvfs(state)
        if size > found.f_bavail * found.f_frsize:
            raise StorageFull(f"there is no room for a blob of {size} bytes")
        with suppress(FileNotFoundError):
            system.unlink(names.data)
        data = system.open(names.data, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        system.truncate(data, size)
        write_fully(system, state, memoryview(bytes(RECORD_SIZE)), 0)
        progress = Progress(boot, size)
        write_progress(system, state, progress)
    except BaseException:
        if data >= 0:
            os.close(data)
        with suppress(OSError):
            drop_partial(system, names, state, PartialStatus.DROPPED)
        raise
    return OpenedPartial(state, data, progress, owned=True)


def _is_stale(names: PartialPaths, before: float, boot: str) -> bool:
    try:
        state = os.open(names.state, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        progress = None
    else:
        try:
            progress = read_progress(state)
        finally:
            os.close(state)
    if progress is not None and progress.boot != boot:
        return True
    for path in (names.data, names.state):
        with suppress(FileNotFoundError):
            return os.stat(path).st_mtime < before
    return False
