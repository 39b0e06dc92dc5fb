"""A fixture with the folder in which the crash tests store their data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def memory_folder(tmp_path: Path) -> Iterator[Path]:
    """Yields an empty folder, in memory if the system has /dev/shm. Memory is enough, because these tests do not crash
    the machine: they compute what a crash would leave on the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)
