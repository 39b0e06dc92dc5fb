"""Writing chunks of bytes at an offset of a file, also if the system writes only a part of the bytes in each call."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from storage.data_dir.durable_files import append_chunks
from storage.data_dir.system import System


class PartialWrites(System):
    """A system that writes at most `max_bytes` bytes in a call. After `calls` calls, the disk is full."""

    def __init__(self, max_bytes: int, calls: int = 1 << 30) -> None:
        super().__init__()
        self.max_bytes = max_bytes
        self.calls = calls

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        self.calls -= 1
        if self.calls < 0:
            raise OSError(28, "No space left on device")
        return super().write(fd, [b"".join(chunks)[: self.max_bytes]], offset)


def _chunks(*sizes: int) -> list[bytes | memoryview]:
    """Returns random chunks of these sizes. Every second chunk is a memoryview."""
    chunks = [os.urandom(size) for size in sizes]
    return [memoryview(chunk) if index % 2 else chunk for index, chunk in enumerate(chunks)]


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("max_bytes", [1 << 30, 100_000, 4097])
@pytest.mark.parametrize(
    "sizes", [(), (0,), (1,), (0, 5, 0), (800_001,), (262_144, 262_144), (70_000,) * 30, (1,) * 2000 + (0, 9)]
)
def test_every_byte_is_written_at_its_offset(fd: int, sizes: tuple[int, ...], max_bytes: int) -> None:
    """Large, tiny and empty chunks are written at the right offsets, whether the system writes all bytes in one call or
    only a part of them in each call."""
    chunks = _chunks(*sizes)
    os.pwrite(fd, b"before", 0)
    assert append_chunks(PartialWrites(max_bytes), fd, chunks, 6) == 6 + sum(sizes)
    assert os.pread(fd, 6 + sum(sizes) + 1, 0) == b"before" + b"".join(chunks)


def test_a_failed_write_is_undone(fd: int) -> None:
    """If the disk becomes full during a call of `append_chunks`, the bytes that this call has written are removed. The
    bytes that the file had before the call stay."""
    os.pwrite(fd, b"before", 0)
    with pytest.raises(OSError, match="No space"):
        append_chunks(PartialWrites(100_000, calls=2), fd, _chunks(900_000), 6)
    assert os.pread(fd, 100, 0) == b"before"
