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

from storage.blobs.extents import Extent
from storage.content import GivenUp

ROOM = 4096
MAGIC = b"partial1"
_HEAD = struct.Struct("<8sIIQ40s")
_SUM = struct.Struct("<I")
_GIVEN_UP = struct.Struct("<II")
REASON = 2048
"""Bytes of a reason that are kept."""
MOST = (ROOM - _HEAD.size - _SUM.size) // 16
"""Extents that are kept; those after them are fetched again when the owner dies."""


class Status(IntEnum):
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
    status: Status = Status.RUNNING
    extents: Sequence[Extent] = ()

    def encode(self) -> bytes:
        bounds = [bound for extent in self.extents[:MOST] for bound in extent]
        head = _HEAD.pack(MAGIC, self.status, len(bounds), self.size, self.boot.encode()[:40])
        body = head + struct.pack(f"<{len(bounds)}Q", *bounds)
        return body + _SUM.pack(zlib.crc32(body))


def decode(data: bytes) -> Progress | None:
    """None where this is no whole record."""
    if len(data) < _HEAD.size + _SUM.size:
        return None
    magic, status, count, size, boot = _HEAD.unpack_from(data)
    end = _HEAD.size + 8 * count
    if magic != MAGIC or count > 2 * MOST or len(data) < end + _SUM.size:
        return None
    if _SUM.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        return None
    bounds = struct.unpack_from(f"<{count}Q", data, _HEAD.size)
    extents = list(zip(bounds[::2], bounds[1::2], strict=True))
    return Progress(boot.rstrip(b"\0").decode(), size, Status(status), extents)


def encode_given_up(given_up: GivenUp) -> bytes:
    reason = given_up.reason.encode(errors="replace")[:REASON]
    body = _GIVEN_UP.pack(given_up.times, len(reason)) + reason
    return body + _SUM.pack(zlib.crc32(body))


def read_given_up(fd: int) -> GivenUp:
    """Nobody did where it cannot be read. Raises OSError."""
    data = os.pread(fd, _GIVEN_UP.size + REASON + _SUM.size, ROOM)
    if len(data) < _GIVEN_UP.size + _SUM.size:
        return GivenUp()
    times, length = _GIVEN_UP.unpack_from(data)
    end = _GIVEN_UP.size + length
    if len(data) < end + _SUM.size or _SUM.unpack_from(data, end)[0] != zlib.crc32(data[:end]):
        return GivenUp()
    return GivenUp(times, data[_GIVEN_UP.size : end].decode(errors="replace"))


def read_progress(fd: int) -> Progress | None:
    """Raises OSError."""
    return decode(os.pread(fd, ROOM, 0))
