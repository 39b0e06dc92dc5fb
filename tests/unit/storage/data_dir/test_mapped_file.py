"""`MappedFile` counts exactly how many bytes from an offset on are in memory without a gap, without side effects. It
also returns views of the file's bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from mmap import PAGESIZE
from pathlib import Path

import pytest

from storage.data_dir.mapped_file import MappedFile

pytestmark = pytest.mark.real_disk

PAGES = 600
SIZE = PAGES * PAGESIZE - 100


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(fd, os.urandom(SIZE))
    os.fsync(fd)
    yield fd
    os.close(fd)


def resident_prefix(fd: int, start: int, at: int, stop: int) -> int:
    """Maps the file from the offset `start`. Returns how many bytes from `at` on are in memory without a gap, up to
    `stop`."""
    mapped_file = MappedFile.try_map(fd, start, max(stop, SIZE))
    assert mapped_file is not None
    try:
        return mapped_file.resident_prefix(at, stop)
    finally:
        mapped_file.close()


@pytest.mark.parametrize("start", [0, 5, PAGESIZE, 3 * PAGESIZE + 7])
def test_written_bytes_are_in_memory(fd: int, start: int) -> None:
    """All bytes of a file that was just written are in memory."""
    for at in (start, start + 1, start + PAGESIZE):
        for stop in (at + 1, at + PAGESIZE, SIZE - 1, SIZE):
            assert resident_prefix(fd, start, at, stop) == stop - at


def test_beyond_the_end(fd: int) -> None:
    """The bytes after the end of the file count as in memory up to the end of the last page, and not after it."""
    assert resident_prefix(fd, 0, 10, SIZE + 10 * PAGESIZE) == PAGES * PAGESIZE - 10
    assert resident_prefix(fd, 0, SIZE + PAGESIZE, SIZE + 2 * PAGESIZE) == 0


def test_dropped_pages_are_not_in_memory(fd: int) -> None:
    """Pages that the kernel has dropped are not in memory, and counting them does not load them. After a read, the
    pages that were read are in memory."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if resident_prefix(fd, 0, 0, SIZE) == SIZE:
        return  # the file system is in memory
    for _ in range(5):
        assert resident_prefix(fd, 0, 0, SIZE) == 0
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    os.pread(fd, 10 * PAGESIZE, 100 * PAGESIZE)
    assert resident_prefix(fd, 0, 0, SIZE) == 0
    assert 10 * PAGESIZE - 7 <= resident_prefix(fd, 0, 100 * PAGESIZE + 7, SIZE) < 500 * PAGESIZE


def test_views_have_the_bytes_of_the_file(fd: int) -> None:
    """A view of any range has the bytes of the file, also after the pages of this range were released."""
    data = os.pread(fd, SIZE, 0)
    for start in (0, 5, 3 * PAGESIZE + 7):
        mapped_file = MappedFile.try_map(fd, start, SIZE)
        assert mapped_file is not None
        for at, stop in ((start, SIZE), (start + 1, start + PAGESIZE), (SIZE - 1, SIZE)):
            with mapped_file.view(at, stop) as view:
                assert view.readonly
                assert view == data[at:stop]
            mapped_file.release_before(stop)
        with mapped_file.view(start, SIZE) as view:
            assert view == data[start:]
        mapped_file.close()


def test_released_pages_no_longer_count_as_memory(fd: int) -> None:
    """The pages of a view count as memory of this process until they are released."""
    file = MappedFile.try_map(fd, 0, SIZE)
    assert file is not None
    with file.view(0, SIZE) as view:
        assert len(bytes(view)) == SIZE
    assert resident_kib(fd) >= SIZE // 1024
    file.release_before(SIZE)
    assert resident_kib(fd) <= PAGESIZE // 1024
    file.close()


def resident_kib(fd: int) -> int:
    """Returns how many KiB of the file this process has in its memory."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    kib = 0
    for line in lines:
        if line.endswith(path):
            kib += next(int(value.split()[1]) for value in lines if value.startswith("Rss:"))
    return kib


def test_a_file_that_cannot_be_mapped() -> None:
    """`try_map` returns None for a file that cannot be mapped."""
    with open("/proc/version", "rb") as file:
        assert MappedFile.try_map(file.fileno(), 0, 10) is None
