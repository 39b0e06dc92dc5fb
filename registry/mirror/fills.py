"""The fills of this process, one for each blob and size."""

from __future__ import annotations

import asyncio

from registry.mirror.demand import Pull
from registry.mirror.fill import Fill, Tools
from registry.mirror.flights import end
from storage.content import Descriptor
from storage.errors import UpstreamUnavailable
from storage.names import Digest, RepositoryName


class Fills:
    """They run by themselves, whoever wants them or leaves."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._fills: dict[tuple[Digest, int], tuple[Fill, asyncio.Task[None]]] = {}
        self._closed = False

    def want(self, repo: RepositoryName, digest: Digest, size: int) -> Fill:
        """The blob's fill for a client, begun if there is none. Nothing is awaited between looking it up and holding
        it. Raises UpstreamUnavailable."""
        fill = self._find(repo, digest, size)
        fill.demand.ask()
        return fill

    def begin(self, repo: RepositoryName, blob: Descriptor, pull: Pull) -> Fill:
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
        await end(task for _, task in self._fills.values())

    def _find(self, repo: RepositoryName, digest: Digest, size: int) -> Fill:
        if (digest, size) in self._fills:
            fill, _ = self._fills[digest, size]
            fill.repositories.add(repo)
            return fill
        if self._closed:
            raise UpstreamUnavailable("the server is stopping; try again in a moment")
        fill = Fill(self._tools, repo, digest, size)
        task = asyncio.create_task(self._run(fill))
        task.add_done_callback(lambda _: fill.abandon())
        self._fills[digest, size] = (fill, task)
        return fill

    async def _run(self, fill: Fill) -> None:
        try:
            await fill.run()
        finally:
            del self._fills[fill.digest, fill.size]
