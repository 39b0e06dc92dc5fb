"""Opening and reading files without waiting for the disk: what the kernel has in memory is used at once, everything
else is left to a call that may wait."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.blobs.files.cached_reads import CachedOpener, read_cached

pytestmark = pytest.mark.real_disk

DATA = os.urandom(100_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    made = tmp_path / "folder" / "file"
    made.write_bytes(DATA)
    return made


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[CachedOpener]:
    opener = CachedOpener(tmp_path)
    yield opener
    opener.close()


def test_a_known_name_is_opened(opener: CachedOpener, file: Path) -> None:
    """The descriptor reads the file, and no child process inherits it."""
    assert file.exists()
    fd = opener.open("folder/file")
    assert fd is not None
    try:
        assert read_cached(fd, 0, len(DATA)) == DATA
        assert read_cached(fd, 99_000, 1000) == DATA[99_000:]
        assert not os.get_inheritable(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(fd, b"x")
    finally:
        os.close(fd)


def test_a_missing_name_is_missing_or_unknown(opener: CachedOpener, file: Path) -> None:
    """If the kernel knows that there is no such file, the open raises FileNotFoundError. If it does not know, the open
    returns nothing, and a call that may wait has to look."""
    with contextlib.suppress(FileNotFoundError):
        assert opener.open("folder/missing") is None
    assert not (file.parent / "missing").exists()  # now it is known
    with pytest.raises(FileNotFoundError) as caught:
        opener.open("folder/missing")
    assert caught.value.filename == "folder/missing"


def test_a_closed_opener_opens_nothing(tmp_path: Path, file: Path) -> None:
    """After `close`, the opener opens no file, and its own descriptor is closed."""
    before = os.listdir("/proc/self/fd")
    opener = CachedOpener(tmp_path)
    opener.close()
    assert opener.open("folder/file") is None
    assert os.listdir("/proc/self/fd") == before


def test_cold_bytes_are_not_waited_for(file: Path) -> None:
    """If some of the bytes are not in memory, the result is None, and not fewer bytes, until another call has read
    them."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert read_cached(opened.fileno(), 0, len(DATA)) in (None, DATA)  # DATA: the file system lives in memory
        os.pread(opened.fileno(), len(DATA), 0)
        assert read_cached(opened.fileno(), 0, len(DATA)) in (None, DATA)


def test_a_file_system_that_cannot_tell() -> None:
    """If the file system cannot tell what is in memory, nothing counts as in memory."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(DATA)
        file.flush()
        assert read_cached(file.fileno(), 0, 10) in (None, DATA[:10])


def test_beyond_the_end_is_for_who_reads(file: Path) -> None:
    """A file that is shorter than expected looks like one that is not in memory. A read that may wait finds out which
    it is."""
    with file.open("rb") as opened:
        assert read_cached(opened.fileno(), 99_999, 2) is None
