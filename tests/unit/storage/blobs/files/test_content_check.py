"""The check of a blob's file against the blob's digest."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from storage.blobs.blob_store import BytesMissing
from storage.blobs.files.content_check import PART_BYTES, FileCheck
from storage.content import digest_of
from storage.errors import StorageFailed
from tests.unit.storage.blobs.files.page_residency import resident_pages

BODY = os.urandom(3 * PART_BYTES + 5000)


def check_file(file: Path, body: bytes = BODY, *, from_disk: bool = False) -> FileCheck:
    check = FileCheck(file, digest_of(body), len(body), from_disk=from_disk)
    bytes_read = 0
    while count := check.read_part():
        assert count <= PART_BYTES
        bytes_read += count
    check.close()
    assert bytes_read == len(body) or check.problem
    return check


def test_right_bytes(tmp_path: Path) -> None:
    """A file with the right bytes has no problem. The blob may be empty, or exactly one part long."""
    for body in (BODY, b"", BODY[:PART_BYTES]):
        (tmp_path / "blob").write_bytes(body)
        assert check_file(tmp_path / "blob", body).problem is None


@pytest.mark.parametrize("stored", [b"", BODY[:-1], BODY + b"x", BODY[:-1] + bytes([BODY[-1] ^ 1])])
def test_wrong_bytes(tmp_path: Path, stored: bytes) -> None:
    """The check finds a problem if the file is too short or too long, or has a wrong bit."""
    (tmp_path / "blob").write_bytes(stored)
    assert check_file(tmp_path / "blob").problem is not None


def test_a_missing_file(tmp_path: Path) -> None:
    """The check of a missing file raises `BytesMissing`. Without the directory, it raises another error, because the
    disk may not be mounted."""
    with pytest.raises(BytesMissing):
        check_file(tmp_path / "blob")
    with pytest.raises(StorageFailed, match="mounted"):
        check_file(tmp_path / "away" / "blob")


@pytest.mark.real_disk
def test_check_leaves_the_page_cache_unchanged(tmp_path: Path) -> None:
    """The check brings no further pages of the file into memory. A check with `from_disk` leaves none in memory."""
    file = tmp_path / "blob"
    file.write_bytes(BODY)
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        assert resident_pages(fd, len(BODY)) == set()
        os.pread(fd, 8 * mmap.PAGESIZE, 0)
        pages_before = resident_pages(fd, len(BODY))
        assert set(range(8)) <= pages_before
        assert check_file(file).problem is None
        assert resident_pages(fd, len(BODY)) <= pages_before
        assert 0 in resident_pages(fd, len(BODY))
        assert check_file(file, from_disk=True).problem is None
        assert resident_pages(fd, len(BODY)) == set()
    finally:
        os.close(fd)
