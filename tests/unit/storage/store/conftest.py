"""Content for tests of partial blobs: a blob of a bit more than 3 MiB, and functions that write and read its bytes. A
partial blob is a file with those bytes of a blob that the mirror has downloaded so far."""

from __future__ import annotations

import asyncio
import os

from storage.partials import Partial
from tests.fakes.partial_peer import content, digest

SIZE = 3 * 1024 * 1024 + 17
BODY, DIGEST = content(1, SIZE), digest(1, SIZE)
"""The bytes of the blob, which are random with the seed 1, and their digest."""
PIECE_BYTES = 64 * 1024


async def write_missing(partial: Partial, body: bytes = BODY) -> None:
    """Writes all missing bytes of the partial blob."""
    for start, stop in partial.missing():
        await asyncio.to_thread(partial.write_at, start, body[start:stop])


def read_bytes(partial: Partial, start: int, stop: int) -> bytes:
    """Returns the bytes from `start` to `stop` of the partial blob's file."""
    return os.pread(partial.file.fd, stop - start, partial.file.offset + start)
