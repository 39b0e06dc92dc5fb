"""The store of partial blobs (`FilePartialStore`): opens partial blobs, and turns complete partial blobs into blobs.
Implements the Protocol `Partials`.

A *partial blob* is a blob whose download from an upstream registry is not complete. Its bytes are in a file that all
processes share. Downloads read and write the file through *handles* (`PartialHandle`). At any time, at most one handle
in all processes is the *owner*: its holder downloads the bytes. The holders of the other handles wait for the bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from storage.blobs.files.leftovers import list_downloads
from storage.blobs.files.partial_file_pairs import (
    PartialFilePair,
    PartialPaths,
    delete_file_pair_if_idle,
    is_file_pair_idle_and_readable,
    list_partial_names,
    open_file_pair,
)
from storage.blobs.files.partial_state_format import PartialStatus
from storage.blobs.files.partial_waiters import PartialWaiters
from storage.blobs.files.process_partial import ProcessPartial
from storage.content import BLOB_TYPE, Descriptor, OpenFile, PartialFailures
from storage.data_dir.blocking_calls import ThreadPool, as_storage_errors, result_or_close
from storage.data_dir.disk import Disk
from storage.data_dir.locks import PollBackOff
from storage.errors import DigestInvalid, PartialBlobLost, QuotaExceeded, SizeInvalid, StorageFailed, StorageFull
from storage.keyed_locks import KeyedLocks
from storage.names import Digest, RepositoryName
from storage.partials import ExpiredPartial

DIGEST_THREADS = 4
"""Number of threads that compute the digests of partial blobs while their bytes arrive."""
FIRST_PAUSE_SECONDS = 0.001
"""Pause after the first attempt to open a partial blob whose files another process is creating or deleting."""
LONGEST_PAUSE_SECONDS = 0.02
"""Longest pause between two attempts to open a partial blob. Each pause is twice as long as the previous pause, up to
this length."""


class PartialHandle:
    """A handle to a partial blob. Implements the Protocol `Partial`. All handles of this process to the same partial
    blob share one `ProcessPartial` (`shared`), which has the open files.

    Work that only the owner may do runs inside the context manager `ProcessPartial.owner_step`. It raises
    PartialBlobLost if the handle is not the owner. Until the work has ended, the handle stays the owner and the files
    stay open."""

    def __init__(self, store: FilePartialStore, shared: ProcessPartial) -> None:
        self.digest = shared.digest
        self.size = shared.size
        self.file = OpenFile(shared.data_fd)
        self._store = store
        self._shared = shared
        self._closed = False

    @property
    def is_owner(self) -> bool:
        """Whether this handle is the owner."""
        return self._shared.is_owner(self)

    @property
    def has_ended(self) -> bool:
        """Whether the partial blob was committed or deleted, in any process. Raises StorageFailed."""
        if not self._closed:
            self._shared.refresh()
        return not self._shared.still_exists

    def take_ownership(self) -> bool:
        """Makes this handle the owner if there is no owner, and returns whether it is the owner now. If the partial
        blob was committed or deleted, returns False; the caller then has to call `FilePartialStore.claim` again. Raises
        StorageFull, StorageFailed."""
        with as_storage_errors():
            return not self._closed and self._shared.take_ownership(self)

    def missing(self) -> list[tuple[int, int]]:
        """Returns the ranges of bytes that are not stored, in ascending order. Raises StorageFailed."""
        return self._shared.missing()

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Writes `data` at `offset`. For the owner only. Blocks. Raises PartialBlobLost (this handle is not the owner),
        SizeInvalid, StorageFull, StorageFailed."""
        with self._shared.owner_step(self):
            self._shared.write_at(offset, memoryview(data).cast("B"))

    async def wait(self, offset: int) -> int:
        """Waits until the byte at `offset` is stored. Returns the offset of the first missing byte after it. If
        `offset` is equal to `size`, waits until the blob is committed, and returns `size`. Raises PartialBlobLost (no
        owner is left to download the byte), DigestInvalid, StorageFailed."""
        return await self._shared.wait(offset)

    def add_waiter(self) -> None:
        """Registers this handle as a *waiter*, until it is closed. A waiter is a handle through which a client waits
        for the blob. Raises StorageFailed."""
        if not self._closed:
            self._shared.flags.add_waiter(self)

    @property
    def has_waiters(self) -> bool:
        """Whether another handle, in any process, is registered as a waiter. Raises StorageFailed."""
        return not self._closed and self._shared.flags.has_waiter_besides(self)

    def mark_upstream_request(self, repo: RepositoryName) -> None:
        """If this handle is the owner, tells all processes that it has started to request bytes from the repository
        `repo` of the upstream. Otherwise does nothing. Raises StorageFailed."""
        if self.is_owner:
            self._shared.flags.mark_upstream_request(repo)

    @property
    def has_upstream_request(self) -> bool:
        """Whether the owner, in any process, has called `mark_upstream_request`. Raises StorageFailed."""
        return not self._closed and self._shared.flags.has_upstream_request()

    def has_upstream_request_to(self, repo: RepositoryName) -> bool:
        """Returns whether the owner, in any process, has called `mark_upstream_request` with this repository. Raises
        StorageFailed."""
        return not self._closed and self._shared.flags.has_upstream_request_to(repo)

    def mark_response(self) -> None:
        """If this handle is the owner, tells all processes that the upstream has started to send bytes to it. Otherwise
        does nothing. Raises StorageFailed."""
        if self.is_owner:
            self._shared.flags.mark_response()

    @property
    def has_response(self) -> bool:
        """Whether the owner, in any process, has called `mark_response`. Raises StorageFailed."""
        return not self._closed and self._shared.flags.has_response()

    async def report_failure(self, reason: str) -> None:
        """If this handle is the owner, tells the other processes that its download has failed, and why. Otherwise does
        nothing. Raises nothing."""
        with suppress(StorageFull, StorageFailed, PartialBlobLost), self._shared.owner_step(self):
            await self._store.run(lambda: self._shared.report_failure(reason))

    @property
    def owner_failures(self) -> PartialFailures:
        """The failures that owners have reported. Raises StorageFailed."""
        return PartialFailures() if self._closed else self._shared.owner_failures

    async def commit(self, repo: RepositoryName, on_corrupt: Callable[[], Awaitable[None]] | None = None) -> Descriptor:
        """Verifies the digest, makes the bytes a blob of `repo`, and returns the blob's descriptor. `on_corrupt`:
        called if the digest is wrong, before `wait` of any other handle raises DigestInvalid. Raises DigestInvalid,
        PartialBlobLost, StorageFull, StorageFailed, QuotaExceeded. The commit runs to its end even if this call is
        cancelled."""
        return await asyncio.shield(self._store.start_commit(self, self._shared, repo, on_corrupt))

    async def discard(self) -> None:
        """Deletes the files of the partial blob. Does nothing if this handle is not the owner."""
        with suppress(PartialBlobLost), self._shared.owner_step(self):
            await self._store.run(lambda: self._shared.end(PartialStatus.DELETED))

    def close(self) -> None:
        """Closes this handle. If it is the owner, there is no owner afterwards. The stored bytes are kept for the next
        owner. May be called more than once."""
        if not self._closed:
            self._closed = True
            self._shared.flags.remove_waiter(self)
            self._shared.give_up_ownership(self)
            self._shared.release()


class DownloadedContent:
    """The data file of a complete partial blob, after its digest was verified and the file was synced. Implements the
    Protocol `VerifiedContent`. `place`: the path that the blob's file will have, relative to the data directory."""

    def __init__(self, disk: Disk, shared: ProcessPartial) -> None:
        self.digest = shared.digest
        self.size = shared.size
        self.place = disk.layout.blob_place(shared.digest)
        self.file = OpenFile(shared.data_fd)
        """The open data file."""
        self._disk = disk
        self._shared = shared

    async def publish(self) -> None:
        """Moves the data file durably to `place`. Raises StorageFull, StorageFailed."""
        await self._disk.run(lambda: self._shared.publish(self._disk.layout.path_of(self.place)))


AddBlob = Callable[[RepositoryName, DownloadedContent], Awaitable[None]]
"""A function that publishes the content and adds it durably to a repository as a blob. Raises StorageFull,
StorageFailed, QuotaExceeded."""


class FilePartialStore:
    """The partial blobs of a data directory, for one process and its running event loop."""

    def __init__(self, disk: Disk, boot: str, add_blob: AddBlob) -> None:
        """`boot`: id of the machine's present boot; bytes that were written during an earlier boot are downloaded
        again. `add_blob`: called with the content of each blob that was completely downloaded and verified."""
        self.run = disk.run
        """Runs a blocking call in a thread (`Disk.run`)."""
        self._disk = disk
        self._boot = boot[:40]  # a state file has 40 bytes for the boot id
        self._add_blob = add_blob
        self._digest_threads = ThreadPool(DIGEST_THREADS, thread_name_prefix="partials")
        self._waiting_tasks = PartialWaiters()
        """The tasks of this process that wait for bytes of a partial blob (`PartialHandle.wait`). Unlike the waiters
        of `PartialHandle.add_waiter`, these tasks are not handles."""
        self._claim_locks = KeyedLocks[str]()
        """A lock for each partial blob, by name. `claim` holds it while it opens the partial blob."""
        self._open_partials: dict[str, ProcessPartial] = {}
        """The partial blobs that this process has open, by name (`Layout.partial_name`)."""
        self._commits: set[asyncio.Task[Descriptor]] = set()
        """The commits that are running."""

    async def aclose(self) -> None:
        """Waits for running commits, and stops the threads that compute digests."""
        if self._commits:
            await asyncio.wait(self._commits)
        self._waiting_tasks.close()
        self._digest_threads.shutdown()

    async def claim(self, digest: Digest, size: int, source: str = "") -> PartialHandle:
        """Returns a handle to a partial blob. Creates the partial blob if it does not exist. The handle becomes the
        owner if there is no owner. A new owner should first check whether the blob is stored, because another process
        may have committed the partial blob a moment ago. `size`: the size of the blob in bytes. `source`: name of the
        upstream registry that sends the bytes. Raises StorageFull, StorageFailed, SizeInvalid (`size` is negative). If
        the call is cancelled, it leaves no handle open and makes nobody the owner."""
        if size < 0:
            raise SizeInvalid(f"a blob cannot have {size} bytes")
        name = self._disk.layout.partial_name(digest, size, source)
        async with self._claim_locks.hold(name):
            back_off = PollBackOff(FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
            while True:
                handle = self._open_shared(name) or await self._open_files(name, digest, size)
                if handle is not None:
                    return handle
                await back_off.pause()  # the files are being created or deleted, which takes a short time

    def _open_shared(self, name: str) -> PartialHandle | None:
        """Returns a handle to a partial blob that this process has open. Returns None if this process does not have the
        partial blob open, or if the partial blob was committed or deleted."""
        shared = self._open_partials.get(name)
        if shared is None or not shared.retain():
            return None
        try:
            shared.refresh()
            handle = PartialHandle(self, shared)
            handle.take_ownership()
            if shared.still_exists:
                return handle
        except BaseException:
            shared.release()
            raise
        shared.release()
        return None

    async def _open_files(self, name: str, digest: Digest, size: int) -> PartialHandle | None:
        """Opens or creates the files of a partial blob and returns a handle. Returns None in two cases, in which the
        caller should try again soon:

        - Another process is creating or deleting the files at this moment.
        - The files had unusable bytes, such as bytes from an earlier boot. This call has deleted both files."""
        paths = PartialPaths.of_blob(self._disk.layout, name, digest)
        disk = self._disk

        def open_pair() -> PartialFilePair | None:
            # Raises an error if another data directory has replaced this one. The download would fail anyway, but only
            # at its end.
            disk.opened_directory.check()
            return open_file_pair(disk.system, paths, size, self._boot, disk.reserve)

        opening = disk.run(open_pair)

        def close(unused: PartialFilePair | None) -> None:
            if unused is not None:
                unused.close()

        files = await result_or_close(opening, close)
        if files is None:
            return None
        threads, tasks = self._digest_threads, self._waiting_tasks
        shared = ProcessPartial(disk.system, disk.reserve, threads, tasks, paths, digest, files)
        shared.retain()
        handle = PartialHandle(self, shared)
        if files.is_owner:
            shared.take_ownership(handle, has_file_lock=True)
        self._remember_open(name, shared)
        return handle

    def _remember_open(self, name: str, shared: ProcessPartial) -> None:
        """Adds a partial blob to `_open_partials`, and removes partial blobs that have been closed."""
        for closed_name in [other_name for other_name, other in self._open_partials.items() if not other.is_open]:
            del self._open_partials[closed_name]
        self._open_partials[name] = shared

    async def list_downloads(self) -> set[Digest]:
        """Returns the digests of the blobs that any process is downloading now. Includes partial blobs whose state file
        cannot be read, because a process may be downloading them. Raises StorageFailed."""
        return await self._disk.run(lambda: list_downloads(self._disk.layout, self._boot))

    async def expire(self, before: float, *, dry_run: bool = False) -> list[ExpiredPartial]:
        """Deletes the *idle* partial blobs, and returns them. A partial blob is idle if it has no owner, and if it was
        last written before the time `before` (seconds since 1970) or during an earlier boot of the machine. Skips a
        partial blob, and logs a warning, if one of its files is damaged or this process has no permission to read it.
        `dry_run`: whether to return the idle partial blobs without deleting them. Raises StorageFull, StorageFailed."""
        layout, system = self._disk.layout, self._disk.system

        def delete_idle() -> list[ExpiredPartial]:
            expired = []
            for name, digest in list_partial_names(layout):
                paths = PartialPaths.of_blob(layout, name, digest)
                if not is_file_pair_idle_and_readable(paths, before, self._boot):
                    continue
                size = paths.occupied_bytes()
                if dry_run or delete_file_pair_if_idle(system, paths, before, self._boot):
                    expired.append(ExpiredPartial(digest, size))
            return expired

        return await self._disk.run(delete_idle)

    def start_commit(
        self,
        handle: PartialHandle,
        shared: ProcessPartial,
        repo: RepositoryName,
        on_corrupt: Callable[[], Awaitable[None]] | None,
    ) -> asyncio.Task[Descriptor]:
        """Starts a commit (`PartialHandle.commit`) and returns its task, which runs to its end even if the caller is
        cancelled. `handle`: the owner."""
        task = asyncio.ensure_future(self._commit(handle, shared, repo, on_corrupt))
        self._commits.add(task)
        task.add_done_callback(self._on_commit_done)
        return task

    def _on_commit_done(self, task: asyncio.Task[Descriptor]) -> None:
        """Forgets a commit that has ended."""
        self._commits.discard(task)
        if not task.cancelled():
            task.exception()  # marks the exception as retrieved, because a cancelled caller does not await the task

    async def _commit(
        self,
        handle: PartialHandle,
        shared: ProcessPartial,
        repo: RepositoryName,
        on_corrupt: Callable[[], Awaitable[None]] | None,
    ) -> Descriptor:
        """Verifies the digest of the downloaded bytes and makes them a blob of `repo`. At the end, wakes the calls of
        `wait` that wait for the commit."""
        run = self._disk.run
        with shared.owner_step(handle):
            if shared.missing():
                raise PartialBlobLost("bytes of the partial blob are missing")
            try:
                actual = await run(shared.finish_digest)
                if actual != shared.digest:
                    try:
                        if on_corrupt is not None:
                            await on_corrupt()
                    finally:
                        await run(lambda: shared.end(PartialStatus.WRONG_DIGEST))
                    raise DigestInvalid(
                        "the bytes that the upstream sent have another digest; they were deleted",
                        {"expected": shared.digest, "actual": actual},
                    )
                await run(shared.sync)
                await self._add_blob(repo, DownloadedContent(self._disk, shared))
            except (StorageFull, StorageFailed, QuotaExceeded):
                # The next download must not continue with these bytes: after a failed fsync, some of them may be
                # missing on the disk, and `_add_blob` may have moved and deleted the file.
                await run(lambda: shared.end(PartialStatus.DELETED))
                raise
            await run(lambda: shared.end(PartialStatus.COMMITTED))
        return Descriptor(BLOB_TYPE, shared.digest, shared.size)
