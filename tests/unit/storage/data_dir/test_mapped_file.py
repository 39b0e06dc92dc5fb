"""Which bytes of a file are in memory. The answer is exact, and the question has no side effects."""

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


def counts(fd: int, start: int, at: int, stop: int) -> int:
    mapped = MappedFile.try_map(fd, start, max(stop, SIZE))
    assert mapped is not None
    try:
        return mapped.count_resident(at, stop)
    finally:
        mapped.close()


@pytest.mark.parametrize("start", [0, 5, PAGESIZE, 3 * PAGESIZE + 7])
def test_what_was_just_written(fd: int, start: int) -> None:
    """All bytes of a file that was just written are in memory."""
    for at in (start, start + 1, start + PAGESIZE):
        for stop in (at + 1, at + PAGESIZE, SIZE - 1, SIZE):
            assert counts(fd, start, at, stop) == stop - at


def test_beyond_the_end(fd: int) -> None:
    """Bytes beyond the end of the file are not in memory."""
    assert counts(fd, 0, 10, SIZE + 10 * PAGESIZE) == PAGES * PAGESIZE - 10
    assert counts(fd, 0, SIZE + PAGESIZE, SIZE + 2 * PAGESIZE) == 0


def test_what_the_kernel_has_dropped(fd: int) -> None:
    """Pages that the kernel has dropped are not in memory, however often the question is asked. After a read, the pages
    that were read are in memory."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if counts(fd, 0, 0, SIZE) == SIZE:
        return  # the file system lives in memory
    for _ in range(5):
        assert counts(fd, 0, 0, SIZE) == 0
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead
    os.pread(fd, 10 * PAGESIZE, 100 * PAGESIZE)
    assert counts(fd, 0, 0, SIZE) == 0
    assert 10 * PAGESIZE - 7 <= counts(fd, 0, 100 * PAGESIZE + 7, SIZE) < 500 * PAGESIZE


def test_what_is_viewed(fd: int) -> None:
    """A view has the bytes of the file, for any range, also after its pages were released."""
    data = os.pread(fd, SIZE, 0)
    for start in (0, 5, 3 * PAGESIZE + 7):
        mapped = MappedFile.try_map(fd, start, SIZE)
        assert mapped is not None
        for at, stop in ((start, SIZE), (start + 1, start + PAGESIZE), (SIZE - 1, SIZE)):
            with mapped.view(at, stop) as view:
                assert view.readonly
                assert view == data[at:stop]
            mapped.release_before(stop)
        with mapped.view(start, SIZE) as view:
            assert view == data[start:]
        mapped.close()


def test_what_is_let_go(fd: int) -> None:
    """The pages of a view count as memory of this process until they are released."""
    file = MappedFile.try_map(fd, 0, SIZE)
    assert file is not None
    with file.view(0, SIZE) as view:
        assert len(bytes(view)) == SIZE
    assert mapped(fd) >= SIZE // 1024
    file.release_before(SIZE)
    assert mapped(fd) <= PAGESIZE // 1024
    file.close()


def mapped(fd: int) -> int:
    """Returns how many KiB of the file this process has in its memory."""
    path = os.readlink(f"/proc/self/fd/{fd}")
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    found = 0
    for line in lines:
        if line.endswith(path):
            found += next(int(value.split()[1]) for value in lines if value.startswith("Rss:"))
    return found


def test_nobody_can_tell() -> None:
    """For a file that cannot be mapped, the answer is None."""
    with open("/proc/version", "rb") as file:
        assert MappedFile.try_map(file.fileno(), 0, 10) is None
