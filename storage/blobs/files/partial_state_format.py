"""The format of a partial blob's state file, which says which bytes of the blob are stored.

A *partial blob* is a blob that is still being downloaded from an upstream registry. Its *owner* is the process that
downloads it and writes the state file. The other processes that want the blob read the state file. If the owner dies,
one of them becomes the next owner.

The file has two records, each with a checksum. The first is the progress (`PartialProgress`). The owner overwrites this
whole record after each change. A process that reads the record while the owner writes it finds a wrong checksum and
reads again. After a power cut the record may contain anything, so it is used only until the machine is restarted. The
second record contains the number of failures that owners have reported, and the reason of the last failure.

The file is written with system calls, not through a memory mapping. On a full disk a system call returns an error,
whereas a write to a mapping kills the process (SIGBUS).
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from storage.blobs.files.extents import Extent
from storage.content import PartialFailures

PROGRESS_RECORD_SIZE = 4096
"""Number of bytes that are set aside for the first record. The second record starts at this offset."""
MAGIC = b"partial1"
"""The first bytes of the file, which identify the format."""
_PROGRESS_HEAD = struct.Struct("<8sIIQ40s")
"""Head of the first record: magic, status, number of extent bounds, size of the blob, boot id."""
_CHECKSUM = struct.Struct("<I")
"""End of each record: the CRC-32 of its other bytes."""
_FAILURES_HEAD = struct.Struct("<II")
"""Head of the second record: number of failures, length of the last reason in bytes."""
MAX_REASON_BYTES = 2048
"""Largest length of the reason in the second record, in bytes. A longer reason is truncated."""
MAX_STORED_EXTENTS = (PROGRESS_RECORD_SIZE - _PROGRESS_HEAD.size - _CHECKSUM.size) // 16  # two 8-byte bounds each
"""Largest number of extents (ranges of stored bytes) that fit in the first record. Further extents are not recorded: if
the owner dies, their bytes are downloaded again."""


class PartialStatus(IntEnum):
    """Status of a partial blob. The status changes only once: from `INCOMPLETE` to one of the other values."""

    INCOMPLETE = 0
    """Bytes are missing, or the digest has not been checked yet."""
    COMMITTED = 1
    """The bytes have become a blob."""
    WRONG_DIGEST = 2
    """The bytes did not have the digest of the blob, and were deleted."""
    DELETED = 3
    """The bytes were deleted for another reason than a wrong digest, such as a full disk."""


@dataclass(frozen=True, slots=True)
class PartialProgress:
    """The first record: which bytes of the blob are stored. `boot`: the boot id of the machine when the bytes were
    written; the id changes when the machine is restarted. `size`: size of the whole blob in bytes. `extents`: ranges of
    stored bytes, in ascending order; a range is the offset of its first byte, and the offset after its last byte."""

    boot: str
    size: int
    status: PartialStatus = PartialStatus.INCOMPLETE
    extents: Sequence[Extent] = ()

    def encode(self) -> bytes:
        """Returns the record in the form in which it is stored."""
        bounds = [bound for extent in self.extents[:MAX_STORED_EXTENTS] for bound in extent]
        head = _PROGRESS_HEAD.pack(MAGIC, self.status, len(bounds), self.size, self.boot.encode()[:40])
        body = head + struct.pack(f"<{len(bounds)}Q", *bounds)
        return body + _CHECKSUM.pack(zlib.crc32(body))


def decode_progress(data: bytes) -> PartialProgress | None:
    """Decodes the first record. Returns None if the record is not valid: too short, without `MAGIC`, or with a wrong
    checksum."""
    if len(data) < _PROGRESS_HEAD.size + _CHECKSUM.size:
        return None
    magic, status, bound_count, size, boot = _PROGRESS_HEAD.unpack_from(data)
    end = _PROGRESS_HEAD.size + 8 * bound_count
    if magic != MAGIC or bound_count > 2 * MAX_STORED_EXTENTS or len(data) < end + _CHECKSUM.size:
        return None
    if _CHECKSUM.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        return None
    bounds = struct.unpack_from(f"<{bound_count}Q", data, _PROGRESS_HEAD.size)
    extents = list(zip(bounds[::2], bounds[1::2], strict=True))
    return PartialProgress(boot.rstrip(b"\0").decode(), size, PartialStatus(status), extents)


def read_progress(fd: int) -> PartialProgress | None:
    """Reads the first record of an open state file. Returns None if the record is not valid, for example because
    another process is writing it. Raises OSError."""
    return decode_progress(os.pread(fd, PROGRESS_RECORD_SIZE, 0))


def encode_failures(failures: PartialFailures) -> bytes:
    """Returns the second record in the form in which it is stored. `failures.count` is the number of failures."""
    reason = failures.reason.encode(errors="replace")[:MAX_REASON_BYTES]
    body = _FAILURES_HEAD.pack(failures.count, len(reason)) + reason
    return body + _CHECKSUM.pack(zlib.crc32(body))


def read_failures(fd: int) -> PartialFailures:
    """Reads the second record of an open state file. If the record is missing or its checksum is wrong, returns a
    `PartialFailures` with no failures. Raises OSError."""
    data = os.pread(fd, _FAILURES_HEAD.size + MAX_REASON_BYTES + _CHECKSUM.size, PROGRESS_RECORD_SIZE)
    if len(data) < _FAILURES_HEAD.size + _CHECKSUM.size:
        return PartialFailures()
    failure_count, reason_length = _FAILURES_HEAD.unpack_from(data)
    end = _FAILURES_HEAD.size + reason_length
    if len(data) < end + _CHECKSUM.size or _CHECKSUM.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        return PartialFailures()
    return PartialFailures(failure_count, data[_FAILURES_HEAD.size : end].decode(errors="replace"))
