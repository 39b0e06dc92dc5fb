"""Downloads the missing bytes of one blob from an upstream registry, with retries and over several connections
(`Download`).

The *partial blob* is the file into which the bytes are written. Its *owner* is the only process that downloads into the
file. A *fill* is the work of one process to get one blob. A *piece* is the byte range of one request. A *sink* writes
the bytes of one response into the partial blob. A *slot* is a permit to send a request. An *endpoint* is one of the
base URLs of the upstream.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from registry.mirror.fill.demand import Demand
from registry.mirror.fill.pieces import MIB, AdaptiveConcurrency, PiecePlan, StragglerDetector
from registry.mirror.fill.retry import STALL_TIMEOUT_SECONDS, AvoidedEndpoints, RepositoryChoice, RetryPolicy
from registry.mirror.fill.running_request import RunningRequest
from registry.mirror.fill.sinks import PieceSink, WholeSink
from registry.mirror.fill.slots import ConnectionSlots
from registry.mirror.upstream_client import BlobLengthWrong, RangesUnsupported, UpstreamClient
from registry.single_flight import cancel_and_wait
from storage.content import Span
from storage.errors import (
    BlobUnknown,
    Denied,
    PartialBlobLost,
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

SINGLE_REQUEST_BYTES: Final = 8 * MIB
"""A download with fewer missing bytes than this uses only one request, because more would not make it faster."""
PROGRESS_POLL_SECONDS: Final = 0.02
"""Time between two checks of the progress while requests are running."""
DEMAND_POLL_SECONDS: Final = 0.1
"""Time between two checks whether clients of other processes wait for the blob, while no request is running."""


_FINAL_ERRORS: Final = (PartialBlobLost, StorageFull, StorageFailed, BlobLengthWrong)
"""Errors after which the download cannot continue, not even from another repository."""


class NoClients(Exception):
    """No client waits for the blob, and the fill was stopped before it had the whole blob."""


class Download:
    """The download of one partial blob that this process owns. `senders`: the endpoints that have started to send
    bytes."""

    def __init__(
        self,
        upstream: UpstreamClient,
        slots: ConnectionSlots,
        repo: RepositoryName,
        partial: Partial,
        demand: Demand,
        avoided: AvoidedEndpoints,
        on_response: Callable[[], None],
        *,
        list_repos: Callable[[], Sequence[RepositoryName]] = tuple,
        on_fetched: Callable[[int], None] = lambda _: None,
        has_response: bool = False,
        stall_timeout: float = STALL_TIMEOUT_SECONDS,
    ) -> None:
        """The parameters are:

        - `slots`: limits the connections to the upstream.
        - `repo`: the repository that the download asks first, by its name at the upstream.
        - `on_response`: called on the event loop when a response starts.
        - `list_repos`: returns the repositories that may be asked, by their names at the upstream. The download asks
          another repository if the upstream refuses the blob for one, or if two requests in a row fail.
        - `on_fetched`: called after each request, with the number of bytes that the request has stored.
        - `has_response`: whether the upstream has sent bytes to an earlier owner. Clients may have got these bytes.
        - `stall_timeout`: after a response, the download is retried until this many seconds pass without progress.
          Without a response, it is retried at most once."""
        self._upstream = upstream
        self._slots = slots
        self._first_repo = repo
        self._repos = RepositoryChoice(repo, list_repos)
        self._partial = partial
        self._demand = demand
        self._avoided = avoided
        self._last_broken: set[str] = set()
        """Empty, or the endpoint whose connection broke last, which is asked after all other endpoints."""
        self._report_response = on_response
        self._report_fetched = on_fetched
        self._loop = asyncio.get_running_loop()
        gaps = partial.missing()
        self._plan = PiecePlan(gaps)
        """The missing bytes that no running request covers."""
        self._is_small = sum(stop - start for start, stop in gaps) < SINGLE_REQUEST_BYTES
        self._concurrency = AdaptiveConcurrency(slots.max_connections, self._loop.time())
        self._retry = RetryPolicy(stall_timeout)
        self._stragglers: StragglerDetector[PieceSink | WholeSink] = StragglerDetector()
        self._connections: set[asyncio.Task[None]] = set()
        self._requests: dict[PieceSink | WholeSink, RunningRequest] = {}
        self._changed = asyncio.Event()
        """Wakes `_wait`. Set when a request is sent, when a response starts, when a connection ends, and by
        `Demand.watching`."""
        self._bytes_of_ended_requests = 0
        self._has_response = has_response
        """Whether the upstream has started to send, so that clients may have got bytes."""
        self._ranges_work = False
        """Whether the upstream has sent a byte range as requested."""
        self._needs_whole = False
        """Whether the blob is requested without a range, because the upstream ignores or refuses ranges."""
        self._fatal_error: BaseException | None = None
        self.senders: set[str] = set()

    async def run(self) -> None:
        """Downloads the missing bytes. Raises NoClients, StorageFull, StorageFailed, BlobUnknown, Denied,
        UpstreamUnavailable, UpstreamTimeout, TooManyRequests. Also raises:

        - PartialBlobLost if this process is no longer the owner.
        - BlobLengthWrong if the upstream did not state the size, and its response does not have the expected size. The
          caller must then delete the stored bytes, which may be those of an error page.

        StorageFull means that the stored bytes were deleted. No other error deletes them."""
        try:
            with self._demand.watching(self._changed.set):
                while self._should_continue():
                    await self._make_progress()
            if self._fatal_error is not None:
                raise self._fatal_error
        finally:
            await cancel_and_wait(self._connections)

    async def _make_progress(self) -> None:
        """Opens connections, waits for a change, and cancels stragglers (`_cancel_stragglers`). Raises NoClients."""
        if not self._demand.has_clients_here:
            self._demand.set_clients_elsewhere(self._partial.has_waiters)
        if not self._connections and not self._demand.needs_blob():
            raise NoClients
        self._start_connections()
        await self._wait()
        awaits_first_byte = any(
            request.is_new_connection and sink.endpoint is None for sink, request in self._requests.items()
        )
        self._concurrency.observe(
            self._loop.time(), self._received_bytes, len(self._connections), awaits_first_byte=awaits_first_byte
        )
        self._cancel_stragglers()

    def _should_continue(self) -> bool:
        """Clears `_changed`, and removes ended connections. Returns whether the download is to continue."""
        self._changed.clear()
        ended = {task for task in self._connections if task.done()}
        self._connections -= ended
        for task in ended:
            if not task.cancelled() and (error := task.exception()) is not None:
                self._fatal_error = self._fatal_error or error
        return self._fatal_error is None and (self._has_bytes_to_request() or bool(self._connections))

    def _has_bytes_to_request(self) -> bool:
        """Returns whether bytes are left to request."""
        return bool(self._partial.missing()) if self._needs_whole else self._plan.remaining > 0

    @property
    def _received_bytes(self) -> int:
        """Number of bytes that this download has received and stored so far."""
        return self._bytes_of_ended_requests + sum(sink.new_bytes for sink in self._requests)

    def _start_connections(self) -> None:
        """Opens connections up to the present limit. Opens none during the pause before a retry."""
        if self._loop.time() < self._retry.resume_at or not self._demand.needs_blob():
            return
        limit = 1 if self._is_small or self._needs_whole or not self._has_response else self._concurrency.connections
        while len(self._connections) < limit and self._has_bytes_to_request():
            if self._needs_whole and self._connections:
                return
            task = asyncio.create_task(self._run_connection(is_first=not self._connections))
            task.add_done_callback(lambda _: self._changed.set())
            self._connections.add(task)

    async def _wait(self) -> None:
        """Waits until `_changed` is set, or until the next check is due."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._wait_seconds()):
                await self._changed.wait()

    def _wait_seconds(self) -> float | None:
        """Returns the seconds until the next check or retry; None if nothing is due before `_changed` is set."""
        if self._requests:
            return PROGRESS_POLL_SECONDS
        pause = self._retry.resume_at - self._loop.time()
        # Clients of other processes leave without setting `_changed`.
        if not self._demand.has_clients_here or self._demand.has_clients_elsewhere:
            return min(pause, DEMAND_POLL_SECONDS) if pause > 0 else DEMAND_POLL_SECONDS
        if pause > 0 or not self._connections:
            return max(pause, 0.001)  # at least a millisecond, so that the loop in `run` never spins
        return None

    async def _run_connection(self, *, is_first: bool) -> None:
        """Requests one piece after another over one connection. Takes a new slot for each piece, so that other
        downloads get slots in between. `is_first`: whether the download had no other connection when it opened this
        one."""
        is_new_connection = True
        while self._should_send_request(is_first):
            slot = (
                self._slots.first_connection_slot(
                    self._demand, is_new_connection=is_new_connection, blob_size=self._partial.size
                )
                if is_first
                else self._slots.further_connection_slot(self._demand)
            )
            async with slot as has_slot:
                if not has_slot:
                    # No slot is free for this connection, or nothing needs the blob any more.
                    self._concurrency.reduce_connections(self._loop.time(), available=len(self._connections) - 1)
                    return
                if self._should_send_request(is_first) and not await self._fetch(is_new_connection):
                    return
            is_new_connection = False

    def _should_send_request(self, is_first: bool) -> bool:
        """Returns whether a connection should send another request."""
        if self._fatal_error is not None or not self._has_bytes_to_request() or not self._demand.needs_blob():
            return False
        if self._loop.time() < self._retry.resume_at or (self._needs_whole and len(self._connections) > 1):
            return False
        return is_first or len(self._connections) <= self._concurrency.connections

    async def _fetch(self, is_new_connection: bool) -> bool:
        """Sends one request. Returns whether the connection can send another one."""
        repo = self._repos.next_repo  # may change while the request is running
        async with self._slots.repository_share(repo) as has_share:
            return await self._fetch_from(repo, is_new_connection, has_share)

    async def _fetch_from(self, repo: RepositoryName, is_new_connection: bool, has_share: bool) -> bool:
        """Does the work of `_fetch`. `has_share`: whether the request holds a *share* of `repo`
        (`ConnectionSlots.repository_share`). Each repository has a limited number of shares. A slow request without a
        share may be cut off while other requests wait for a slot."""
        sink = self._next_sink()
        if sink is None:
            return False
        span = Span(sink.piece.start, sink.piece.stop) if isinstance(sink, PieceSink) else Span(0)
        if span == Span(0, self._partial.size):  # the whole blob needs no `Range` header
            span = Span(0)
        cancel_scope = asyncio.timeout(None)
        request = self._requests[sink] = RunningRequest(sink, self._demand, is_new_connection, has_share, cancel_scope)
        self._changed.set()
        try:
            self._partial.mark_upstream_request(repo)
            async with cancel_scope:
                with self._slots.holding(request):
                    await self._upstream.fetch_blob(
                        *(repo, self._partial.digest, span, sink),
                        self._avoided.ask_last | self._last_broken,
                        self._avoided.untrusted,
                        expected_size=self._partial.size,
                    )
        except TimeoutError:
            if not cancel_scope.expired():
                raise
            return True  # `RunningRequest.cancel` was called
        except RegistryError as error:
            self._on_error(sink, repo, error, has_range=span != Span(0))
            return False
        finally:
            del self._requests[sink]
            if sink.new_bytes:
                self._repos.on_bytes(repo)
            self._bytes_of_ended_requests += sink.new_bytes
            self._report_fetched(sink.new_bytes)
            if isinstance(sink, PieceSink):
                self._plan.give_back(sink.piece)
        if isinstance(sink, PieceSink):
            self._ranges_work = self._ranges_work or span.stop is not None
            seconds = time.monotonic() - sink.response_started_at
            self._concurrency.note_piece(sink.new_bytes, seconds, sink.response_started_at - sink.requested_at)
            self._stragglers.note_piece(self._loop.time(), sink.new_bytes, seconds)
        return True

    def _next_sink(self) -> PieceSink | WholeSink | None:
        """Returns the sink for the next request; None if nothing is left to request."""
        if self._needs_whole:
            return WholeSink(self._partial, self._partial.missing(), self._on_response, self._avoided.untrusted)
        remaining = self._plan.remaining
        length = remaining if self._is_small else self._concurrency.next_piece_length(remaining)
        piece = self._plan.take(length, self._demand.reader_offsets)
        return PieceSink(self._partial, piece, self._on_response, self._avoided.untrusted) if piece else None

    def _cancel_stragglers(self) -> None:
        """Cancels *stragglers*: requests that are much slower than the others. Their missing bytes are then requested
        again. Does nothing while there are bytes that no running request covers."""
        now = self._loop.time()
        pieces = {sink: sink.piece for sink in self._requests if isinstance(sink, PieceSink) and sink.endpoint}
        self._stragglers.observe(now, {sink: piece.next_offset - piece.start for sink, piece in pieces.items()})
        if self._plan.remaining:
            return
        for sink in self._stragglers.find(
            now, {sink: piece.stop - piece.next_offset for sink, piece in pieces.items()}
        ):
            if self._requests[sink].cancel_scope.expired():  # the request is cancelled already
                continue
            log.info(
                "a request for %s of %s is much slower than the others; its missing bytes are requested again",
                self._partial.digest,
                self._first_repo,
            )
            self._requests[sink].cancel()

    def _on_response(self) -> None:
        """Called when a response starts, in the thread that reads the response."""
        self._loop.call_soon_threadsafe(self._note_response)

    def _note_response(self) -> None:
        """Records that a response has started."""
        self.senders.update(sink.endpoint for sink in self._requests if sink.endpoint)
        self._has_response = True
        self._changed.set()
        self._report_response()

    def _on_error(
        self, sink: PieceSink | WholeSink, repo: RepositoryName, error: RegistryError, *, has_range: bool
    ) -> None:
        """Handles a failed request: schedules a retry, or ends the download. `has_range`: whether the request asked for
        a byte range."""
        if sink.endpoint is not None:
            self.senders.add(sink.endpoint)
            self._has_response = True  # `_note_response` may not have been called yet
        if isinstance(error, BlobUnknown | Denied) and self._has_response:
            self._repos.on_refusal(repo)
        is_final = isinstance(error, _FINAL_ERRORS)
        if isinstance(error, Denied):
            is_final = not (self._has_response and self._repos.has_usable_repo)
        if is_final or (isinstance(error, BlobUnknown) and not self._has_response):
            self._fail(repo, error)
        elif isinstance(error, RangesUnsupported) and not self._ranges_work:
            self._needs_whole = True
        else:
            self._on_broken_connection(sink, repo, error, has_range=has_range)

    def _on_broken_connection(
        self, sink: PieceSink | WholeSink, repo: RepositoryName, error: RegistryError, *, has_range: bool
    ) -> None:
        """Schedules a retry. After too many failures, schedules a request for the whole blob if `_should_try_whole`;
        otherwise ends the download with `error`."""
        now = self._loop.time()
        if sink.endpoint is not None:
            self._last_broken = {sink.endpoint}
        if now < self._retry.resume_at:
            return  # connections that break at the same time count as one failure, which has scheduled a retry
        if not self._retry.should_retry(error, now, self._received_bytes, has_response=self._has_response):
            if not self._should_try_whole(error, has_range):
                self._fail(repo, error)
                return
            self._needs_whole = True
            self._retry.resume_soon(now)
        if isinstance(error, RangesUnsupported) and self._retry.failures_in_row > 1:
            self._needs_whole = True
        log.info(
            "the download of %s of %s was interrupted: %s; it is retried in %.1f s",
            *(self._partial.digest, repo, error.message, self._retry.resume_at - now),
        )
        self._concurrency.note_broken_connection(now)
        if self._has_response:
            self._repos.on_failure(repo, has_progress=self._retry.failures_in_row == 1)

    def _fail(self, repo: RepositoryName, error: RegistryError) -> None:
        """Ends the download with `error`, which a request to `repo` caused. If `repo` is not `_first_repo`, ends the
        download with UpstreamUnavailable instead, unless `error` is one of `_FINAL_ERRORS`. Otherwise the caller of
        `run` would conclude, for example from BlobUnknown, that `_first_repo` does not have the blob."""
        if repo != self._first_repo and not isinstance(error, _FINAL_ERRORS):
            error = UpstreamUnavailable(f"the download of {self._partial.digest} broke off: {error.message}")
        self._fatal_error = self._fatal_error or error

    def _should_try_whole(self, error: RegistryError, has_range: bool) -> bool:
        """Returns whether `error` may be due to the `Range` header, to which some upstreams respond with an error. The
        blob is then requested once more without a byte range."""
        if self._has_response or self._needs_whole or not has_range:
            return False
        return not isinstance(error, UpstreamTimeout | TooManyRequests)
