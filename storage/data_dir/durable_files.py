"""Durable steps on blob files, as plain blocking functions: each is called once, in a thread.

Orders (architecture, "What is kept where"): content is synced under a temporary name, renamed into place, and its
directory synced, before any metadata names it; it is moved away only after no metadata names it any more.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from itertools import groupby
from pathlib import Path

from storage.data_dir.system import FULL, System
from storage.errors import StorageFailed, StorageFull, TooManyOpenFiles

WRITEBACK = 8 * 1024 * 1024
"""Bytes after which the kernel is asked to start writing a growing file to the disk."""


class _AsStorageErrors:
    """Not made with `contextmanager`: that takes five times as long, and every small blob passes here."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise storage_error(error) from error


_AS_STORAGE_ERRORS = _AsStorageErrors()


def storage_error(error: OSError, what: str = "the registry's storage failed") -> StorageFull | StorageFailed:
    """What the disk says, as an error that a client can be told. `what` went wrong."""
    if error.errno in FULL:
        return StorageFull()
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return TooManyOpenFiles()
    return StorageFailed(f"{what}: {error.strerror or error}")


def as_storage_errors() -> AbstractContextManager[None]:
    """Turns what the disk says into StorageFull or StorageFailed."""
    return _AS_STORAGE_ERRORS


def write_all(system: System, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
    """Writes the chunks at `offset`; returns where they end. On an error the file is cut back to `offset`."""
    start, rest = offset, list(chunks)
    try:
        while rest:
            part = rest[:512]
            done = system.write(fd, part, offset)
            offset += done
            for chunk in part:
                if done < len(chunk):
                    rest[0] = chunk[done:]
                    break
                done -= len(chunk)
                del rest[0]
    except OSError:
        with suppress(OSError):
            system.truncate(fd, start)
        raise
    if offset // WRITEBACK != start // WRITEBACK:
        begin = start // WRITEBACK * WRITEBACK
        system.start_writeback(fd, begin, offset - begin)
    return offset


def sync_directory(system: System, path: Path) -> None:
    fd = system.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        system.sync(fd)
    finally:
        os.close(fd)


def make_directories(system: System, root: Path, paths: Iterator[Path]) -> None:
    """Makes those that are missing, and syncs their parents once; also where nothing was missing, since whoever made
    them may have been stopped before. What others on this machine could read in `root` they can no longer."""
    parents: dict[Path, None] = {root.parent: None}
    for path in paths:
        try:
            system.mkdir(path)
        except FileExistsError:
            if path.parent == root and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o007:
                path.chmod(mode & ~0o007)
        parents[path.parent] = None
    for parent in parents:
        with suppress(PermissionError):  # somebody else's directory around the data directory
            sync_directory(system, parent)


def make_files(system: System, paths: Iterable[Path]) -> None:
    """Makes empty files where they are missing. On a full disk as many as there is room for. Raises OSError."""
    for directory, wanted in groupby(paths, lambda path: path.parent):
        there = set(os.listdir(directory))
        for path in wanted:
            if path.name in there:
                continue
            try:
                os.close(system.open(path, os.O_RDWR | os.O_CREAT))
            except OSError as error:
                if error.errno not in FULL:
                    raise
                return


def try_flock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Flock:
    """Holds the lock of an open file in a `with` block; waits for it. For steps that last no longer than one write.
    Raises OSError. Every change of the metadata passes here: see `_AsStorageErrors`."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)
