"""`Fill`: the download of one blob, followed by any number of readers. `Fills`: the fills of this process.

A fill belongs to no request. Each process that has readers for a blob has one fill. One of these processes owns the
partial blob and downloads; the others follow what it writes. When the owner dies, another process takes over and
continues from the bytes that are stored.
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
"""Time until a follower checks again whether another process has taken over a partial."""
MAX_LOST_OWNERS: Final = 40
"""Owners that may disappear before a follower gives up."""


@dataclass(frozen=True)
class FillContext:
    """What all fills of one mirror share. `upstream_name` returns a repository's name at the upstream. `stall_timeout`:
    seconds without new bytes after which a fill that has readers is given up."""

    upstream: UpstreamClient
    partials: Partials
    slots: ConnectionSlots
    entitlement: BlobEntitlement
    negative_cache: NegativeCache
    bad_senders: BadSenders
    upstream_name: Callable[[RepositoryName], RepositoryName]
    stall_timeout: float = STALL_TIMEOUT_SECONDS


class Fill:
    """The fill of one blob. `size` in bytes. `repo` is the repository asked at the upstream; all of `repositories` are
    entitled to the blob and get it. `error`: why the fill failed."""

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
        self._ended = asyncio.Event()
        self._owner_changes = 0
        self._owner_changed = asyncio.Event()

    @property
    def ended(self) -> bool:
        """Whether the fill has ended, well or not."""
        return self._ended.is_set()

    @property
    def file(self) -> OpenFile:
        """The file that the bytes are written to. Valid while the fill runs, once `wait_started` returned True."""
        assert self._partial is not None
        return self._partial.file

    @property
    def is_queued(self) -> bool:
        """Whether the fill waits for a free connection, in this process or in the owner. Raises StorageFailed."""
        return not self.ended and self._partial is not None and not self._partial.has_started

    async def wait_started(self) -> bool:
        """Waits until the upstream starts to send. Returns False when the fill has ended and the blob is stored. Raises
        the error of the fill."""
        await self._started.wait()
        if self.error is not None:
            raise self.error
        return not self.ended

    async def wait_finished(self) -> None:
        """Waits for the end of the fill. Raises its error."""
        await self._ended.wait()
        if self.error is not None:
            raise self.error

    async def wait_wanted(self) -> None:
        """Waits until a client requests the blob, or until the fill ends. Raises nothing."""
        waits = [asyncio.create_task(event.wait()) for event in (self.demand.requested, self._ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(waits)

    async def wait_until(self, at: int) -> int:
        """Waits until the byte at `at` is stored and returns where the stored bytes end. With `at` equal to `size`,
        waits until the digest is checked. Raises the error of the fill."""
        assert self._partial is not None
        with self.demand.waiting(at):
            while not self.ended:
                changes = self._owner_changes
                try:
                    return await self._partial.wait(at)
                except PartialLost:
                    await self._wait_for_owner(changes)
                except DigestInvalid:
                    await self._ended.wait()  # the fill is about to end; the next request starts a new one
        if self.error is not None:
            raise self.error
        return self.size

    async def run(self) -> None:
        """Runs the fill to its end. Raises nothing. When cancelled, the stored bytes are kept for the next fill."""
        error: RegistryError | None = server_stopping()
        try:
            await self._run()
            error = None
        except NoReaders:
            error = PartialLost("no client waited for the blob any more; try again")
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
        """Records the failure for the followers in other processes, so that they do not repeat the same timeouts one
        after another. Before the first byte, each follower finds out within moments by itself."""
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
        """Ends the fill if its task has ended without doing so, perhaps before it began."""
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
        """Follows the owner, or becomes the owner and downloads. Raises what ended the fill."""
        self._partial = partial = await self._context.partials.claim(
            self.digest, self.size, self._context.upstream.name
        )
        owned, losses = partial.is_owner, 0
        while not owned:
            if not self.demand.requested.is_set():
                raise NoReaders  # another process downloads the blob already
            before = partial.owner_failures
            partial.add_waiter()
            if await self._follow(partial):
                return await self._link(self.repositories)
            if (failed := partial.owner_failures) != before and (failure := decode_failure(self.repo, failed.reason)):
                raise failure
            owned = partial.take_ownership()
            self._note_owner_change()
            if not owned:
                losses += 1
                if losses > MAX_LOST_OWNERS:
                    raise PartialLost
                await asyncio.sleep(OWNER_POLL_SECONDS / 5)
        return await self._download(partial)

    async def _follow(self, partial: Partial) -> bool:
        """Follows the owner in another process. Returns whether the blob is complete; False: the owner has stopped."""
        gaps = partial.missing()
        first = asyncio.create_task(self._await_first(partial, gaps[0][0] if gaps else self.size))
        try:
            await partial.wait(self.size)
        except PartialLost:
            return False
        finally:
            await cancel_and_wait([first])
        return True

    async def _await_first(self, partial: Partial, at: int) -> None:
        """Signals the start of the blob, once the owner has stored a new byte or the partial had some before."""
        if partial.missing() in ([], [(0, self.size)]):
            await partial.wait(at)
        self._started.set()

    async def _download(self, partial: Partial) -> None:
        """Downloads the missing bytes as the owner, and commits the blob."""
        context = self._context
        if not self._started.is_set() and await self._is_stored():
            return
        if self._owner_changes and await context.negative_cache.has(self.repo, self.digest):
            raise BlobUnknown
        download = Download(
            context.upstream,
            context.slots,
            context.upstream_name(self.repo),
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
        await partial.commit(self.repo, lambda: context.bad_senders.note(self.repo, self.digest, download.endpoints))
        await self._link(self.repositories - {self.repo})

    async def _is_stored(self) -> bool:
        """Returns whether the blob was stored before this process became the owner."""
        if not await self._context.entitlement.mount(self.repo, self.digest, self.size):
            return False
        await self._link(self.repositories - {self.repo})
        return True

    async def _link(self, repositories: Collection[RepositoryName]) -> None:
        """Links the blob into further repositories that requested it. A later request finds it stored."""
        for repo in list(repositories):
            await self._context.entitlement.mount(repo, self.digest, self.size)

    def _note_owner_change(self) -> None:
        self._owner_changes += 1
        self._owner_changed.set()
        self._owner_changed = asyncio.Event()

    async def _wait_for_owner(self, changes: int) -> None:
        """Waits until another process owns the partial, or for a moment: the owner may have changed unnoticed."""
        if self._owner_changes == changes and not self.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(OWNER_POLL_SECONDS):
                    await self._owner_changed.wait()


class Fills:
    """The fills of this process, by digest and size. They run independently of the requests that start or follow
    them."""

    def __init__(self, context: FillContext) -> None:
        self._context = context
        self._fills: dict[tuple[Digest, int], tuple[Fill, asyncio.Task[None]]] = {}
        self._closed = False

    def request(self, repo: RepositoryName, digest: Digest, size: int) -> Fill:
        """Returns the blob's fill for a client, started if there is none. Does not await, so the fill cannot end in
        between. Raises UpstreamUnavailable."""
        fill = self._find(repo, digest, size)
        fill.demand.request()
        return fill

    def start_ahead(self, repo: RepositoryName, blob: Descriptor, pull: ImagePull) -> Fill:
        """Returns the blob's fill for the prefetcher, started if there is none. It runs as long as `pull` is active.
        Raises UpstreamUnavailable."""
        fill = self._find(repo, blob.digest, blob.size)
        fill.demand.pulls.add(pull)
        return fill

    def find_for(self, repo: RepositoryName, digest: Digest) -> Fill | None:
        """Returns a running fill for a blob whose `repositories` include `repo`; None: there is none."""
        for (what, _), (fill, _) in self._fills.items():
            if what == digest and repo in fill.repositories and not fill.ended:
                return fill
        return None

    def running(self) -> list[Fill]:
        """Returns the running fills."""
        return [fill for fill, _ in self._fills.values()]

    async def aclose(self) -> None:
        """Cancels all fills. The stored bytes are kept for the next start."""
        self._closed = True
        await cancel_and_wait(task for _, task in self._fills.values())

    def _find(self, repo: RepositoryName, digest: Digest, size: int) -> Fill:
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
