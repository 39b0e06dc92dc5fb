"""Writes, syncs and creates files and directories, durably. All functions block.

Order (architecture, "What is kept where"): content is synced under a temporary name, renamed into place, and its
directory synced, before metadata names it; it is moved away only after no metadata names it any more.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from storage.data_dir.system import FULL, System

WRITEBACK = 8 * 1024 * 1024
"""Bytes of a growing file after which the kernel is asked to start writing them to the disk."""


def write_all(system: System, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
    """Writes the chunks at `offset`, and returns where they end. On an error it truncates the file to `offset`. Raises
    OSError."""
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


def write_fully(system: System, fd: int, data: memoryview, offset: int) -> None:
    """Writes all of `data` at `offset`. Unlike `write_all`, it leaves the bytes of a write that fails. Raises
    OSError."""
    while data:
        done = system.write(fd, [data], offset)
        data, offset = data[done:], offset + done


def sync_directory(system: System, path: Path) -> None:
    """Makes the names in a directory durable. Raises OSError."""
    fd = system.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        system.sync(fd)
    finally:
        os.close(fd)


def make_directories(system: System, root: Path, paths: Iterator[Path]) -> None:
    """Creates the directories that are missing, and syncs each parent once; also if none was missing, since the process
    that created them may have been stopped before its sync. Takes away access to directories in `root` from other users
    of the machine. Raises OSError."""
    parents: dict[Path, None] = {root.parent: None}
    for path in paths:
        try:
            system.mkdir(path)
        except FileExistsError:
            if path.parent == root and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o007:
                path.chmod(mode & ~0o007)
        parents[path.parent] = None
    for parent in parents:
        with suppress(PermissionError):  # the data directory may lie in a directory of another user
            sync_directory(system, parent)


def make_files(system: System, paths: Iterable[Path]) -> None:
    """Creates empty files that are missing; on a full disk, as many as there is space for. Raises OSError."""
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
