"""The state file of a partial blob: its progress, for all processes and for those that start after a crash.

The progress is one record with a checksum, overwritten as a whole. A reader that meets a write sees a wrong checksum
and reads again. The file is written with system calls, not through a mapping: on a full disk a call returns an error,
while a write to a mapping kills the process (SIGBUS). After a power cut the record may hold anything, so it counts only
under the run of the machine that wrote it.

A second record holds the failures that owners have reported.
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

RECORD_SIZE = 4096
MAGIC = b"partial1"
_HEAD = struct.Struct("<8sIIQ40s")
_SUM = struct.Struct("<I")
_FAILURES = struct.Struct("<II")
MOST_REASON_BYTES = 2048
"""Longest stored reason, in bytes."""
MOST_EXTENTS = (RECORD_SIZE - _HEAD.size - _SUM.size) // 16
"""Most extents in a record; when the owner dies, bytes in further extents are fetched again."""


class PartialStatus(IntEnum):
    """Status of a partial blob. All but the first are final."""

    RUNNING = 0
    COMMITTED = 1
    BAD = 2
    """The bytes had another digest."""
    DROPPED = 3


@dataclass(frozen=True, slots=True)
class Progress:
    """Which bytes are there. `boot` names the run of the machine under which they were written."""

    boot: str
    size: int
    status: PartialStatus = PartialStatus.RUNNING
    extents: Sequence[Extent] = ()

    def encode(self) -> bytes:
        """Returns the record."""
        bounds = [bound for extent in self.extents[:MOST_EXTENTS] for bound in extent]
        head = _HEAD.pack(MAGIC, self.status, len(bounds), self.size, self.boot.encode()[:40])
        body = head + struct.pack(f"<{len(bounds)}Q", *bounds)
        return body + _SUM.pack(zlib.crc32(body))


def decode_progress(data: bytes) -> Progress | None:
    """Reads a record. Returns None if it is incomplete."""
    if len(data) < _HEAD.size + _SUM.size:
        return None
    magic, status, count, size, boot = _HEAD.unpack_from(data)
    end = _HEAD.size + 8 * count
    if magic != MAGIC or count > 2 * MOST_EXTENTS or len(data) < end + _SUM.size:
        return None
    if _SUM.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        return None
    bounds = struct.unpack_from(f"<{count}Q", data, _HEAD.size)
    extents = list(zip(bounds[::2], bounds[1::2], strict=True))
    return Progress(boot.rstrip(b"\0").decode(), size, PartialStatus(status), extents)


def encode_failures(failures: PartialFailures) -> bytes:
    """Returns the second record."""
    reason = failures.reason.encode(errors="replace")[:MOST_REASON_BYTES]
    body = _FAILURES.pack(failures.times, len(reason)) + reason
    return body + _SUM.pack(zlib.crc32(body))


def read_failures(fd: int) -> PartialFailures:
    """Reads the second record; an incomplete one counts as no failures. Raises OSError."""
    data = os.pread(fd, _FAILURES.size + MOST_REASON_BYTES + _SUM.size, RECORD_SIZE)
    if len(data) < _FAILURES.size + _SUM.size:
        return PartialFailures()
    times, length = _FAILURES.unpack_from(data)
    end = _FAILURES.size + length
    if len(data) < end + _SUM.size or _SUM.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        return PartialFailures()
    return PartialFailures(times, data[_FAILURES.size : end].decode(errors="replace"))


def read_progress(fd: int) -> Progress | None:
    """Reads the progress; None if the record is incomplete. Raises OSError."""
    return decode_progress(os.pread(fd, RECORD_SIZE, 0))
