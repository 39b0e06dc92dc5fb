"""A partial blob's missing bytes are fetched: over as many connections as help, for as long as it takes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from registry.mirror.breaks import PERSISTENCE, Breaks
from registry.mirror.demand import Demand
from registry.mirror.flights import end
from registry.mirror.pieces import MIB, Pace, Plan
from registry.mirror.sinks import PieceSink, WholeSink
from registry.mirror.slots import Slots
from registry.mirror.source import RangesUnsupported, Source
from registry.mirror.stragglers import Stragglers
from registry.mirror.suspicions import Choice
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
from storage.interface import Partial
from storage.names import RepositoryName

log = logging.getLogger("registry.mirror")

WHOLE: Final = 8 * MIB
"""What is smaller comes in one request."""
TICK: Final = 0.02
"""Seconds between two looks at what is coming."""
LOOK: Final = 0.1
"""Seconds between two looks whether somebody wants it, while nothing is coming and nobody does."""


class Unread(Exception):
    """It was begun for readers who did not come."""


class _Request:
    """One that is under way. `new`: its connection has brought nothing before. `scope` ends it."""

    def __init__(self, new: bool, scope: asyncio.Timeout) -> None:
        self.new = new
        self.scope = scope


class Download:
    """One process's work on one partial blob that it owns. `answered` is called, on the event loop, when the upstream
    has begun to send. `endpoints` are those that sent bytes. `begun`: somebody has been given bytes by an owner before
    this one; then it goes on for `persistence` seconds without any, else only for moments."""

    def __init__(
        self,
        source: Source,
        slots: Slots,
        repo: RepositoryName,
        partial: Partial,
        demand: Demand,
        choice: Choice,
        answered: Callable[[], None],
        *,
        begun: bool = False,
        persistence: float = PERSISTENCE,
    ) -> None:
        self._source = source
        self._slots = slots
        self._repo = repo
        self._partial = partial
        self._demand = demand
        self._choice = choice
        self._failing: set[str] = set()
        self._answered = answered
        self._loop = asyncio.get_running_loop()
        gaps = partial.missing()
        self._plan = Plan(gaps)
        self._small = sum(stop - start for start, stop in gaps) < WHOLE
        self._pace = Pace(slots.most, self._loop.time())
        self._breaks = Breaks(persistence)
        self._stragglers: Stragglers[PieceSink | WholeSink] = Stragglers()
        self._running: set[asyncio.Task[None]] = set()
        self._requests: dict[PieceSink | WholeSink, _Request] = {}
        self._changed = asyncio.Event()
        self._done = 0
        self._begun = begun
        self._ranged = False
        self._whole = False
        self._fatal: BaseException | None = None
        self.endpoints: set[str] = set()

    async def run(self) -> None:
        """Returns when nothing is missing. Raises Unread; PartialLost; StorageFull, StorageFailed; BlobUnknown, Denied,
        UpstreamUnavailable, UpstreamTimeout, TooManyRequests. Whatever is raised, what came stays."""
        try:
            while self._goes_on_running():
                if not self._demand.asked.is_set() and self._partial.wanted:
                    self._demand.ask()
                if not self._running and not self._demand.alive():
                    raise Unread
                self._staff()
                await self._wait()
                waiting = any(request.new and sink.endpoint is None for sink, request in self._requests.items())
                self._pace.observe(self._loop.time(), self._received, len(self._running), waiting)
                self._cut_stragglers()
            if self._fatal is not None:
                raise self._fatal
        finally:
            await end(self._running)

    def _goes_on_running(self) -> bool:
        """Whether there is more to do, after a look at what has ended. What changes from here on is told."""
        self._changed.clear()
        ended = {task for task in self._running if task.done()}
        self._running -= ended
        for task in ended:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fatal = self._fatal or error
        return self._fatal is None and (self._left() or bool(self._running))

    def _left(self) -> bool:
        return bool(self._partial.missing()) if self._whole else self._plan.remaining > 0

    @property
    def _received(self) -> int:
        return self._done + sum(sink.new_bytes for sink in self._requests)

    def _staff(self) -> None:
        """As many connections as there should be now."""
        if self._loop.time() < self._breaks.resume_at or not self._demand.alive():
            return
        want = 1 if self._small or self._whole or not self._begun else self._pace.width
        while len(self._running) < want and self._left():
            if self._whole and self._running:
                return
            task = asyncio.create_task(self._work_on(first=not self._running))
            task.add_done_callback(lambda _: self._changed.set())
            self._running.add(task)
            if want == 1:
                return

    async def _wait(self) -> None:
        """Until a connection begins or ends, or it is time to look."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._patience()):
                await self._changed.wait()

    def _patience(self) -> float | None:
        if self._requests:
            return TICK
        pause = self._breaks.resume_at - self._loop.time()
        if not self._demand.asked.is_set():
            return min(pause, LOOK) if pause > 0 else LOOK
        return max(pause, 0.001) if pause > 0 or not self._running else None

    async def _work_on(self, *, first: bool) -> None:
        """A connection: piece after piece, each in a slot of its own, so that others come to their turn between."""
        new = True
        while self._goes_on(first):
            slot = self._slots.first(self._demand, new=new) if first else self._slots.further(self._demand)
            async with slot as free:
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
        if self._loop.time() < self._breaks.resume_at or (self._whole and len(self._running) > 1):
            return False
        return first or len(self._running) <= self._pace.width

    async def _fetch(self, new: bool) -> bool:
        """One request. False: this connection is to end."""
        sink = self._next_sink()
        if sink is None:
            return False
        span = Span(sink.piece.start, sink.piece.stop) if isinstance(sink, PieceSink) else Span(0)
        if span == Span(0, self._partial.size):
            span = Span(0)
        scope = asyncio.timeout(None)
        self._requests[sink] = _Request(new, scope)
        self._changed.set()
        try:
            self._partial.begin()
            async with scope:
                await self._source.fetch_blob(
                    self._repo, self._partial.digest, span, sink, self._choice.last | self._failing
                )
        except TimeoutError:
            if not scope.expired():
                raise
            return True  # it was cut; what was left of its piece is for whoever takes it
        except RegistryError as error:
            self._on_error(sink, error, ranged=span != Span(0))
            return False
        finally:
            del self._requests[sink]
            self._done += sink.new_bytes
            if isinstance(sink, PieceSink):
                self._plan.give_back(sink.piece)
        if isinstance(sink, PieceSink):
            self._ranged = self._ranged or span.stop is not None
            seconds = time.monotonic() - sink.begun_at
            self._pace.note_piece(sink.new_bytes, seconds, sink.begun_at - sink.asked_at)
            self._stragglers.note_piece(self._loop.time(), sink.new_bytes, seconds)
        return True

    def _next_sink(self) -> PieceSink | WholeSink | None:
        if self._whole:
            return WholeSink(self._partial, self._partial.missing(), self._begin, self._choice.refused)
        left = self._plan.remaining
        length = left if self._small else self._pace.next_length(left)
        piece = self._plan.take(length, self._demand.offsets)
        return PieceSink(self._partial, piece, self._begin, self._choice.refused) if piece else None

    def _cut_stragglers(self) -> None:
        """Once nothing is left to be asked for, what is left of the slowest pieces is asked for anew."""
        now = self._loop.time()
        pieces = {sink: sink.piece for sink in self._requests if isinstance(sink, PieceSink) and sink.endpoint}
        self._stragglers.observe(now, {sink: piece.at - piece.start for sink, piece in pieces.items()})
        if self._plan.remaining:
            return
        for sink in self._stragglers.find(now, {sink: piece.stop - piece.at for sink, piece in pieces.items()}):
            log.info("a connection for %s of %s is much slower than the others", self._partial.digest, self._repo)
            self._requests[sink].scope.reschedule(now)

    def _begin(self) -> None:
        """In the thread that fetches."""
        self._loop.call_soon_threadsafe(self._on_begin)

    def _on_begin(self) -> None:
        self.endpoints.update(sink.endpoint for sink in self._requests if sink.endpoint)
        self._begun = True
        self._changed.set()
        self._answered()

    def _on_error(self, sink: PieceSink | WholeSink, error: RegistryError, *, ranged: bool) -> None:
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
            self._on_break(sink, error, ranged=ranged)

    def _on_break(self, sink: PieceSink | WholeSink, error: RegistryError, *, ranged: bool) -> None:
        now = self._loop.time()
        if sink.endpoint is not None:
            self._failing = {sink.endpoint}
        if now < self._breaks.resume_at:
            return  # it broke together with another
        if not self._breaks.persist(error, now, self._received, begun=self._begun):
            if not self._may_want_whole(error, ranged):
                self._fatal = self._fatal or error
                return
            self._whole = True
            self._breaks.once_more(now)
        if isinstance(error, RangesUnsupported) and self._breaks.in_row > 1:
            self._whole = True
        pause = self._breaks.resume_at - now
        log.info("%s of %s broke off: %s; going on in %.1f s", self._partial.digest, self._repo, error.message, pause)
        self._pace.fail(now)

    def _may_want_whole(self, error: RegistryError, ranged: bool) -> bool:
        """Some refuse a Range with an error where they should leave it alone: asked whole, they may answer."""
        if self._begun or self._whole or not ranged:
            return False
        return not isinstance(error, UpstreamTimeout | TooManyRequests)
