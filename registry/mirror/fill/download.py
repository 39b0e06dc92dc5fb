"""Downloads the missing bytes of one partial blob, over as many connections as help, with retries.

`PieceSink` and `WholeSink` write the bytes of one request into the partial blob, in the thread that reads them.
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
"""Downloads with fewer missing bytes use one request."""
PROGRESS_POLL_SECONDS: Final = 0.02
"""Time between two checks of the progress."""
DEMAND_POLL_SECONDS: Final = 0.1
"""Time between two checks whether a client wants the blob, while nothing arrives and none does."""


class NoReaders(Exception):
    """The download was started ahead of readers, and none came."""


class _RunningRequest:
    """A request in progress. `new`: its connection has delivered nothing before. `scope` cancels it."""

    def __init__(self, new: bool, scope: asyncio.Timeout) -> None:
        self.new = new
        self.scope = scope


class Download:
    """The download of a partial blob that this process owns. `repo` is the upstream's name of the repository.
    `on_begun` is called on the event loop when the upstream starts to send. `has_begun`: readers got bytes from a
    previous owner; the download is then retried until `stall_timeout` seconds pass without new bytes, otherwise for
    moments only. `endpoints` collects the endpoints that sent bytes."""

    def __init__(
        self,
        upstream: UpstreamClient,
        slots: ConnectionSlots,
        repo: RepositoryName,
        partial: Partial,
        demand: Demand,
        choice: EndpointChoice,
        on_begun: Callable[[], None],
        *,
        has_begun: bool = False,
        stall_timeout: float = STALL_TIMEOUT_SECONDS,
    ) -> None:
        self._upstream = upstream
        self._slots = slots
        self._repo = repo
        self._partial = partial
        self._demand = demand
        self._choice = choice
        self._failing: set[str] = set()
        self._on_begun = on_begun
        self._loop = asyncio.get_running_loop()
        gaps = partial.missing()
        self._plan = PiecePlan(gaps)
        self._small = sum(stop - start for start, stop in gaps) < SINGLE_REQUEST_SIZE
        self._concurrency = AdaptiveConcurrency(slots.most, self._loop.time())
        self._retry = RetryPolicy(stall_timeout)
        self._stragglers: StragglerDetector[PieceSink | WholeSink] = StragglerDetector()
        self._running: set[asyncio.Task[None]] = set()
        self._requests: dict[PieceSink | WholeSink, _RunningRequest] = {}
        self._changed = asyncio.Event()
        self._done = 0
        self._begun = has_begun
        self._ranged = False
        self._whole = False
        self._fatal: BaseException | None = None
        self.endpoints: set[str] = set()

    async def run(self) -> None:
        """Returns when no byte is missing. Raises NoReaders; PartialLost; StorageFull, StorageFailed; BlobUnknown,
        Denied, UpstreamUnavailable, UpstreamTimeout, TooManyRequests. The stored bytes are kept in any case."""
        try:
            while self._reap_and_check():
                if not self._demand.requested.is_set() and self._partial.has_waiters:
                    self._demand.request()
                if not self._running and not self._demand.is_alive():
                    raise NoReaders
                self._start_connections()
                await self._wait()
                waiting = any(request.new and sink.endpoint is None for sink, request in self._requests.items())
                self._concurrency.observe(self._loop.time(), self._received, len(self._running), waiting)
                self._cut_stragglers()
            if self._fatal is not None:
                raise self._fatal
        finally:
            await cancel_and_wait(self._running)

    def _reap_and_check(self) -> bool:
        """Collects ended connections and returns whether the download continues. Changes after this call set
        `_changed`."""
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
        """Starts connections up to the current limit."""
        if self._loop.time() < self._retry.resume_at or not self._demand.is_alive():
            return
        want = 1 if self._small or self._whole or not self._begun else self._concurrency.width
        while len(self._running) < want and self._left():
            if self._whole and self._running:
                return
            task = asyncio.create_task(self._run_connection(first=not self._running))
            task.add_done_callback(lambda _: self._changed.set())
            self._running.add(task)
            if want == 1:
                return

    async def _wait(self) -> None:
        """Waits until a connection starts to receive or ends, or until the next check is due."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._wait_seconds()):
                await self._changed.wait()

    def _wait_seconds(self) -> float | None:
        """Returns the seconds until the next check; None: nothing is due."""
        if self._requests:
            return PROGRESS_POLL_SECONDS
        pause = self._retry.resume_at - self._loop.time()
        if not self._demand.requested.is_set():
            return min(pause, DEMAND_POLL_SECONDS) if pause > 0 else DEMAND_POLL_SECONDS
        return max(pause, 0.001) if pause > 0 or not self._running else None

    async def _run_connection(self, *, first: bool) -> None:
        """Runs one connection: piece after piece. Each piece takes a connection slot of its own, so that other fills
        get their turn in between."""
        new = True
        while self._may_continue(first):
            slot = self._slots.primary(self._demand, new=new) if first else self._slots.additional(self._demand)
            async with slot as free:
                if not free:
                    # Other fills use all slots, or no client waits for this blob any more.
                    self._concurrency.note_unavailable(self._loop.time(), len(self._running) - 1)
                    return
                if self._may_continue(first) and not await self._fetch(new):
                    return
            new = False

    def _may_continue(self, first: bool) -> bool:
        """Returns whether this connection may start another request."""
        if self._fatal is not None or not self._left() or not self._demand.is_alive():
            return False
        if self._loop.time() < self._retry.resume_at or (self._whole and len(self._running) > 1):
            return False
        return first or len(self._running) <= self._concurrency.width

    async def _fetch(self, new: bool) -> bool:
        """Sends one request. Returns whether the connection goes on."""
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
            self._partial.mark_started()
            async with scope:
                await self._upstream.fetch_blob(
                    self._repo, self._partial.digest, span, sink, self._choice.last | self._failing
                )
        except TimeoutError:
            if not scope.expired():
                raise
            return True  # cut as a straggler; the rest of its piece is free for any connection
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
            self._concurrency.note_piece(sink.new_bytes, seconds, sink.begun_at - sink.asked_at)
            self._stragglers.note_piece(self._loop.time(), sink.new_bytes, seconds)
        return True

    def _next_sink(self) -> PieceSink | WholeSink | None:
        if self._whole:
            return WholeSink(self._partial, self._partial.missing(), self._begin, self._choice.refused)
        left = self._plan.remaining
        length = left if self._small else self._concurrency.next_length(left)
        piece = self._plan.take(length, self._demand.offsets)
        return PieceSink(self._partial, piece, self._begin, self._choice.refused) if piece else None

    def _cut_stragglers(self) -> None:
        """Cuts the slowest connections once every byte was requested. The rest of their pieces is requested again."""
        now = self._loop.time()
        pieces = {sink: sink.piece for sink in self._requests if isinstance(sink, PieceSink) and sink.endpoint}
        self._stragglers.observe(now, {sink: piece.at - piece.start for sink, piece in pieces.items()})
        if self._plan.remaining:
            return
        for sink in self._stragglers.find(now, {sink: piece.stop - piece.at for sink, piece in pieces.items()}):
            log.info("a connection for %s of %s is much slower than the others", self._partial.digest, self._repo)
            self._requests[sink].scope.reschedule(now)

    def _begin(self) -> None:
        """Called in the thread that reads, when the upstream starts to send."""
        self._loop.call_soon_threadsafe(self._on_begin)

    def _on_begin(self) -> None:
        self.endpoints.update(sink.endpoint for sink in self._requests if sink.endpoint)
        self._begun = True
        self._changed.set()
        self._on_begun()

    def _on_error(self, sink: PieceSink | WholeSink, error: RegistryError, *, ranged: bool) -> None:
        """Decides whether to retry, to pause, or to give up."""
        if sink.endpoint is not None:
            self.endpoints.add(sink.endpoint)
            self._begun = True  # the call of `_on_begin` may still be pending
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
        if now < self._retry.resume_at:
            return  # broke together with another connection, which was counted
        if not self._retry.should_retry(error, now, self._received, has_begun=self._begun):
            if not self._may_want_whole(error, ranged):
                self._fatal = self._fatal or error
                return
            self._whole = True
            self._retry.resume_soon(now)
        if isinstance(error, RangesUnsupported) and self._retry.failures_in_row > 1:
            self._whole = True
        pause = self._retry.resume_at - now
        log.info(
            "%s of %s was interrupted: %s; retry in %.1f s", self._partial.digest, self._repo, error.message, pause
        )
        self._concurrency.fail(now)

    def _may_want_whole(self, error: RegistryError, ranged: bool) -> bool:
        """Returns whether to request the blob without a range. Some upstreams answer a Range with an error instead of
        ignoring it."""
        if self._begun or self._whole or not ranged:
            return False
        return not isinstance(error, UpstreamTimeout | TooManyRequests)


RefusedEndpoints = Mapping[str, RegistryError]
"""Endpoints whose bytes are refused, with the error to raise for each."""


class PieceSink:
    """Takes exactly the requested piece. `on_begin` is called, in the same thread, when the upstream starts to send."""

    def __init__(self, partial: Partial, piece: Piece, on_begin: Callable[[], None], refused: RefusedEndpoints) -> None:
        self._partial = partial
        self._refused = refused
        self._on_begin = on_begin
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
        self._on_begin()

    def take(self, offset: int, data: memoryview) -> None:
        if offset != self.piece.at or offset + len(data) > self.piece.stop:
            raise UpstreamUnavailable(f"{self.endpoint} sent bytes that were not asked for")
        self._partial.write_at(offset, data)
        self.piece.at = offset + len(data)


class WholeSink:
    """Takes a blob from its first byte and stores the missing bytes only. A stored byte is not written again, since a
    client may be reading it."""

    def __init__(
        self, partial: Partial, gaps: Sequence[tuple[int, int]], on_begin: Callable[[], None], refused: RefusedEndpoints
    ) -> None:
        self._partial = partial
        self._refused = refused
        self._gaps = gaps
        self._on_begin = on_begin
        self.endpoint: str | None = None
        self.new_bytes = 0
        self.at = 0

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        _check_response(endpoint, self._refused, size, self._partial.size)
        if (start, stop) != (0, size):
            raise UpstreamUnavailable(f"{endpoint} sent a part of a blob that was asked for whole")
        self.endpoint = endpoint
        self._on_begin()

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
    """Raises UpstreamUnavailable when the endpoint is refused, or when the size is not the expected one: the response
    may be an error page, or the manifest is wrong."""
    if endpoint in refused:
        raise refused[endpoint]
    if size != expected:
        raise UpstreamUnavailable(f"{endpoint} has {size} bytes where the manifest says {expected}")
