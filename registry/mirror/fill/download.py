"""A partial blob's missing bytes are fetched: over as many connections as help, for as long as it takes.

Where the bytes of one request go: into the partial blob, in the thread that fetches them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from registry.mirror.fill.pieces import MIB, AdaptiveConcurrency, Piece, PiecePlan, StragglerDetector
from registry.mirror.fill.retry import STALL_TIMEOUT_SECONDS, EndpointChoice, RetryPolicy
from registry.mirror.fill.slots import ConnectionSlots, Demand
from registry.mirror.upstream_client import RangesUnsupported, UpstreamClient
from registry.single_flight import cancel_and_wait
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
    UpstreamUnavailable,
)
from storage.names import RepositoryName
from storage.partials import Partial

log = logging.getLogger("registry.mirror")

SINGLE_REQUEST_SIZE: Final = 8 * MIB
"""What is smaller comes in one request."""
PROGRESS_POLL_SECONDS: Final = 0.02
"""Seconds between two looks at what is coming."""
DEMAND_POLL_SECONDS: Final = 0.1
"""Seconds between two looks whether somebody wants it, while nothing is coming and nobody does."""


class NoReaders(Exception):
    """It was begun for readers who did not come."""


class _RunningRequest:
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
        source: UpstreamClient,
        slots: ConnectionSlots,
        repo: RepositoryName,
        partial: Partial,
        demand: Demand,
        choice: EndpointChoice,
        answered: Callable[[], None],
        *,
        begun: bool = False,
        persistence: float = STALL_TIMEOUT_SECONDS,
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
        self._plan = PiecePlan(gaps)
        self._small = sum(stop - start for start, stop in gaps) < SINGLE_REQUEST_SIZE
        self._pace = AdaptiveConcurrency(slots.most, self._loop.time())
        self._breaks = RetryPolicy(persistence)
        self._stragglers: StragglerDetector[PieceSink | WholeSink] = StragglerDetector()
        self._running: set[asyncio.Task[None]] = set()
        self._requests: dict[PieceSink | WholeSink, _RunningRequest] = {}
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
            while self._reap_and_check():
                if not self._demand.asked.is_set() and self._partial.wanted:
                    self._demand.ask()
                if not self._running and not self._demand.alive():
                    raise NoReaders
                self._start_connections()
                await self._wait()
                waiting = any(request.new and sink.endpoint is None for sink, request in self._requests.items())
                self._pace.observe(self._loop.time(), self._received, len(self._running), waiting)
                self._cut_stragglers()
            if self._fatal is not None:
                raise self._fatal
        finally:
            await cancel_and_wait(self._running)

    def _reap_and_check(self) -> bool:
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

    def _start_connections(self) -> None:
        """As many connections as there should be now."""
        if self._loop.time() < self._breaks.resume_at or not self._demand.alive():
            return
        want = 1 if self._small or self._whole or not self._begun else self._pace.width
        while len(self._running) < want and self._left():
            if self._whole and self._running:
                return
            task = asyncio.create_task(self._run_connection(first=not self._running))
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
            return PROGRESS_POLL_SECONDS
        pause = self._breaks.resume_at - self._loop.time()
        if not self._demand.asked.is_set():
            return min(pause, DEMAND_POLL_SECONDS) if pause > 0 else DEMAND_POLL_SECONDS
        return max(pause, 0.001) if pause > 0 or not self._running else None

    async def _run_connection(self, *, first: bool) -> None:
        """A connection: piece after piece, each in a slot of its own, so that others come to their turn between."""
        new = True
        while self._may_continue(first):
            slot = self._slots.first(self._demand, new=new) if first else self._slots.additional(self._demand)
            async with slot as free:
                if not free:
                    # Others have them all, or nobody waits for this one any more.
                    self._pace.note_unavailable(self._loop.time(), len(self._running) - 1)
                    return
                if self._may_continue(first) and not await self._fetch(new):
                    return
            new = False

    def _may_continue(self, first: bool) -> bool:
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
        self._requests[sink] = _RunningRequest(new, scope)
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
        if not self._breaks.should_retry(error, now, self._received, begun=self._begun):
            if not self._may_want_whole(error, ranged):
                self._fatal = self._fatal or error
                return
            self._whole = True
            self._breaks.resume_soon(now)
        if isinstance(error, RangesUnsupported) and self._breaks.failures_in_row > 1:
            self._whole = True
        pause = self._breaks.resume_at - now
        log.info("%s of %s broke off: %s; going on in %.1f s", self._partial.digest, self._repo, error.message, pause)
        self._pace.fail(now)

    def _may_want_whole(self, error: RegistryError, ranged: bool) -> bool:
        """Some refuse a Range with an error where they should leave it alone: asked whole, they may answer."""
        if self._begun or self._whole or not ranged:
            return False
        return not isinstance(error, UpstreamTimeout | TooManyRequests)


RefusedEndpoints = Mapping[str, RegistryError]
"""The endpoints that nothing is taken from, and what is raised instead."""


class PieceSink:
    """Takes exactly the piece that was asked for. `begun` is called, in that thread, once the upstream answers."""

    def __init__(self, partial: Partial, piece: Piece, begun: Callable[[], None], refused: RefusedEndpoints) -> None:
        self._partial = partial
        self._refused = refused
        self._begun = begun
        self.piece = piece
        self.endpoint: str | None = None
        self.asked_at = self.begun_at = time.monotonic()

    @property
    def new_bytes(self) -> int:
        return self.piece.at - self.piece.start

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        _check_response(endpoint, self._refused, size, self._partial.size)
        if (start, stop) != (self.piece.start, self.piece.stop):
            raise RangesUnsupported
        self.endpoint = endpoint
        self.begun_at = time.monotonic()
        self._begun()

    def take(self, offset: int, data: memoryview) -> None:
        if offset != self.piece.at or offset + len(data) > self.piece.stop:
            raise UpstreamUnavailable(f"{self.endpoint} sent bytes that were not asked for")
        self._partial.write_at(offset, data)
        self.piece.at = offset + len(data)


class WholeSink:
    """Takes a blob from its first byte on, and keeps what is missing of it: a byte once there is not written again,
    since somebody may be reading it."""

    def __init__(
        self, partial: Partial, gaps: Sequence[tuple[int, int]], begun: Callable[[], None], refused: RefusedEndpoints
    ) -> None:
        self._partial = partial
        self._refused = refused
        self._gaps = gaps
        self._begun = begun
        self.endpoint: str | None = None
        self.new_bytes = 0
        self.at = 0

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        _check_response(endpoint, self._refused, size, self._partial.size)
        if (start, stop) != (0, size):
            raise UpstreamUnavailable(f"{endpoint} sent a part of a blob that was asked for whole")
        self.endpoint = endpoint
        self._begun()

    def take(self, offset: int, data: memoryview) -> None:
        if offset != self.at or offset + len(data) > self._partial.size:
            raise UpstreamUnavailable(f"{self.endpoint} sent bytes that were not asked for")
        for start, stop in self._gaps:
            first, last = max(start, offset), min(stop, offset + len(data))
            if first < last:
                self._partial.write_at(first, data[first - offset : last - offset])
                self.new_bytes += last - first
        self.at = offset + len(data)


def _check_response(endpoint: str, refused: RefusedEndpoints, size: int, expected: int) -> None:
    """Raises UpstreamUnavailable: nothing is taken from there, or it may be a page that tells of an error, or the
    manifest is wrong."""
    if endpoint in refused:
        raise refused[endpoint]
    if size != expected:
        raise UpstreamUnavailable(f"{endpoint} has {size} bytes where the manifest says {expected}")
