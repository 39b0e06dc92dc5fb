"""Blocking functions that write, sync and create files and directories.

Callers store content in this order: write the content under a temporary name, sync the file, rename the file to its
final path, sync the directory, and only then commit the metadata row. Callers delete content in the opposite order:
first the metadata row, then the file. After a crash in either sequence, no metadata row names missing content.
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
"""When a file grows past a multiple of this size, `append_chunks` asks the kernel to start writing the new bytes to the
disk. The sync of the complete file then takes less time."""
MAX_CHUNKS_PER_CALL = 512
"""Largest number of chunks in one call of pwritev(2). Linux accepts at most 1024 (IOV_MAX)."""


def append_chunks(system: System, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
    """Appends the chunks to the file and returns the file's new length. `offset`: the present length. If a write fails,
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
    """Writes all of `data` at `offset`. Raises OSError if a write fails; the file may then contain a part of `data`."""
    while data:
        written = system.write(fd, [data], offset)
        data, offset = data[written:], offset + written


def sync_file(system: System, path: Path) -> None:
    """Makes the bytes of the file `path` durable, including bytes that other processes wrote. Does not make the file's
    name durable (see `sync_directory`). Raises OSError."""
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


def make_directory_and_parents(system: System, path: Path) -> None:
    """Creates the directory `path` and the missing directories above it, and makes the names of the new directories
    durable. Raises OSError."""
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
    """Creates the missing directories in `paths`, and syncs each parent directory once. Raises OSError.

    - Syncs all parents, even if no directory is missing: an earlier process may have died before it synced them.
    - Removes the permissions for others (mode bits 0o007) from each directory that is directly in `root` and exists
      already. Leaves the permissions as they are if the directory belongs to another user."""
    parents: dict[Path, None] = {root.parent: None}
    for parent, siblings in groupby(paths, lambda path: path.parent):
        parents[parent] = None
        for path in siblings:
            try:
                system.mkdir(path)
            except FileExistsError:
                if parent == root and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o007:
                    with suppress(PermissionError):  # the directory belongs to another user
                        path.chmod(mode & ~0o007)
    for parent in parents:
        with suppress(PermissionError):  # this user may not open the parent directory
            sync_directory(system, parent)


def make_files(system: System, paths: Iterable[Path]) -> None:
    """Creates an empty file at each path that does not exist. If the disk is full, creates no more files and returns
    without an error. Raises OSError for other failures."""
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
