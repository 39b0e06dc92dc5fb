"""How far a partial blob is, as its state file says it to all processes and to those that come after a crash.

One record, written whole over the one before and closed by a checksum: whoever reads while it is written sees that, and
reads again. It is written with a call and not through a mapping, since a full disk is told to a call and kills whoever
writes to a mapping. A power cut may leave any of it, so it counts only under the run of the machine that wrote it.

A second record follows once an owner has given up: why it did.
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
"""Bytes of a reason that are kept."""
MOST_EXTENTS = (RECORD_SIZE - _HEAD.size - _SUM.size) // 16
"""Extents that are kept; those after them are fetched again when the owner dies."""


class PartialStatus(IntEnum):
    """What became of a partial blob. All but the first are for ever."""

    RUNNING = 0
    COMMITTED = 1
    BAD = 2
    """The bytes had another digest."""
    DROPPED = 3


@dataclass(frozen=True, slots=True)
class Progress:
    """`boot` names the run of the machine under which the bytes were written."""

    boot: str
    size: int
    status: PartialStatus = PartialStatus.RUNNING
    extents: Sequence[Extent] = ()

    def encode(self) -> bytes:
        bounds = [bound for extent in self.extents[:MOST_EXTENTS] for bound in extent]
        head = _HEAD.pack(MAGIC, self.status, len(bounds), self.size, self.boot.encode()[:40])
        body = head + struct.pack(f"<{len(bounds)}Q", *bounds)
        return body + _SUM.pack(zlib.crc32(body))


def decode_progress(data: bytes) -> Progress | None:
    """None where this is no whole record."""
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


def encode_failures(given_up: PartialFailures) -> bytes:
    reason = given_up.reason.encode(errors="replace")[:MOST_REASON_BYTES]
    body = _FAILURES.pack(given_up.times, len(reason)) + reason
    return body + _SUM.pack(zlib.crc32(body))


def read_failures(fd: int) -> PartialFailures:
    """Nobody did where it cannot be read. Raises OSError."""
    data = os.pread(fd, _FAILURES.size + MOST_REASON_BYTES + _SUM.size, RECORD_SIZE)
    if len(data) < _FAILURES.size + _SUM.size:
        return PartialFailures()
    times, length = _FAILURES.unpack_from(data)
    end = _FAILURES.size + length
    if len(data) < end + _SUM.size or _SUM.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        return PartialFailures()
    return PartialFailures(times, data[_FAILURES.size : end].decode(errors="replace"))


def read_progress(fd: int) -> Progress | None:
    """Raises OSError."""
    return decode_progress(os.pread(fd, RECORD_SIZE, 0))
