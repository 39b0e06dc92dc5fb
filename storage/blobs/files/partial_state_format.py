"""The format of a partial blob's state file, which says which bytes of the blob are stored.

A *partial blob* is a blob that is still being downloaded from an upstream registry. Its *owner* is the process that
downloads the blob and writes the state file. Other processes that want the blob read the state file. If the owner dies,
one of these processes becomes the next owner.

The file has two records, each with a checksum:

- The progress (`PartialProgress`). The owner overwrites the whole record after each change. A process that reads the
  record during such a write finds a wrong checksum and reads again. The bytes of a partial blob are not synced to the
  disk, so after a restart of the machine the record is not used.
- The number of failed downloads that owners have reported, and the reason of the last failure.

The file is written with system calls, not through a memory mapping. On a full disk, a system call returns an error, but
a write to a mapping kills the process (SIGBUS).
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
"""Number of bytes that the file reserves for the first record. The second record starts at this offset."""
MAGIC = b"partial1"
"""The first bytes of the file, which identify the format."""
_PROGRESS_HEAD = struct.Struct("<8sIIQ40s")
"""Head of the first record: `MAGIC`, status, number of 8-byte offsets that follow (two for each range of stored bytes),
size of the blob, boot id."""
_CHECKSUM = struct.Struct("<I")
"""End of each record: the CRC-32 of the rest of the record."""
_FAILURES_HEAD = struct.Struct("<II")
"""Head of the second record: number of failures, length of the reason in bytes."""
MAX_REASON_BYTES = 2048
"""Largest length of the reason in the second record, in bytes. `encode_failures` truncates a longer reason."""
MAX_STORED_EXTENTS = (PROGRESS_RECORD_SIZE - _PROGRESS_HEAD.size - _CHECKSUM.size) // 16  # two 8-byte offsets each
"""Largest number of extents (ranges of stored bytes) that fit in the first record. Further extents are left out. If the
owner dies, the next owner downloads their bytes again."""


class PartialStatus(IntEnum):
    """Status of a partial blob. The status changes at most once: from `INCOMPLETE` to another value."""

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
    """The first record: which bytes of the blob are stored.

    - `boot`: the machine's boot id at the time when the bytes were written. Each restart of the machine changes the id.
    - `size`: size of the whole blob in bytes.
    - `extents`: ranges of stored bytes, in ascending order. A range is the offset of its first byte, and the offset
      after its last byte."""

    boot: str
    size: int
    status: PartialStatus = PartialStatus.INCOMPLETE
    extents: Sequence[Extent] = ()

    def encode(self) -> bytes:
        """Returns the record as it is stored. Leaves out the extents after the first `MAX_STORED_EXTENTS`."""
        bounds = [bound for extent in self.extents[:MAX_STORED_EXTENTS] for bound in extent]
        head = _PROGRESS_HEAD.pack(MAGIC, self.status, len(bounds), self.size, self.boot.encode()[:40])
        body = head + struct.pack(f"<{len(bounds)}Q", *bounds)
        return body + _CHECKSUM.pack(zlib.crc32(body))


def decode_progress(data: bytes) -> PartialProgress | None:
    """Decodes the first record. Returns None if the record is not valid: if it is too short, does not begin with
    `MAGIC`, has too many extents, or has a wrong checksum."""
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
    """Returns the second record as it is stored."""
    reason = failures.reason.encode(errors="replace")[:MAX_REASON_BYTES]
    body = _FAILURES_HEAD.pack(failures.count, len(reason)) + reason
    return body + _CHECKSUM.pack(zlib.crc32(body))


def read_failures(fd: int) -> PartialFailures:
    """Reads the second record of an open state file. Returns `PartialFailures()`, which has no failures, if the
    record is missing or has a wrong checksum. Raises OSError."""
    data = os.pread(fd, _FAILURES_HEAD.size + MAX_REASON_BYTES + _CHECKSUM.size, PROGRESS_RECORD_SIZE)
    if len(data) < _FAILURES_HEAD.size + _CHECKSUM.size:
        return PartialFailures()
    failure_count, reason_length = _FAILURES_HEAD.unpack_from(data)
    end = _FAILURES_HEAD.size + reason_length
    if len(data) < end + _CHECKSUM.size or _CHECKSUM.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        return PartialFailures()
    return PartialFailures(failure_count, data[_FAILURES_HEAD.size : end].decode(errors="replace"))
