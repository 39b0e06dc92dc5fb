"""`Fill`: one blob on its way in, for any number of readers. It belongs to none of them.

Each process has one for a blob that somebody wants there; over all processes one of them downloads, and the others
follow what it writes. When that one dies, the next goes on where it was.

The fills of this process, one for each blob and size.
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
from storage.interface import Partial, Partials
from storage.names import Digest, RepositoryName

log = logging.getLogger("registry.mirror")

OWNER_POLL_SECONDS: Final = 0.05
"""Seconds until what another process is just changing is looked at again."""
MAX_LOST_OWNERS: Final = 40


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
    """`size` in bytes. `repo` is asked for the blob; `repositories` get it: each of them is entitled to it. `error`:
    why it ended, where it did not end well."""

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
        return self._ended.is_set()

    @property
    def file(self) -> OpenFile:
        """Where the bytes are while it runs, once `opened` was true."""
        assert self._partial is not None
        return self._partial.file

    @property
    def is_queued(self) -> bool:
        """It waits for a connection, here or in the process whose it is, since the upstream has as many as it may have:
        nothing speaks against it. Raises StorageFailed."""
        return not self.ended and self._partial is not None and not self._partial.begun

    async def wait_started(self) -> bool:
        """Waits until the upstream has begun to send. False: the blob is content, and to be had where it is stored.
        Raises what ended the fill."""
        await self._started.wait()
        if self.error is not None:
            raise self.error
        return not self.ended

    async def wait_finished(self) -> None:
        """Waits for its end. Raises what ended it."""
        await self._ended.wait()
        if self.error is not None:
            raise self.error

    async def wait_wanted(self) -> None:
        """Waits until somebody wants it who was not there when it began, or until its end. Raises nothing."""
        waits = [asyncio.create_task(event.wait()) for event in (self.demand.requested, self._ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(waits)

    async def wait_until(self, at: int) -> int:
        """Waits until the byte at `at` is there; how far they reach from there. `at` equal to `size`: until the digest
        is checked. Raises what ended the fill, DigestInvalid."""
        assert self._partial is not None
        with self.demand.waiting(at):
            while not self.ended:
                changes = self._owner_changes
                try:
                    return await self._partial.wait(at)
                except PartialLost:
                    await self._wait_for_owner(changes)
                except DigestInvalid:
                    await self._ended.wait()  # it is about to end; whoever asks again then gets another fill
        if self.error is not None:
            raise self.error
        return self.size

    async def run(self) -> None:
        """Its whole life. Raises nothing; cancelled, what came stays for the next."""
        error: RegistryError | None = server_stopping()
        try:
            await self._run()
            error = None
        except NoReaders:
            error = PartialLost("nobody waited for the blob any more; try again")
        except BlobUnknown as unknown:
            error = unknown
            if not isinstance(unknown, UnconfirmedBlobUnknown):
                with suppress(RegistryError):
                    await self._context.negative_cache.note(self.repo, self.digest)
        except RegistryError as failure:
            error = failure
            await self._tell_followers(failure)
        except Exception:
            log.exception("the fill of %s failed", self.digest)
            error = UpstreamUnavailable("the blob could not be fetched; the server's log says why")
        finally:
            self._end(error)

    async def _tell_followers(self, failure: RegistryError) -> None:
        """Of other processes: so that they need not find out for themselves, one after the other and each as patiently,
        what this one knows. Where nothing has come yet each finds it out within moments."""
        partial = self._partial
        if partial is None or not partial.owned or not (self._started.is_set() or isinstance(failure, UpstreamTimeout)):
            return
        if (reason := encode_failure(self.repo, failure)) is not None:
            await partial.report_failure(reason)

    def abandon(self) -> None:
        """Its task has ended, perhaps before it began."""
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
        self._partial = partial = await self._context.partials.claim(
            self.digest, self.size, self._context.upstream.name
        )
        owned, losses = partial.owned, 0
        while not owned:
            if not self.demand.requested.is_set():
                raise NoReaders  # another process is at it
            before = partial.owner_failures
            partial.want()
            if await self._follow(partial):
                return await self._link(self.repositories)
            if (given_up := partial.owner_failures) != before and (
                failure := decode_failure(self.repo, given_up.reason)
            ):
                raise failure
            owned = partial.own()
            self._note_owner_change()
            if not owned:
                losses += 1
                if losses > MAX_LOST_OWNERS:
                    raise PartialLost
                await asyncio.sleep(OWNER_POLL_SECONDS / 5)
        return await self._bring_in(partial)

    async def _follow(self, partial: Partial) -> bool:
        """Another process downloads; False: it does no more."""
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
        if partial.missing() in ([], [(0, self.size)]):
            await partial.wait(at)
        self._started.set()

    async def _bring_in(self, partial: Partial) -> None:
        context = self._context
        if not self._started.is_set() and await self._stored():
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

    async def _stored(self) -> bool:
        """Whether it came in, by whatever way, before this process got the right to fetch it."""
        if not await self._context.entitlement.mount(self.repo, self.digest, self.size):
            return False
        await self._link(self.repositories - {self.repo})
        return True

    async def _link(self, repositories: Collection[RepositoryName]) -> None:
        """The others that were asked for it get it too; one that comes later finds it stored."""
        for repo in list(repositories):
            await self._context.entitlement.mount(repo, self.digest, self.size)

    def _note_owner_change(self) -> None:
        self._owner_changes += 1
        self._owner_changed.set()
        self._owner_changed = asyncio.Event()

    async def _wait_for_owner(self, changes: int) -> None:
        """The owner is gone: waits until somebody has taken over, or a moment, in which somebody may have done so
        unseen."""
        if self._owner_changes == changes and not self.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(OWNER_POLL_SECONDS):
                    await self._owner_changed.wait()


class Fills:
    """They run by themselves, whoever wants them or leaves."""

    def __init__(self, context: FillContext) -> None:
        self._context = context
        self._fills: dict[tuple[Digest, int], tuple[Fill, asyncio.Task[None]]] = {}
        self._closed = False

    def request(self, repo: RepositoryName, digest: Digest, size: int) -> Fill:
        """The blob's fill for a client, begun if there is none. Nothing is awaited between looking it up and holding
        it. Raises UpstreamUnavailable."""
        fill = self._find(repo, digest, size)
        fill.demand.request()
        return fill

    def start_ahead(self, repo: RepositoryName, blob: Descriptor, pull: ImagePull) -> Fill:
        """The same for a blob that a client may ask for in that `pull`."""
        fill = self._find(repo, blob.digest, blob.size)
        fill.demand.pulls.add(pull)
        return fill

    def find_for(self, repo: RepositoryName, digest: Digest) -> Fill | None:
        """One that brings the blob in for that repository, which was found to be entitled to it."""
        for (what, _), (fill, _) in self._fills.items():
            if what == digest and repo in fill.repositories and not fill.ended:
                return fill
        return None

    def running(self) -> list[Fill]:
        return [fill for fill, _ in self._fills.values()]

    async def aclose(self) -> None:
        """Ends them all; what has come stays for the next time."""
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
