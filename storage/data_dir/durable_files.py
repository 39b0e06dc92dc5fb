"""Blocking functions that write, sync and create files and directories.

Callers store content in this order: write the content under a temporary name, sync the file, rename the file to its
final path, sync the directory, and only then commit the metadata row. This order prevents a crash from leaving metadata
that names missing content. Callers delete content in the opposite order: first the metadata row, then the file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from storage.data_dir.system import DISK_FULL_ERRNOS, System

WRITEBACK_BYTES = 8 * 1024 * 1024
"""Each time a file has grown by this many bytes, `append_chunks` asks the kernel to start writing them to the disk. The
sync of the complete file then takes less time."""
MAX_CHUNKS_PER_CALL = 512
"""Largest number of chunks in one call of pwritev(2). Linux accepts at most 1024 (IOV_MAX)."""


def append_chunks(system: System, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
    """Writes the chunks one after another at `offset`, the end of the file, and returns the new end. If a write fails,
    truncates the file to its previous length and raises OSError."""
    start, remaining = offset, list(chunks)
    try:
        while remaining:
            batch = remaining[:MAX_CHUNKS_PER_CALL]
            written = system.write(fd, batch, offset)
            offset += written
            for chunk in batch:  # removes the written bytes from `remaining`
                if written < len(chunk):
                    remaining[0] = chunk[written:]
                    break
                written -= len(chunk)
                del remaining[0]
    except OSError:
        with suppress(OSError):
            system.truncate(fd, start)
        raise
    if offset // WRITEBACK_BYTES != start // WRITEBACK_BYTES:  # the file has grown past a multiple of `WRITEBACK_BYTES`
        writeback_start = start // WRITEBACK_BYTES * WRITEBACK_BYTES
        system.start_writeback(fd, writeback_start, offset - writeback_start)
    return offset


def write_fully(system: System, fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`. Raises OSError if a write fails. The file may then contain a part of `data`,
    because this function does not truncate it, unlike `append_chunks`."""
    while data:
        written = system.write(fd, [data], offset)
        data, offset = data[written:], offset + written


def sync_file(system: System, path: Path) -> None:
    """Makes the bytes of the file `path` durable, also those that other processes wrote. Does not make its name
    durable. Raises OSError."""
    fd = system.open(path, os.O_RDONLY)
    try:
        system.sync(fd)
    finally:
        os.close(fd)


def sync_directory(system: System, path: Path) -> None:
    """Makes the creation, renaming and deletion of files in the directory `path` durable. Raises OSError."""
    fd = system.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        system.sync(fd)
    finally:
        os.close(fd)


def make_root(system: System, path: Path) -> None:
    """Creates the directory `path` and the missing directories above it, and makes their names durable. Raises
    OSError."""
    missing_directories = []
    while not path.exists():
        missing_directories.append(path)
        path = path.parent
    for directory in reversed(missing_directories):
        with suppress(FileExistsError):  # another process has created it
            system.mkdir(directory)
        with suppress(PermissionError):  # this user may not open the parent directory
            sync_directory(system, directory.parent)


def make_directories(system: System, root: Path, paths: Iterator[Path]) -> None:
    """Creates the directories in `paths` that are missing, and syncs each parent directory once. Raises OSError.

    Syncs the parents even if no directory was missing, because an earlier process may have created the directories and
    died before it synced the parents. If a directory directly in `root` exists already, removes all permissions of
    users other than its owner and its group (mode bits 0o007). If this process may not change the permissions, because
    the directory belongs to another user, leaves them as they are."""
    parents: dict[Path, None] = {root.parent: None}
    for parent, siblings in groupby(paths, lambda path: path.parent):
        parents[parent] = None
        for path in siblings:
            try:
                system.mkdir(path)
            except FileExistsError:
                if parent == root and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o007:
                    with suppress(PermissionError):  # the directory belongs to a different user
                        path.chmod(mode & ~0o007)
    for parent in parents:
        with suppress(PermissionError):  # this user may not open the parent directory
            sync_directory(system, parent)


def make_files(system: System, paths: Iterable[Path]) -> None:
    """Creates an empty file at each of `paths` that does not exist. If the disk becomes full, creates no more files and
    returns without an error. Raises OSError for other failures."""
    for directory, paths_in_directory in groupby(paths, lambda path: path.parent):
        existing_names = set(os.listdir(directory))
        for path in paths_in_directory:
            if path.name in existing_names:
                continue
            try:
                os.close(system.open(path, os.O_RDWR | os.O_CREAT))
            except OSError as error:
                if error.errno not in DISK_FULL_ERRNOS:
                    raise
                return
