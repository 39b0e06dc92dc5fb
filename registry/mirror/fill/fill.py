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

from registry.mirror.fill.download import Download, NoReaders
from registry.mirror.fill.retry import STALL_TIMEOUT_SECONDS, BadSenders, decode_failure, encode_failure
from registry.mirror.fill.slots import ConnectionSlots, Demand, ImagePull
from registry.mirror.freshness import NegativeCache
from registry.mirror.manifests import MIRROR_ACTOR
from registry.mirror.upstream_client import UnconfirmedBlobUnknown, UpstreamClient
from registry.request import detached_context
from registry.single_flight import cancel_and_wait
from storage.content import Descriptor, OpenFile
from storage.errors import (
    BlobUnknown,
    DigestInvalid,
    PartialLost,
    RegistryError,
    StorageFull,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.interface import Leases, Partial, Partials, Registry, UpstreamRecords
from storage.names import Digest, RepositoryName

log = logging.getLogger("registry.mirror")

OWNER_POLL_SECONDS: Final = 0.05
"""Seconds until what another process is just changing is looked at again."""
MAX_LOST_OWNERS: Final = 40


@dataclass(frozen=True)
class FillContext:
    """What fills work with. `far` gives a stored name as the upstream has it. `persistence`: seconds without progress
    after which a fill that somebody reads is given up. `private`: see `Upstream.private`."""

    local: Registry
    source: UpstreamClient
    partials: Partials
    leases: Leases
    slots: ConnectionSlots
    misses: NegativeCache
    bad_senders: BadSenders
    records: UpstreamRecords
    far: Callable[[RepositoryName], RepositoryName]
    persistence: float = STALL_TIMEOUT_SECONDS
    private: bool = False

    async def entitled(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the stored blob may be served from this repository without asking the upstream."""
        return not self.private or await self.records.confirmed(repo, digest)

    async def mount(self, repo: RepositoryName, digest: Digest, size: int) -> RepositoryName | None:
        """Gives a repository that is entitled to the blob what another of this upstream's has. Of no other's: whoever
        publishes a manifest at one upstream must not read with it what is hosted here, or comes from another. Of a
        private upstream, the caller has the upstream's own word that the repository has the blob, with this `size`. A
        login page has a length as well, so the word counts only if it is the length of what is stored. Returns the
        repository through which it can be read: where the disk is full, the other one."""
        holder = await self.records.find_holder(f"{self.source.name}/", digest)
        if holder is None:
            return None
        try:
            if self.private and (await self.local.resolve_blob(holder, digest)).size != size:
                return None
            await self.local.mount_blob(repo, digest, holder, MIRROR_ACTOR)
            if self.private:
                await self.records.confirm(repo, digest)
        except BlobUnknown:  # collected since
            return None
        except StorageFull:
            return holder
        return repo


class Fill:
    """`size` in bytes. `repo` is asked for the blob; `repositories` get it: each of them is entitled to it. `error`:
    why it ended, where it did not end well."""

    def __init__(self, tools: FillContext, repo: RepositoryName, digest: Digest, size: int) -> None:
        self.repo = repo
        self.digest = digest
        self.size = size
        self.repositories = {repo}
        self.demand = Demand()
        self.error: RegistryError | None = None
        self._tools = tools
        self._partial: Partial | None = None
        self._answer = asyncio.Event()
        self._ended = asyncio.Event()
        self._turn = 0
        self._turned = asyncio.Event()

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

    async def opened(self) -> bool:
        """Waits until the upstream has begun to send. False: the blob is content, and to be had where it is stored.
        Raises what ended the fill."""
        await self._answer.wait()
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
        waits = [asyncio.create_task(event.wait()) for event in (self.demand.asked, self._ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_and_wait(waits)

    async def wait(self, at: int) -> int:
        """Waits until the byte at `at` is there; how far they reach from there. `at` equal to `size`: until the digest
        is checked. Raises what ended the fill, DigestInvalid."""
        assert self._partial is not None
        with self.demand.waiting(at):
            while not self.ended:
                turn = self._turn
                try:
                    return await self._partial.wait(at)
                except PartialLost:
                    await self._next_turn(turn)
                except DigestInvalid:
                    await self._ended.wait()  # it is about to end; whoever asks again then gets another fill
        if self.error is not None:
            raise self.error
        return self.size

    async def run(self) -> None:
        """Its whole life. Raises nothing; cancelled, what came stays for the next."""
        error: RegistryError | None = _stopping()
        try:
            await self._run()
            error = None
        except NoReaders:
            error = PartialLost("nobody waited for the blob any more; try again")
        except BlobUnknown as unknown:
            error = unknown
            if not isinstance(unknown, UnconfirmedBlobUnknown):
                with suppress(RegistryError):
                    await self._tools.misses.note(self.repo, self.digest)
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
        if partial is None or not partial.owned or not (self._answer.is_set() or isinstance(failure, UpstreamTimeout)):
            return
        if (reason := encode_failure(self.repo, failure)) is not None:
            await partial.report_failure(reason)

    def abandon(self) -> None:
        """Its task has ended, perhaps before it began."""
        if not self.ended:
            self._end(_stopping())

    def _end(self, error: RegistryError | None) -> None:
        self.error = error
        self._ended.set()
        self._answer.set()
        self._turned.set()
        if self._partial is not None:
            self._partial.close()

    async def _run(self) -> None:
        self._partial = partial = await self._tools.partials.claim(self.digest, self.size, self._tools.source.name)
        owned, losses = partial.owned, 0
        while not owned:
            if not self.demand.asked.is_set():
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
            self._take_turn()
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
        self._answer.set()

    async def _bring_in(self, partial: Partial) -> None:
        tools = self._tools
        if not self._answer.is_set() and await self._stored():
            return
        if self._turn and await tools.misses.has(self.repo, self.digest):
            raise BlobUnknown
        download = Download(
            tools.source,
            tools.slots,
            tools.far(self.repo),
            partial,
            self.demand,
            await tools.bad_senders.choose(self.repo, self.digest),
            self._answer.set,
            begun=self._answer.is_set(),
            persistence=tools.persistence,
        )
        while True:
            try:
                await download.run()
                break
            except NoReaders:
                if not self.demand.alive():
                    raise
        await partial.commit(self.repo, lambda: tools.bad_senders.note(self.repo, self.digest, download.endpoints))
        await self._link(self.repositories - {self.repo})

    async def _stored(self) -> bool:
        """Whether it came in, by whatever way, before this process got the right to fetch it."""
        if not await self._tools.mount(self.repo, self.digest, self.size):
            return False
        await self._link(self.repositories - {self.repo})
        return True

    async def _link(self, repositories: Collection[RepositoryName]) -> None:
        """The others that were asked for it get it too; one that comes later finds it stored."""
        for repo in list(repositories):
            await self._tools.mount(repo, self.digest, self.size)

    def _take_turn(self) -> None:
        self._turn += 1
        self._turned.set()
        self._turned = asyncio.Event()

    async def _next_turn(self, turn: int) -> None:
        """The owner is gone: waits until somebody has taken over, or a moment, in which somebody may have done so
        unseen."""
        if self._turn == turn and not self.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(OWNER_POLL_SECONDS):
                    await self._turned.wait()


def _stopping() -> UpstreamUnavailable:
    return UpstreamUnavailable("the server is stopping; try again in a moment")


class Fills:
    """They run by themselves, whoever wants them or leaves."""

    def __init__(self, tools: FillContext) -> None:
        self._tools = tools
        self._fills: dict[tuple[Digest, int], tuple[Fill, asyncio.Task[None]]] = {}
        self._closed = False

    def want(self, repo: RepositoryName, digest: Digest, size: int) -> Fill:
        """The blob's fill for a client, begun if there is none. Nothing is awaited between looking it up and holding
        it. Raises UpstreamUnavailable."""
        fill = self._find(repo, digest, size)
        fill.demand.ask()
        return fill

    def begin(self, repo: RepositoryName, blob: Descriptor, pull: ImagePull) -> Fill:
        """The same for a blob that a client may ask for in that `pull`."""
        fill = self._find(repo, blob.digest, blob.size)
        fill.demand.pulls.add(pull)
        return fill

    def of(self, repo: RepositoryName, digest: Digest) -> Fill | None:
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
            raise UpstreamUnavailable("the server is stopping; try again in a moment")
        fill = Fill(self._tools, repo, digest, size)
        task = asyncio.create_task(self._run(fill), context=detached_context())
        task.add_done_callback(lambda _: fill.abandon())
        self._fills[digest, size] = (fill, task)
        return fill

    async def _run(self, fill: Fill) -> None:
        try:
            await fill.run()
        finally:
            del self._fills[fill.digest, fill.size]
