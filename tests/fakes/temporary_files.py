"""Where tests put their files: in memory, or on a disk if that matters.

Most tests make a data directory, which syncs and reserves space. On a disk, this can take longer than the test itself.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_MEMORY_DISK = Path("/dev/shm")
_ROOM = 4 << 30
"""Free bytes in memory that the tests may need together."""


def memory_root() -> Path | None:
    """Returns a file system in memory with enough room; None if there is none."""
    roomy = _MEMORY_DISK.is_dir() and shutil.disk_usage(_MEMORY_DISK).free > _ROOM
    return _MEMORY_DISK if roomy else None


@contextmanager
def system_folder() -> Iterator[Path]:
    """An empty folder with a short path, for whole systems and the storage of a dockerd: device nodes work in it. It is
    in memory if there is room, where a package manager's many syncs cost nothing. Needs root."""
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
    """Yields an empty folder on the system's disk during the block, for tests of the page cache, and for more data than
    fits into memory."""
    with tempfile.TemporaryDirectory(prefix="entrepot-", ignore_cleanup_errors=True) as name:
        yield Path(name)
