"""What is to be fetched before anybody asks for it, in order and a few at once.

What waits here is a name and no more: no file is open for it, and nothing looks at it until there is a connection that
nobody else wants.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from registry.mirror.demand import Pull
from registry.mirror.fill import Fill
from registry.mirror.flights import end
from storage.content import Descriptor
from storage.errors import RegistryError
from storage.names import Digest, RepositoryName

log = logging.getLogger("registry.mirror")

MOST: Final = 1024
"""Blobs that may wait; who pulls will ask for the others anyway."""
AT_ONCE: Final = 4
"""Fills that nobody waits for."""

Lacks = Callable[[RepositoryName, Descriptor], Awaitable[bool]]
Begin = Callable[[RepositoryName, Descriptor, Pull], Fill]


class Ahead:
    """`lacks` says whether a blob is worth asking for, `room` waits for a connection, `begin` begins a fill."""

    def __init__(self, lacks: Lacks, room: Callable[[], Awaitable[None]], begin: Begin) -> None:
        self._lacks = lacks
        self._room = room
        self._begin = begin
        self._waiting: OrderedDict[tuple[RepositoryName, Digest], tuple[Descriptor, Pull]] = OrderedDict()
        self._runners: set[asyncio.Task[None]] = set()
        self._closed = False

    def add(self, repo: RepositoryName, blobs: Iterable[Descriptor], pull: Pull, *, first: bool = False) -> None:
        """They come after what waits already, or `first`. One that waits is kept for this pull instead of its own."""
        for blob in blobs:
            key = (repo, blob.digest)
            if key in self._waiting or len(self._waiting) < MOST:
                self._waiting[key] = (blob, pull)
                if first:
                    self._waiting.move_to_end(key, last=False)
        if self._closed:
            return
        for _ in range(min(AT_ONCE - len(self._runners), len(self._waiting))):
            runner = asyncio.create_task(self._run())
            self._runners.add(runner)
            runner.add_done_callback(self._runners.discard)

    @property
    def busy(self) -> bool:
        """Whether something is under way or about to be."""
        return bool(self._runners)

    async def aclose(self) -> None:
        """Begins nothing more. What was begun is not this one's."""
        self._closed = True
        self._waiting.clear()
        await end(self._runners)

    async def _run(self) -> None:
        while self._waiting:
            (repo, digest), (blob, pull) = self._waiting.popitem(last=False)
            try:
                if not pull.active() or not await self._lacks(repo, blob):
                    continue
                await self._room()
                if pull.active():
                    await self._begin(repo, blob, pull).attended()
            except RegistryError as error:  # who asks for it will be told
                log.info("%s of %s was not begun ahead: %s", digest, repo, error.message)
