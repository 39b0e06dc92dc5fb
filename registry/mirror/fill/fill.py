"""The download of one blob from an upstream registry, for any number of readers in several processes (`Fill`), and all
fills of this process (`Fills`).

A fill writes into a *partial blob*: a file with the bytes that have arrived, which all processes see. Each process that
has readers for a blob has one fill. The fill of one process, the *owner* of the partial blob, downloads; the fills of
the other processes are its *followers* and wait for the bytes. If the owner dies, a follower becomes the owner and
continues with the bytes that are stored. A fill does not end with the request that started it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from registry.mirror.entitlement import BlobEntitlement
from registry.mirror.fill.download import Download, NoReaders
from registry.mirror.fill.retry import STALL_TIMEOUT_SECONDS, BadSenders, decode_failure, encode_failure
from registry.mirror.fill.slots import ConnectionSlots, Demand, ImagePull
from registry.mirror.freshness import NegativeCache
from registry.mirror.upstream_client import UnconfirmedBlobUnknown, UpstreamClient
from registry.single_flight import cancel_and_wait, server_stopping, start_detached
from storage.content import Descriptor, OpenFile
from storage.errors import (
    BlobUnknown,
    DigestInvalid,
    PartialLost,
    RegistryError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.names import Digest, RepositoryName
from storage.partials import Partial, Partials

log = logging.getLogger("registry.mirror")

OWNER_POLL_SECONDS: Final = 0.05
"""Time until a reader tries again to wait for bytes, after the owner has disappeared."""
MAX_LOST_OWNERS: Final = 40
"""Number of owners that may disappear, one after another, before a follower gives up."""


@dataclass(frozen=True)
class FillContext:
    """The objects that all fills of one mirror share. `partials`: the store of partial blobs. `slots`: limits the
    connections to the upstream. `entitlement`: decides through which repositories a blob may be read.
    `negative_cache`: blobs that the upstream does not have. `bad_senders`: endpoints that sent corrupt bytes.
    `to_upstream_name`: returns the name that a repository has at the upstream. `stall_timeout`: seconds without new
    bytes after which a fill that has readers is given up."""

    upstream: UpstreamClient
    partials: Partials
    slots: ConnectionSlots
    entitlement: BlobEntitlement
    negative_cache: NegativeCache
    bad_senders: BadSenders
    to_upstream_name: Callable[[RepositoryName], RepositoryName]
    stall_timeout: float = STALL_TIMEOUT_SECONDS


class Fill:
    """The fill of one blob in this process. `repo`: the repository that the upstream is asked for. `size`: size of the
    blob in bytes. `repositories`: the repositories that the blob is added to when it is complete, `repo` among them;
    for each of them the right to the blob has been checked. `demand`: who needs the blob. `error`: why the fill failed;
    None if it is running or has succeeded."""

    def __init__(self, context: FillContext, repo: RepositoryName, digest: Digest, size: int) -> None:
        self.repo = repo
        self.digest = digest
        self.size = size
        self.repositories = {repo}
        self.demand = Demand()
        self.error: RegistryError | None = None
        self._context = context
        self._partial: Partial | None = None
        self._started = asyncio.Event()
        """Set when the upstream has begun to send, in any process, or when the fill has ended."""
        self._ended = asyncio.Event()
        self._owner_changes = 0
        """How often the owner of the partial blob may have changed."""
        self._owner_changed = asyncio.Event()
        """Set at the next such change, and then replaced by a new event."""

    @property
    def ended(self) -> bool:
        """Whether the fill has ended, with success or with an error."""
        return self._ended.is_set()

    @property
    def file(self) -> OpenFile:
        """The file that the bytes are written to. Valid from the time when `wait_started` returns True until the fill
        ends."""
        assert self._partial is not None
        return self._partial.file

    @property
    def is_queued(self) -> bool:
        """Whether no request has been sent yet, because the owner, in this or another process, waits for a free
        connection. Raises StorageFailed."""
        return not self.ended and self._partial is not None and not self._partial.has_started

    async def wait_started(self) -> bool:
        """Waits until the upstream begins to send, and returns True. Returns False if the fill has ended by then and
        the blob is stored. Raises the error of the fill."""
        await self._started.wait()
        if self.error is not None:
            raise self.error
        return not self.ended

    async def wait_finished(self) -> None:
        """Waits until the fill has ended and the blob is stored. Raises the error of the fill."""
        await self._ended.wait()
        if self.error is not None:
            raise self.error

    async def wait_wanted(self) -> None:
        """Waits until a client requests the blob, or until the fill ends. Raises nothing."""
        waiting_tasks = [asyncio.create_task(event.wait()) for event in (self.demand.requested, self._ended)]
        try:
            await asyncio.wait(waiting_tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(waiting_tasks)

    async def wait_until(self, offset: int) -> int:
        """Waits until the byte at `offset` is stored, and returns the end of the stored bytes from there: the offset of
        the first missing byte. If `offset` is equal to `size`, waits until the digest is verified and the blob is
        stored, and returns `size`. Raises the error of the fill."""
        assert self._partial is not None
        with self.demand.waiting(offset):
            while not self.ended:
                changes = self._owner_changes
                try:
                    return await self._partial.wait(offset)
                except PartialLost:
                    await self._wait_for_owner(changes)
                except DigestInvalid:
                    await self._ended.wait()  # the fill is about to end with its error, which is raised below
        if self.error is not None:
            raise self.error
        return self.size

    async def run(self) -> None:
        """Runs the fill to its end, and sets `error` if it fails. Raises nothing. If it is cancelled, the stored bytes
        are kept for the next fill."""
        error: RegistryError | None = server_stopping()
        try:
            await self._run()
            error = None
        except NoReaders:
            error = PartialLost("the download was stopped because no client waited for the blob; try again")
        except BlobUnknown as unknown:
            error = unknown
            if not isinstance(unknown, UnconfirmedBlobUnknown):
                with suppress(RegistryError):
                    await self._context.negative_cache.add(self.repo, self.digest)
        except RegistryError as failure:
            error = failure
            await self._tell_followers(failure)
        except Exception:
            log.exception("the fill of %s failed", self.digest)
            error = UpstreamUnavailable("the blob could not be fetched; the server's log says why")
        finally:
            self._end(error)

    async def _tell_followers(self, failure: RegistryError) -> None:
        """Stores the failure for the followers in other processes. Otherwise each of them would become the owner in
        turn and wait for the same timeouts. Does nothing before the first byte has arrived, except after a timeout,
        because each follower then gets the error quickly by itself."""
        partial = self._partial
        if (
            partial is None
            or not partial.is_owner
            or not (self._started.is_set() or isinstance(failure, UpstreamTimeout))
        ):
            return
        if (reason := encode_failure(self.repo, failure)) is not None:
            await partial.report_failure(reason)

    def abandon(self) -> None:
        """Ends the fill with an error if `run` has not ended it, for example because its task was cancelled before it
        began."""
        if not self.ended:
            self._end(server_stopping())

    def _end(self, error: RegistryError | None) -> None:
        self.error = error
        self._ended.set()
        self._started.set()
        self._owner_changed.set()
        if self._partial is not None:
            self._partial.close()

    async def _run(self) -> None:
        """Follows the owner until the blob is stored, or becomes the owner and downloads the blob. Raises the error
        that ends the fill."""
        self._partial = partial = await self._context.partials.claim(
            self.digest, self.size, self._context.upstream.name
        )
        is_owner, lost_owners = partial.is_owner, 0
        while not is_owner:
            if not self.demand.requested.is_set():
                # The fill was started only to prefetch the blob, and another process downloads the blob already.
                raise NoReaders
            failures_before = partial.owner_failures
            partial.add_waiter()
            if await self._follow(partial):
                return await self._add_to_repositories(self.repositories)
            failures = partial.owner_failures
            if failures != failures_before and (failure := decode_failure(self.repo, failures.reason)):
                raise failure
            is_owner = partial.take_ownership()
            self._note_owner_change()
            if not is_owner:
                lost_owners += 1
                if lost_owners > MAX_LOST_OWNERS:
                    raise PartialLost
                await asyncio.sleep(OWNER_POLL_SECONDS / 5)
        return await self._download(partial)

    async def _follow(self, partial: Partial) -> bool:
        """Waits while the owner in another process downloads the blob. Returns True when the blob is stored, and False
        if the owner has stopped before."""
        gaps = partial.missing()
        first_missing = gaps[0][0] if gaps else self.size
        start_signal = asyncio.create_task(self._signal_start(partial, first_missing))
        try:
            await partial.wait(self.size)
        except PartialLost:
            return False
        finally:
            await cancel_and_wait([start_signal])
        return True

    async def _signal_start(self, partial: Partial, first_missing: int) -> None:
        """Sets `_started`: at once if some bytes are stored and others are missing, otherwise as soon as the owner has
        stored the byte at `first_missing`."""
        if partial.missing() in ([], [(0, self.size)]):
            await partial.wait(first_missing)
        self._started.set()

    async def _download(self, partial: Partial) -> None:
        """Downloads the missing bytes as the owner, and stores the blob once its digest is verified."""
        context = self._context
        if not self._started.is_set() and await self._is_stored():
            return
        if self._owner_changes and await context.negative_cache.has(self.repo, self.digest):
            raise BlobUnknown
        download = Download(
            context.upstream,
            context.slots,
            context.to_upstream_name(self.repo),
            partial,
            self.demand,
            await context.bad_senders.choose(self.repo, self.digest),
            self._started.set,
            has_begun=self._started.is_set(),
            stall_timeout=context.stall_timeout,
        )
        while True:
            try:
                await download.run()
                break
            except NoReaders:
                if not self.demand.is_alive():
                    raise
        await partial.commit(self.repo, lambda: context.bad_senders.add(self.repo, self.digest, download.endpoints))
        await self._add_to_repositories(self.repositories - {self.repo})

    async def _is_stored(self) -> bool:
        """Returns whether another process had stored the blob before this process became the owner. If so, adds the
        blob to all `repositories`."""
        if not await self._context.entitlement.mount(self.repo, self.digest, self.size):
            return False
        await self._add_to_repositories(self.repositories - {self.repo})
        return True

    async def _add_to_repositories(self, repositories: Collection[RepositoryName]) -> None:
        """Adds the stored blob to further repositories through which it was requested."""
        for repo in list(repositories):
            await self._context.entitlement.mount(repo, self.digest, self.size)

    def _note_owner_change(self) -> None:
        self._owner_changes += 1
        self._owner_changed.set()
        self._owner_changed = asyncio.Event()

    async def _wait_for_owner(self, changes: int) -> None:
        """Waits until `_owner_changes` differs from `changes`, but for `OWNER_POLL_SECONDS` at most, because another
        process may have become the owner without this process noticing it."""
        if self._owner_changes == changes and not self.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(OWNER_POLL_SECONDS):
                    await self._owner_changed.wait()


class Fills:
    """The fills of this process. A fill runs in a task of its own, which goes on after the requests that started or
    joined it."""

    def __init__(self, context: FillContext) -> None:
        self._context = context
        self._fills: dict[tuple[Digest, int], tuple[Fill, asyncio.Task[None]]] = {}
        """Running fills and their tasks, by digest and size of the blob."""
        self._closed = False

    def request(self, repo: RepositoryName, digest: Digest, size: int) -> Fill:
        """Returns the fill of a blob that a client has requested. Starts it if none is running. Not a coroutine, so the
        fill cannot end before the caller uses it. Raises UpstreamUnavailable if the server is stopping."""
        fill = self._find_or_start(repo, digest, size)
        fill.demand.request()
        return fill

    def start_ahead(self, repo: RepositoryName, blob: Descriptor, pull: ImagePull) -> Fill:
        """Returns the fill of a blob that is prefetched for `pull`. Starts it if none is running. Unless a client
        requests the blob, the fill ends when `pull` is no longer active. Raises UpstreamUnavailable if the server is
        stopping."""
        fill = self._find_or_start(repo, blob.digest, blob.size)
        fill.demand.pulls.add(pull)
        return fill

    def find_for(self, repo: RepositoryName, digest: Digest) -> Fill | None:
        """Returns the running fill of a blob, if `repo` is among its `repositories`; otherwise None."""
        for (fill_digest, _), (fill, _) in self._fills.items():
            if fill_digest == digest and repo in fill.repositories and not fill.ended:
                return fill
        return None

    def running(self) -> list[Fill]:
        """Returns the running fills."""
        return [fill for fill, _ in self._fills.values()]

    async def aclose(self) -> None:
        """Cancels all fills. The stored bytes are kept for the next start of the server."""
        self._closed = True
        await cancel_and_wait(task for _, task in self._fills.values())

    def _find_or_start(self, repo: RepositoryName, digest: Digest, size: int) -> Fill:
        """Returns the running fill of a blob, with `repo` added to its repositories, or starts one."""
        if (digest, size) in self._fills:
            fill, _ = self._fills[digest, size]
            fill.repositories.add(repo)
            return fill
        if self._closed:
            raise server_stopping()
        fill = Fill(self._context, repo, digest, size)
        task = start_detached(self._run(fill))
        task.add_done_callback(lambda _: fill.abandon())
        self._fills[digest, size] = (fill, task)
        return fill

    async def _run(self, fill: Fill) -> None:
        try:
            await fill.run()
        finally:
            del self._fills[fill.digest, fill.size]
