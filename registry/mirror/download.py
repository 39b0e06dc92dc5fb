"""A partial blob's missing bytes are fetched: over as many connections as help, for as long as it takes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Final

from registry.mirror.demand import Demand
from registry.mirror.flights import end
from registry.mirror.pieces import MIB, Pace, Plan
from registry.mirror.sinks import PieceSink, WholeSink
from registry.mirror.source import RangesUnsupported, Source
from storage.content import Span
from storage.errors import (
    BlobUnknown,
    Denied,
    PartialLost,
    RegistryError,
    StorageFailed,
    StorageFull,
    TooManyRequests,
    UpstreamTimeout,
)
from storage.interface import Partial, Turns
from storage.names import RepositoryName

log = logging.getLogger("registry.mirror")

WHOLE: Final = 8 * MIB
"""What is smaller comes in one request."""
TICK: Final = 0.02
YIELD: Final = 0.015
"""Seconds in which whoever waits for a slot has looked again."""
FAILURES: Final = 6
"""Attempts in a row that brought nothing worth counting, after which it is given up."""
PROGRESS: Final = 64 * 1024
"""Bytes worth counting."""
PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 30.0
SPARED: Final = 2
"""Connections that a fetch nobody waits for leaves to others."""


class Unread(Exception):
    """It was begun for readers who did not come."""


class Download:
    """One process's work on one partial blob that it owns. `answered` is called, on the event loop, when the upstream
    has begun to send. `endpoints` are those that sent bytes; `asked`: the source was asked for some."""

    def __init__(
        self,
        source: Source,
        turns: Turns,
        repo: RepositoryName,
        partial: Partial,
        demand: Demand,
        avoid: Collection[str],
        answered: Callable[[], None],
    ) -> None:
        self._source = source
        self._turns = turns
        self._repo = repo
        self._partial = partial
        self._demand = demand
        self._shunned = frozenset(avoid)
        self._failing: set[str] = set()
        self._answered = answered
        self._loop = asyncio.get_running_loop()
        gaps = partial.missing()
        self._plan = Plan(gaps)
        self._small = sum(stop - start for start, stop in gaps) < WHOLE
        self._most = source.connections
        self._pace = Pace(self._most, self._loop.time())
        self._running: set[asyncio.Task[None]] = set()
        self._sinks: dict[PieceSink | WholeSink, bool] = {}  # whether its connection is new
        self._done = 0
        self._begun = False
        self._ranged = False
        self._whole = False
        self._fatal: BaseException | None = None
        self._failures = 0
        self._counted = 0
        self._resume_at = 0.0
        self.endpoints: set[str] = set()
        self.asked = False

    async def run(self) -> None:
        """Returns when nothing is missing. Raises Unread; PartialLost; StorageFull, StorageFailed; BlobUnknown, Denied,
        UpstreamUnavailable, UpstreamTimeout, TooManyRequests. Whatever is raised, what came stays."""
        try:
            while self._fatal is None and (self._left() or self._running):
                if not self._running and not self._demand.alive():
                    raise Unread
                self._staff()
                await self._wait()
                waiting = any(new and sink.endpoint is None for sink, new in self._sinks.items())
                self._pace.observe(self._loop.time(), self._received, len(self._running), waiting)
            if self._fatal is not None:
                raise self._fatal
        finally:
            await end(self._running)

    def _left(self) -> bool:
        return bool(self._partial.missing()) if self._whole else self._plan.remaining > 0

    @property
    def _received(self) -> int:
        return self._done + sum(sink.new_bytes for sink in self._sinks)

    def _staff(self) -> None:
        """As many connections as there should be now."""
        if self._loop.time() < self._resume_at or not self._demand.alive():
            return
        want = 1 if self._small or self._whole or not self._begun else self._pace.width
        while len(self._running) < want and self._left():
            if self._whole and self._running:
                return
            work = self._work_on(first=not self._running)
            self._running.add(asyncio.create_task(work))
            if want == 1:
                return

    async def _wait(self) -> None:
        if not self._running:
            await asyncio.sleep(min(max(self._resume_at - self._loop.time(), 0.001), TICK))
            return
        ended, _ = await asyncio.wait(self._running, timeout=TICK, return_when=asyncio.FIRST_COMPLETED)
        self._running -= ended
        for task in ended:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fatal = self._fatal or error

    async def _work_on(self, *, first: bool) -> None:
        """A connection: piece after piece, each in a slot of its own, so that others come to their turn between."""
        new = True
        while self._goes_on(first):
            async with self._slot(first, new) as free:
                if not free:
                    # Others have them all, or nobody waits for this one any more.
                    self._pace.deny(self._loop.time(), len(self._running) - 1)
                    return
                if self._goes_on(first) and not await self._fetch(new):
                    return
            new = False

    def _goes_on(self, first: bool) -> bool:
        if self._fatal is not None or not self._left() or not self._demand.alive():
            return False
        if self._loop.time() < self._resume_at or (self._whole and len(self._running) > 1):
            return False
        return first or len(self._running) <= self._pace.width

    @asynccontextmanager
    async def _slot(self, first: bool, new: bool) -> AsyncIterator[bool]:
        """The first connection waits for a slot, and for its next piece behind those who wait already; a further one
        takes what others leave, and the last one only when nobody else takes it for a moment. While nobody waits for
        the blob, a few slots stay free for those somebody waits for."""
        name, spared = f"upstream-{self._source.name}", min(SPARED, self._most - 1)
        while first and not self._demand.asked.is_set() and self._demand.alive():
            async with self._turns.try_slot(name, self._most, spared) as free:
                if free:
                    yield True
                    return
            try:
                await asyncio.wait_for(self._demand.asked.wait(), 2 * TICK)
            except TimeoutError:
                continue
        if first and self._demand.asked.is_set():
            if not new:
                async with self._turns.try_slot(name, self._most, 1) as free:
                    if free:
                        yield True
                        return
                await asyncio.sleep(YIELD)
            async with self._turns.slot(name, self._most):
                yield True
            return
        if first:
            yield False
            return
        spared = min(1 if self._demand.asked.is_set() else SPARED + 1, self._most - 1)
        async with self._turns.try_slot(name, self._most, spared) as free:
            if free:
                yield True
                return
        if self._demand.asked.is_set():
            await asyncio.sleep(YIELD)
            async with self._turns.try_slot(name, self._most) as free:
                yield free
            return
        yield False

    async def _fetch(self, new: bool) -> bool:
        """One request. False: this connection is to end."""
        sink = self._next_sink()
        if sink is None:
            return False
        self._sinks[sink] = new
        self.asked = True
        span = Span(sink.piece.start, sink.piece.stop) if isinstance(sink, PieceSink) else Span(0)
        if span == Span(0, self._partial.size):
            span = Span(0)
        try:
            await self._source.fetch_blob(self._repo, self._partial.digest, span, sink, self._shunned | self._failing)
        except RegistryError as error:
            self._on_error(sink, error)
            return False
        finally:
            del self._sinks[sink]
            self._done += sink.new_bytes
            if isinstance(sink, PieceSink):
                self._plan.give_back(sink.piece)
        if isinstance(sink, PieceSink):
            self._ranged = self._ranged or span.stop is not None
            seconds = time.monotonic() - sink.begun_at
            self._pace.note_piece(sink.new_bytes, seconds, sink.begun_at - sink.asked_at)
        return True

    def _next_sink(self) -> PieceSink | WholeSink | None:
        if self._whole:
            return WholeSink(self._partial, self._partial.missing(), self._begin)
        left = self._plan.remaining
        length = left if self._small else self._pace.next_length(left)
        piece = self._plan.take(length, self._demand.offsets)
        return PieceSink(self._partial, piece, self._begin) if piece else None

    def _begin(self) -> None:
        """In the thread that fetches."""
        self._loop.call_soon_threadsafe(self._on_begin)

    def _on_begin(self) -> None:
        self.endpoints.update(sink.endpoint for sink in self._sinks if sink.endpoint)
        self._begun = True
        self._answered()

    def _on_error(self, sink: PieceSink | WholeSink, error: RegistryError) -> None:
        """What now: go on, pause, or give up."""
        if sink.endpoint is not None:
            self.endpoints.add(sink.endpoint)
            self._begun = True  # its call to the loop may still be on its way
        final = isinstance(error, PartialLost | StorageFull | StorageFailed | Denied)
        if final or (isinstance(error, BlobUnknown) and not self._begun):
            self._fatal = self._fatal or error
        elif isinstance(error, RangesUnsupported) and not self._ranged:
            self._whole = True
        else:
            self._on_break(sink, error)

    def _on_break(self, sink: PieceSink | WholeSink, error: RegistryError) -> None:
        now = self._loop.time()
        if sink.endpoint is not None:
            self._failing = {sink.endpoint}
        if now < self._resume_at:
            return  # it broke together with another
        got = self._received
        if got - self._counted >= PROGRESS:
            self._failures = 0
        self._counted = got
        self._failures += 1
        most = FAILURES if self._begun else 1 if isinstance(error, UpstreamTimeout) else 2
        pause = PAUSE * 2 ** (self._failures - 1)
        if isinstance(error, TooManyRequests):
            pause = max(pause, float(error.retry_after))
        if self._failures >= most or pause > (LONGEST_PAUSE if self._begun else 2.0):
            self._fatal = self._fatal or error
            return
        if isinstance(error, RangesUnsupported) and self._failures > 1:
            self._whole = True
        log.info("%s of %s broke off: %s; going on in %.1f s", self._partial.digest, self._repo, error.message, pause)
        self._resume_at = now + pause
        self._pace.fail(now)
