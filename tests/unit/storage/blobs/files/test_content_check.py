"""The check of a blob's file: the pages that it reads from the disk do not stay in memory, and pages that were in
memory before stay."""

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


def run(file: Path, body: bytes = BODY, *, read_again: bool = False) -> FileCheck:
    check = FileCheck(file, digest_of(body), len(body), read_again=read_again)
    total = 0
    while count := check.read_part():
        assert count <= PART_BYTES
        total += count
    check.close()
    assert total == len(body) or check.problem
    return check


def test_right_bytes(tmp_path: Path) -> None:
    """The check accepts right bytes, also those of an empty blob and of a blob that is exactly as long as one part."""
    for body in (BODY, b"", BODY[:PART_BYTES]):
        (tmp_path / "blob").write_bytes(body)
        assert run(tmp_path / "blob", body).problem is None


@pytest.mark.parametrize("stored", [b"", BODY[:-1], BODY + b"x", BODY[:-1] + bytes([BODY[-1] ^ 1])])
def test_wrong_bytes(tmp_path: Path, stored: bytes) -> None:
    (tmp_path / "blob").write_bytes(stored)
    assert run(tmp_path / "blob").problem is not None


def test_no_file(tmp_path: Path) -> None:
    """If the file's directory does not exist, the check does not say that the blob is lost."""
    with pytest.raises(BytesMissing):
        run(tmp_path / "blob")
    with pytest.raises(StorageFailed, match="mounted"):
        run(tmp_path / "away" / "blob")


@pytest.mark.real_disk
def test_pages_stay_as_they_were(tmp_path: Path) -> None:
    """Before the check, the first 8 pages of the file are in memory, as for a blob that is being pulled. After the
    check they still are, and no others. A second check of the bytes on the disk drops all pages."""
    file = tmp_path / "blob"
    file.write_bytes(BODY)
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        assert resident_pages(fd, len(BODY)) == set()
        os.pread(fd, 8 * mmap.PAGESIZE, 0)
        before = resident_pages(fd, len(BODY))
        assert set(range(8)) <= before
        assert run(file).problem is None
        assert resident_pages(fd, len(BODY)) <= before
        assert 0 in resident_pages(fd, len(BODY))
        assert run(file, read_again=True).problem is None
        assert resident_pages(fd, len(BODY)) == set()
    finally:
        os.close(fd)
