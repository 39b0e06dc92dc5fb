"""Partial blobs in files (`Partials`): blobs that are being fetched from an upstream, shared by all processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from storage.blobs.files.partial_files import OpenedPartial, PartialPaths, expire_partial, open_partial, partials_in
from storage.blobs.files.partial_state import PartialStatus
from storage.blobs.files.partial_waiters import PartialWaiters
from storage.blobs.files.shared_partial import SharedPartial
from storage.content import BLOB_TYPE, Descriptor, OpenFile, PartialFailures
from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.disk import Disk
from storage.data_dir.locks import PollBackOff
from storage.errors import DigestInvalid, PartialLost, SizeInvalid, StorageFailed, StorageFull
from storage.keyed_locks import KeyedLocks
from storage.names import Digest, RepositoryName

THREADS = 4
"""Threads that compute digests while the bytes come."""
FIRST_PAUSE = 0.001
LONGEST_PAUSE = 0.02


class FilePartial:
    """A user of a partial blob (`Partial`). All users in this process share its open files."""

    def __init__(self, partials: FilePartials, shared: SharedPartial) -> None:
        self.digest = shared.digest
        self.size = shared.size
        self.file = OpenFile(shared.data)
        self._partials = partials
        self._shared = shared
        self._closed = False

    @property
    def is_owner(self) -> bool:
        return self._shared.is_owner(self)

    def take_ownership(self) -> bool:
        """Returns False for good once the partial was dropped: claim it again."""
        with as_storage_errors():
            return not self._closed and self._shared.own(self)

    def missing(self) -> list[tuple[int, int]]:
        return self._shared.missing()

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        with self._shared.owner_step(self):
            self._shared.write_at(offset, memoryview(data).cast("B"))

    async def wait(self, at: int) -> int:
        return await self._shared.wait(at)

    def add_waiter(self) -> None:
        if not self._closed:
            self._shared.flags.want(self)

    @property
    def has_waiters(self) -> bool:
        return not self._closed and self._shared.flags.wanted(self)

    def mark_started(self) -> None:
        if self.is_owner:
            self._shared.flags.begin()

    @property
    def has_started(self) -> bool:
        return not self._closed and self._shared.flags.begun()

    async def report_failure(self, reason: str) -> None:
        with suppress(StorageFull, StorageFailed, PartialLost), self._shared.owner_step(self):
            await self._partials.run(lambda: self._shared.report_failure(reason))

    @property
    def owner_failures(self) -> PartialFailures:
        return PartialFailures() if self._closed else self._shared.owner_failures

    async def commit(self, repo: RepositoryName, blame: Callable[[], Awaitable[None]] | None = None) -> Descriptor:
        return await asyncio.shield(self._partials.finish(self, self._shared, repo, blame))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._shared.flags.stop_waiting(self)
            self._shared.disown(self)
            self._shared.release()


class CompletePartial:
    """The verified and synced bytes of a partial blob (`VerifiedContent`)."""

    def __init__(self, disk: Disk, shared: SharedPartial) -> None:
        self.digest = shared.digest
        self.size = shared.size
        self.place = disk.layout.place(shared.digest)
        self.file = OpenFile(shared.data)
        """For a blob store that keeps its blobs elsewhere and copies the bytes."""
        self._disk = disk
        self._shared = shared

    async def publish(self) -> None:
        await self._disk.run(lambda: self._shared.publish(self._disk.layout.at(self.place)))


Adopt = Callable[[RepositoryName, CompletePartial], Awaitable[None]]
"""Makes the content a blob of a repository, durably. Raises StorageFull, StorageFailed."""


class FilePartials:
    """For one process and its running event loop."""

    def __init__(self, disk: Disk, boot: str, adopt: Adopt) -> None:
        """`boot` names this run of the machine. `adopt` gets the content of each complete partial."""
        self.run = disk.run
        self._disk = disk
        self._boot = boot[:40]
        self._adopt = adopt
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="partials")
        self._waiters = PartialWaiters()
        self._claiming = KeyedLocks[str]()
        self._shared: dict[str, SharedPartial] = {}
        self._finishing: set[asyncio.Task[Descriptor]] = set()

    async def aclose(self) -> None:
        """Waits for commits that are running."""
        if self._finishing:
            await asyncio.wait(self._finishing)
        self._waiters.close()
        self._threads.shutdown()

    async def claim(self, digest: Digest, size: int, source: str = "") -> FilePartial:
        """A partial that was committed a moment ago is gone, so a new owner should look for the blob first."""
        if size < 0:
            raise SizeInvalid(f"a blob has no {size} bytes")
        name = self._disk.layout.partial(digest, size, source)
        async with self._claiming.hold(name):
            back_off = PollBackOff(FIRST_PAUSE, LONGEST_PAUSE)
            while True:
                partial = self._join(name) or await self._open(name, digest, size)
                if partial is not None:
                    return partial
                await back_off.pause()  # its owner is just setting it up or ending it: a few calls to the disk

    def _join(self, name: str) -> FilePartial | None:
        shared = self._shared.get(name)
        if shared is None or not shared.retain():
            return None
        try:
            shared.refresh()
            partial = FilePartial(self, shared)
            partial.take_ownership()
            if shared.running:
                return partial
        except BaseException:
            shared.release()
            raise
        shared.release()
        return None

    async def _open(self, name: str, digest: Digest, size: int) -> FilePartial | None:
        paths = PartialPaths.of(self._disk.layout, name, digest)
        disk = self._disk
        step = disk.run(lambda: open_partial(disk.system, paths, size, self._boot, disk.reserve))
        try:
            opened = await step
        except asyncio.CancelledError:
            if step.done() and step.exception() is None:
                _close(step.result())
            raise
        if opened is None:
            return None
        shared = SharedPartial(*(disk.system, disk.reserve, self._threads, self._waiters, paths, digest), opened=opened)
        shared.retain()
        partial = FilePartial(self, shared)
        if opened.owned:
            shared.own(partial, locked=True)
        self._keep(name, shared)
        return partial

    def _keep(self, name: str, shared: SharedPartial) -> None:
        for other in [other for other, file in self._shared.items() if not file.open]:
            del self._shared[other]
        self._shared[name] = shared

    async def expire(self, before: float) -> int:
        layout = self._disk.layout

        def drop_old() -> int:
            return sum(
                expire_partial(self._disk.system, PartialPaths.of(layout, name, digest), before, self._boot)
                for name, digest in partials_in(layout)
            )

        return await self._disk.run(drop_old)

    def finish(
        self,
        partial: FilePartial,
        shared: SharedPartial,
        repo: RepositoryName,
        blame: Callable[[], Awaitable[None]] | None,
    ) -> asyncio.Task[Descriptor]:
        """Starts a commit that runs to its end, even if its caller is cancelled."""
        task = asyncio.ensure_future(self._commit(partial, shared, repo, blame))
        self._finishing.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Descriptor]) -> None:
        self._finishing.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as retrieved, if its caller was cancelled

    async def _commit(
        self,
        partial: FilePartial,
        shared: SharedPartial,
        repo: RepositoryName,
        blame: Callable[[], Awaitable[None]] | None,
    ) -> Descriptor:
        run = self._disk.run
        with shared.owner_step(partial):
            if shared.missing():
                raise PartialLost("bytes of the partial blob are missing")
            try:
                actual = await run(shared.finish_digest)
                if actual != shared.digest:
                    try:
                        if blame is not None:
                            await blame()
                    finally:
                        await run(lambda: shared.drop(PartialStatus.BAD))
                    raise DigestInvalid(
                        "the upstream sent other bytes than the digest says; nothing of them is kept",
                        {"expected": shared.digest, "actual": actual},
                    )
                await run(shared.sync)
                await self._adopt(repo, CompletePartial(self._disk, shared))
            except (StorageFull, StorageFailed):
                # After a failed fsync the kernel forgets which bytes never reached the disk: they cannot be trusted.
                await run(lambda: shared.drop(PartialStatus.DROPPED))
                raise
            await run(lambda: shared.drop(PartialStatus.COMMITTED))
        return Descriptor(BLOB_TYPE, shared.digest, shared.size)


def _close(opened: OpenedPartial | None) -> None:
    if opened is not None:
        opened.close()
