"""The fills of this process, one for each blob."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from registry.mirror.demand import Pull
from registry.mirror.fill import Fill, Tools, is_wrong
from registry.mirror.flights import end
from storage.errors import UpstreamUnavailable
from storage.names import Digest, RepositoryName

log = logging.getLogger("registry.mirror")

TRIES: Final = 3
"""Times a blob may come wrong before it is left alone for a while."""
GRUDGE: Final = 60.0
"""Seconds for which it is remembered who sent wrong bytes."""


class _Suspicion:
    """Endpoints that sent wrong bytes for a blob. `until`: when that is forgotten."""

    def __init__(self) -> None:
        self.endpoints: set[str] = set()
        self.times = 0
        self.until = 0.0


class Fills:
    """`clock` runs on, in seconds."""

    def __init__(self, tools: Tools, clock: Callable[[], float]) -> None:
        self._tools = tools
        self._clock = clock
        self._fills: dict[tuple[Digest, int], tuple[Fill, asyncio.Task[None]]] = {}
        self._suspicions: dict[Digest, _Suspicion] = {}
        self._closed = False

    def want(self, repo: RepositoryName, digest: Digest, size: int, pull: Pull | None = None) -> Fill:
        """The blob's fill, begun if there is none; for a client, or only for a `pull` it may be asked for in. Nothing
        is awaited between looking it up and holding it. Raises UpstreamUnavailable."""
        found = self._fills.get((digest, size))
        fill = found[0] if found else self._start(repo, digest, size)
        fill.repositories.add(repo)
        if pull is None:
            fill.demand.ask()
        else:
            fill.demand.pulls.add(pull)
        return fill

    def running(self) -> list[Fill]:
        return [fill for fill, _ in self._fills.values()]

    async def aclose(self) -> None:
        """Ends them all; what has come stays for the next time."""
        self._closed = True
        await end(task for _, task in self._fills.values())

    def _start(self, repo: RepositoryName, digest: Digest, size: int) -> Fill:
        if self._closed:
            raise UpstreamUnavailable("the server is stopping; try again in a moment")
        suspicion = self._suspicion(digest)
        if suspicion.times >= TRIES:
            raise UpstreamUnavailable(f"the upstream has sent wrong bytes for {digest} {suspicion.times} times")
        fill = Fill(self._tools, repo, digest, size, frozenset(suspicion.endpoints))
        task = asyncio.create_task(self._run(fill))
        task.add_done_callback(lambda _: fill.abandon())
        self._fills[digest, size] = (fill, task)
        return fill

    async def _run(self, fill: Fill) -> None:
        try:
            await fill.run()
        finally:
            del self._fills[fill.digest, fill.size]
            if is_wrong(fill.error):
                self._suspect(fill)

    def _suspicion(self, digest: Digest) -> _Suspicion:
        now = self._clock()
        for old in [old for old, suspicion in self._suspicions.items() if suspicion.until < now]:
            del self._suspicions[old]
        return self._suspicions.get(digest) or _Suspicion()

    def _suspect(self, fill: Fill) -> None:
        suspicion = self._suspicion(fill.digest)
        suspicion.endpoints |= set(fill.endpoints)
        suspicion.times += 1
        suspicion.until = self._clock() + GRUDGE
        self._suspicions[fill.digest] = suspicion
        log.error(
            "%s of %s came with other bytes than its digest says, from %s; nothing of it is kept",
            fill.digest,
            fill.repo,
            ", ".join(sorted(fill.endpoints)) or "another process's upstream",
        )
