"""Hashes stored bytes of upload sessions that were not hashed when they arrived (`UploadHasher`).

Stored bytes have to be hashed in these cases:

- The request that completes the upload names a digest of another algorithm than the session's.
- An earlier request stored bytes, but did not save the state of the digest computation over them.
- The machine was rebooted, so the stored bytes may be damaged.
- This process cannot save the state of a digest between two requests (`storage.running_digest`).

A client can cause much of this work cheaply, with requests that have no body. The work must therefore not delay other
requests. A thread hashes only a limited number of bytes at a time (a *step*). The sessions of a process take turns, and
few steps run at the same time, so that most threads remain free for other calls.
"""

from __future__ import annotations

import asyncio
from functools import partial

from storage.blobs.files.upload_file import UploadFile
from storage.data_dir.disk import Disk
from storage.running_digest import RunningDigest

STEP_BYTES = 8 * 1024 * 1024
"""Number of bytes that are hashed in one step. A thread takes about 10 ms for it."""
CONCURRENT_STEPS = 2
"""Largest number of steps that one process runs at the same time."""


class UploadHasher:
    """Hashes stored bytes of all upload sessions of one process."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._turns = asyncio.Semaphore(CONCURRENT_STEPS)

    async def hash_into(self, running_digest: RunningDigest, file: UploadFile, start: int, stop: int) -> None:
        """Adds the bytes of `file` from `start` up to, but without, `stop` to the digest. If this call is cancelled,
        it ends after the current step. Raises BlobUploadInvalid (a newer request has taken the session over),
        StorageFailed."""
        while start < stop:
            step_end = min(start + STEP_BYTES, stop)
            async with self._turns:
                await self._disk.run(partial(_hash, running_digest, file, start, step_end))
            start = step_end


def _hash(running_digest: RunningDigest, file: UploadFile, start: int, stop: int) -> None:
    """Adds the bytes of one step to the digest. Blocks. Raises OSError, BlobUploadInvalid."""
    for piece in file.read_pieces(start, stop):
        running_digest.update(piece)
