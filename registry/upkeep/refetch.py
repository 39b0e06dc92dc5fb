"""Fetches damaged blobs of mirrored repositories again from the upstreams (`Refetcher`). A scrub job, which reads all
stored content to find damage, uses it."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from contextlib import suppress
from typing import Final

from registry.router import Router
from storage.damage import DamageRecords
from storage.errors import DigestInvalid, RegistryError
from storage.interface import Registry
from storage.names import Digest, RepositoryName
from storage.upkeep.job_runner import JobContext

MAX_QUEUED: Final = 1000
"""Largest number of queued blobs. Further blobs are not queued; the next pull or scrub of such a blob fetches it."""
MAX_REPOSITORIES: Final = 20
"""Largest number of mirrored repositories through which one blob is requested."""
WAIT_SECONDS: Final = 1.0
"""Seconds between two checks in `finish` whether the job has to stop."""
log = logging.getLogger("registry.upkeep.scrub")


class Refetcher:
    """Fetches queued blobs, one at a time, while the `async with` block runs. `fetched` is the number of blobs that
    were fetched, and `failed` the number of blobs that could not be fetched. Both leave out blobs that are in no
    mirrored repository."""

    def __init__(self, damage: DamageRecords, router: Router, context: JobContext) -> None:
        self.fetched = 0
        self.failed = 0
        self._damage = damage
        self._router = router
        self._context = context
        self._queue: deque[Digest] = deque()
        self._has_work = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Refetcher:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def add(self, digest: Digest) -> None:
        """Queues a damaged blob. Does nothing if `MAX_QUEUED` blobs are queued, or if the registry has no mirrors."""
        if self._router.mirrors and len(self._queue) < MAX_QUEUED:
            self._queue.append(digest)
            self._has_work.set()

    async def finish(self) -> None:
        """Waits until a fetch of each queued blob has succeeded or failed. Raises JobStopped if a stop of the job was
        requested."""
        # `_run` clears `_has_work` when the queue is empty.
        while self._has_work.is_set() and self._task is not None and not self._task.done():
            await self._context.report(message="fetching damaged blobs again", save_now=True)
            await asyncio.sleep(WAIT_SECONDS)

    async def _run(self) -> None:
        while True:
            await self._has_work.wait()
            while self._queue:
                await self._fetch(self._queue[0])
                self._queue.popleft()
            self._has_work.clear()

    async def _fetch(self, digest: Digest) -> None:
        """Requests the blob through one mirrored repository after another, until a request succeeds. If none succeeds,
        logs the last error."""
        problem: RegistryError | None = None
        for repo in await self._damage.mirrored_holders(digest, self._router.mirrors, MAX_REPOSITORIES):
            try:
                destination = await self._router.locate(repo)
                await _download(destination.registry, destination.repo, digest)
            except RegistryError as error:
                problem = error
                continue
            self.fetched += 1
            self._context.step("fetched", digest=digest, repository=destination.repo)
            return
        if problem is not None:
            self.failed += 1
            log.warning("the damaged blob %s could not be fetched again: %s", digest, problem)
            self._context.step("not fetched", digest=digest, reason=problem.message)


async def _download(registry: Registry, repo: RepositoryName, digest: Digest) -> None:
    """Requests a blob from a mirror, and returns when the blob is stored. After corrupt bytes, tries once more, because
    another endpoint of the upstream may send the right bytes. Raises RegistryError."""
    try:
        await _download_once(registry, repo, digest)
    except DigestInvalid:
        await _download_once(registry, repo, digest)


async def _download_once(registry: Registry, repo: RepositoryName, digest: Digest) -> None:
    """Starts the download of the blob by opening the blob, and returns when the last byte is readable. The last byte
    becomes readable when the blob is stored. Raises DigestInvalid for corrupt bytes, and other RegistryErrors."""
    reader = await registry.open_blob(repo, digest)
    try:
        offset, end_offset = reader.span
        while offset < end_offset:
            offset = await reader.readable_until(offset)
    finally:
        await reader.aclose()
