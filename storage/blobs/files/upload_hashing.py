"""Hashes bytes that an upload session has already stored (`UploadHasher`).

Usually a session hashes its bytes when they arrive. It has to hash stored bytes in these cases:

- The request that completes the upload names a digest with another algorithm than the session's.
- An earlier request stored bytes, but did not save the state of the running digest (the digest of the bytes so far).
- The machine was rebooted, which may have damaged the stored bytes.
- This process cannot save the state of a running digest between two requests (`storage.running_digest`).

A client can cause much of this work cheaply, with requests that have no body. To keep the work from delaying other
requests, a thread hashes a limited number of bytes at a time, called a *step*. Only a few steps run at the same time,
and the sessions take turns.
"""

from __future__ import annotations

import asyncio
from functools import partial

from storage.blobs.files.upload_file import UploadFile
from storage.data_dir.disk import Disk
from storage.running_digest import RunningDigest

STEP_BYTES = 8 * 1024 * 1024
"""Largest number of bytes that one step hashes. Such a step takes about 10 ms."""
CONCURRENT_STEPS = 2
"""Largest number of steps that one process runs at the same time."""


class UploadHasher:
    """Hashes stored bytes for all upload sessions of one process."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._turns = asyncio.Semaphore(CONCURRENT_STEPS)

    async def hash_into(self, running_digest: RunningDigest, file: UploadFile, start: int, stop: int) -> None:
        """Adds bytes of `file` to the digest. `start`: offset of the first byte. `stop`: offset at which the bytes end
        (exclusive). A cancellation takes effect after the current step. Raises BlobUploadInvalid if a newer request has
        taken over the session. Raises StorageFailed."""
        while start < stop:
            step_end = min(start + STEP_BYTES, stop)
            async with self._turns:
                await self._disk.run(partial(_hash, running_digest, file, start, step_end))
            start = step_end


def _hash(running_digest: RunningDigest, file: UploadFile, start: int, stop: int) -> None:
    """Runs one step: adds the bytes from `start` up to `stop` to the digest. Blocks. Raises OSError,
    BlobUploadInvalid."""
    for piece in file.read_pieces(start, stop):
        running_digest.update(piece)
