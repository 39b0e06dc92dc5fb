"""Blobs on their way in from an upstream (`Partials`), and how they become blobs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from storage.blobs.files.file_blob_store import FileBlobStore
from storage.blobs.files.partial_files import OpenedPartial, PartialPaths, expire_partial, open_partial, partials_in
from storage.blobs.files.partial_state import PartialStatus
from storage.blobs.files.partial_waiters import PartialWaiters
from storage.blobs.files.shared_partial import SharedPartial
from storage.content import BLOB_TYPE, Descriptor, OpenFile, PartialFailures
from storage.data_dir.durable_files import as_storage_errors
from storage.data_dir.locks import KeyedLocks
from storage.errors import DigestInvalid, PartialLost, SizeInvalid, StorageFailed, StorageFull
from storage.metadata.catalog import Metadata
from storage.names import Digest, RepositoryName
from storage.store.publication import publish

THREADS = 4
"""For digests that are computed while the bytes come."""


class StoredPartial:
    """One who asked for a partial blob (`Partial`). All who did so in this process share the open files."""

    def __init__(self, partials: StoredPartials, shared: SharedPartial) -> None:
        self.digest = shared.digest
        self.size = shared.size
        self.file = OpenFile(shared.data)
        self._partials = partials
        self._shared = shared
        self._closed = False

    @property
    def owned(self) -> bool:
        return self._shared.is_owner(self)

    def own(self) -> bool:
        """Never true again once it was dropped: claim it anew."""
        with as_storage_errors():
            return not self._closed and self._shared.own(self)

    def missing(self) -> list[tuple[int, int]]:
        return self._shared.missing()

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        with self._shared.working(self):
            self._shared.write_at(offset, memoryview(data).cast("B"))

    async def wait(self, at: int) -> int:
        return await self._shared.wait(at)

    def want(self) -> None:
        if not self._closed:
            self._shared.marks.want(self)

    @property
    def wanted(self) -> bool:
        return not self._closed and self._shared.marks.wanted(self)

    def begin(self) -> None:
        if self.owned:
            self._shared.marks.begin()

    @property
    def begun(self) -> bool:
        return not self._closed and self._shared.marks.begun()

    async def report_failure(self, reason: str) -> None:
        with suppress(StorageFull, StorageFailed, PartialLost), self._shared.working(self):
            await self._partials.run(lambda: self._shared.report_failure(reason))

    @property
    def owner_failures(self) -> PartialFailures:
        return PartialFailures() if self._closed else self._shared.owner_failures

    async def commit(self, repo: RepositoryName, blame: Callable[[], Awaitable[None]] | None = None) -> Descriptor:
        return await asyncio.shield(self._partials.finish(self, self._shared, repo, blame))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._shared.marks.stop_waiting(self)
            self._shared.let_go(self)
            self._shared.release()


class StoredPartials:
    """For one process and its running event loop. `boot` names the run of the machine."""

    def __init__(self, blobs: FileBlobStore, metadata: Metadata, boot: str) -> None:
        self._blobs = blobs
        self.run = blobs.run
        self._metadata = metadata
        self._boot = boot[:40]
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="partials")
        self._watch = PartialWaiters()
        self._claiming = KeyedLocks[str]()
        self._shared: dict[str, SharedPartial] = {}
        self._finishing: set[asyncio.Task[Descriptor]] = set()

    async def aclose(self) -> None:
        """Waits for what is being committed."""
        if self._finishing:
            await asyncio.wait(self._finishing)
        self._watch.close()
        self._threads.shutdown()

    async def claim(self, digest: Digest, size: int, source: str = "") -> StoredPartial:
        """One that was committed a moment ago is not known any more: a new owner of nothing looks among the blobs
        first. Cancelled: it is nobody's."""
        if size < 0:
            raise SizeInvalid(f"a blob has no {size} bytes")
        name = self._blobs.layout.partial(digest, size, source)
        async with self._claiming.hold(name):
            pause = 0.001
            while True:
                # Whoever has it is just beginning or ending with it; that takes no longer than a few steps on the disk.
                partial = self._join(name) or await self._open(name, digest, size)
                if partial is not None:
                    return partial
                await asyncio.sleep(pause)
                pause = min(2 * pause, 0.02)

    def _join(self, name: str) -> StoredPartial | None:
        shared = self._shared.get(name)
        if shared is None or not shared.retain():
            return None
        try:
            shared.look()
            partial = StoredPartial(self, shared)
            partial.own()
            if shared.running:
                return partial
        except BaseException:
            shared.release()
            raise
        shared.release()
        return None

    async def _open(self, name: str, digest: Digest, size: int) -> StoredPartial | None:
        names = PartialPaths.of(self._blobs.layout, name, digest)
        step = self._blobs.run(lambda: open_partial(self._blobs.system, names, size, self._boot, self._blobs.reserve))
        try:
            opened = await step
        except asyncio.CancelledError:
            if step.done() and step.exception() is None:
                _close(step.result())
            raise
        if opened is None:
            return None
        shared = SharedPartial(
            *(self._blobs.system, self._blobs.reserve, self._threads, self._watch, names, digest), opened=opened
        )
        shared.retain()
        partial = StoredPartial(self, shared)
        if opened.owned:
            shared.own(partial, locked=True)
        self._keep(name, shared)
        return partial

    def _keep(self, name: str, shared: SharedPartial) -> None:
        for other in [other for other, file in self._shared.items() if not file.open]:
            del self._shared[other]
        self._shared[name] = shared

    async def expire(self, before: float) -> int:
        layout = self._blobs.layout

        def drop_old() -> int:
            return sum(
                expire_partial(self._blobs.system, PartialPaths.of(layout, name, digest), before, self._boot)
                for name, digest in partials_in(layout)
            )

        return await self._blobs.run(drop_old)

    def finish(
        self,
        partial: StoredPartial,
        shared: SharedPartial,
        repo: RepositoryName,
        blame: Callable[[], Awaitable[None]] | None,
    ) -> asyncio.Task[Descriptor]:
        """Commits, whatever becomes of who asked for it."""
        task = asyncio.ensure_future(self._commit(partial, shared, repo, blame))
        self._finishing.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Descriptor]) -> None:
        self._finishing.discard(task)
        if not task.cancelled():
            task.exception()  # told to who asked, unless that one is gone

    async def _commit(
        self,
        partial: StoredPartial,
        shared: SharedPartial,
        repo: RepositoryName,
        blame: Callable[[], Awaitable[None]] | None,
    ) -> Descriptor:
        run = self._blobs.run
        with shared.working(partial):
            if shared.missing():
                raise PartialLost("the blob has not come whole yet")
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
                await self._publish(shared, repo)
            except (StorageFull, StorageFailed):
                # After a failed fsync the kernel forgets which bytes never reached the disk: they cannot be trusted.
                await run(lambda: shared.drop(PartialStatus.DROPPED))
                raise
            await run(lambda: shared.drop(PartialStatus.COMMITTED))
        return Descriptor(BLOB_TYPE, shared.digest, shared.size)

    async def _publish(self, shared: SharedPartial, repo: RepositoryName) -> None:
        async def add(place: str) -> None:
            await self._metadata.adopt_blob(repo, shared.digest, shared.size, place)

        await publish(self._blobs, self._metadata, shared, shared.digest, add)


def _close(opened: OpenedPartial | None) -> None:
    if opened is not None:
        opened.close()
