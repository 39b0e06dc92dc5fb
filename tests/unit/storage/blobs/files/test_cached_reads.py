"""Opening and reading files without waiting for the disk. A call succeeds if the kernel has the needed data in memory.
Otherwise it returns None, and the caller makes another call, which may wait for the disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.blobs.files.cached_reads import CachedOpener, read_cached
from storage.data_dir.check import file_system_type
from tests.fakes.open_files import open_files

pytestmark = pytest.mark.real_disk

DATA = os.urandom(100_000)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / "file"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def opener(tmp_path: Path) -> Iterator[CachedOpener]:
    opener = CachedOpener(tmp_path)
    yield opener
    opener.close()


def test_a_name_in_memory_is_opened(opener: CachedOpener, file: Path) -> None:
    """If the kernel has the file's name in memory, the file is opened. The descriptor is for reading only, and child
    processes do not inherit it."""
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
    """If the kernel has in memory that the file does not exist, the open raises FileNotFoundError. If it would have to
    read the directory from the disk, the open returns None."""
    with contextlib.suppress(FileNotFoundError):
        assert opener.open("folder/missing") is None
    assert not (file.parent / "missing").exists()  # now the kernel has in memory that the file does not exist
    with pytest.raises(FileNotFoundError) as caught:
        opener.open("folder/missing")
    assert caught.value.filename == "folder/missing"


def test_a_closed_opener_opens_nothing(tmp_path: Path, file: Path) -> None:
    """After `close`, the opener opens no file, and its own descriptor is closed."""
    opener = CachedOpener(tmp_path)
    assert len(open_files(os.getpid(), str(tmp_path))) == 1
    opener.close()
    assert opener.open("folder/file") is None
    assert open_files(os.getpid(), str(tmp_path)) == []


def test_read_of_uncached_bytes_does_not_wait(file: Path) -> None:
    """If some of the bytes are not in memory, the result is None instead of fewer bytes. After another call has read
    the bytes from the disk, the result is all bytes."""
    with file.open("rb") as opened:
        fd = opened.fileno()
        os.fsync(fd)
        if file_system_type(file) != "tmpfs":  # some machines have their temporary files in memory
            for _ in range(1000):  # the kernel may keep the bytes, or read them again before they are requested
                os.posix_fadvise(fd, len(DATA) // 2, 0, os.POSIX_FADV_DONTNEED)
                if (data := read_cached(fd, 0, len(DATA))) is None:
                    break
                assert data == DATA
            assert data is None
        os.pread(fd, len(DATA), 0)
        assert read_cached(fd, 0, len(DATA)) == DATA


def test_a_file_system_without_reads_from_memory_only() -> None:
    """If the file system cannot read only from memory, the result is None, as if the bytes were not in memory."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(DATA)
        file.flush()
        assert read_cached(file.fileno(), 0, 10) in (None, DATA[:10])


def test_a_read_beyond_the_end_of_the_file(file: Path) -> None:
    """If the file ends before the requested range ends, the result is None, as if the bytes were not in memory. The
    next read, which may wait for the disk, finds out that the file is too short."""
    with file.open("rb") as opened:
        assert read_cached(opened.fileno(), 99_999, 2) is None
