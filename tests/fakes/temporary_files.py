"""Folders for the files of tests. They are in memory, or on a disk if a test needs one.

Most tests create a data directory, which syncs files and reserves space. On a disk, this can take longer than the rest
of the test.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY_DISK = Path("/dev/shm")
_SHARED_FOLDER = "TESTS_SHARED_FOLDER"
_MIN_FREE_BYTES = 4 << 30
"""Number of free bytes that the file system in memory must have, because all tests together may need as many."""


def memory_root() -> Path | None:
    """Returns the folder of a file system in memory with enough free space; None if there is none."""
    has_space = _MEMORY_DISK.is_dir() and shutil.disk_usage(_MEMORY_DISK).free > _MIN_FREE_BYTES
    return _MEMORY_DISK if has_space else None


def make_shared_folder() -> Path:
    """Makes a folder on a disk that this process and all processes that it starts share (`shared_folder`). Returns the
    folder."""
    folder = Path(tempfile.mkdtemp(prefix="entrepot-shared-"))
    os.environ[_SHARED_FOLDER] = str(folder)
    return folder


def shared_folder() -> Path:
    """Returns the folder that all test processes of this run share. It is deleted when the run ends."""
    return Path(os.environ[_SHARED_FOLDER])


def make_named_folder(parent: Path, prefix: str) -> Path:
    """Makes a folder with an unused name of `prefix` and hexadecimal digits. `tempfile` also uses underscores, and
    podman refuses `oci:PATH` if a part of the path ends with one, because it reads the path as the name of an image."""
    folder = parent / f"{prefix}{secrets.token_hex(4)}"
    folder.mkdir(mode=0o700)
    return folder


@contextmanager
def system_folder() -> Iterator[Path]:
    """Yields an empty folder with a short path, for whole Debian systems and for the storage of a dockerd. Device nodes
    work in this folder. It is in memory if there is enough free space, because the many syncs of a package manager take
    no time there. Needs root."""
    with tempfile.TemporaryDirectory(prefix="ent-", dir="/tmp", ignore_cleanup_errors=True) as name:
        if memory_root() is None:
            yield Path(name)
            return
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8g,mode=755", "tests", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", "--lazy", name], check=True)


@contextmanager
def disk_folder() -> Iterator[Path]:
    """Yields an empty folder on the system's disk, for tests of the page cache and for more data than fits into
    memory."""
    with tempfile.TemporaryDirectory(prefix="entrepot-", ignore_cleanup_errors=True) as name:
        yield Path(name)
