"""The metrics of mirrors (`MirrorMetrics`). Their label `upstream` shows the upstream's name in the settings."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal

from registry.mirror.upstream_client import UpstreamContentInvalid
from registry.telemetry.metric_families import CellPlan, Counter, Gauge, Histogram, Labels
from registry.telemetry.shared_cells import SharedCells, SharedNames
from registry.telemetry.tracing import Tracing
from storage.errors import (
    BlobUnknown,
    Denied,
    DigestInvalid,
    RegistryError,
    StorageFailed,
    StorageFull,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)

UPSTREAM_CAPACITY: Final = 64
"""Largest number of upstreams with metrics of their own. The number includes upstreams that were removed from the
settings since the server's start."""
CACHE_STATES: Final = ("hit", "miss", "stale", "revalidated", "other")
"""The values of the label `cache` (see `registry.request.set_cache_state`)."""
RESPONSE_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets for the response times of upstreams, in seconds."""
_ERROR_KINDS: Final[tuple[tuple[type[RegistryError], str], ...]] = (
    (UpstreamTimeout, "timeout"),
    (UpstreamContentInvalid, "invalid"),
    (UpstreamUnavailable, "unavailable"),
    (TooManyRequests, "rate_limited"),
    (Denied, "denied"),
    (DigestInvalid, "wrong_digest"),
    (StorageFull, "storage"),
    (StorageFailed, "storage"),
)
"""The value of the label `kind` for each class of errors. If an error is an instance of several classes, the first of
them counts. Errors of other classes, such as BlobUnknown, are not counted."""

BREAKER_OPEN: Final = "breaker_open"
"""The value of the label `kind` if no request was sent, because the circuit breakers of all endpoints were open."""

FILL_OUTCOMES: Final = ("stored", "failed", "unknown", "abandoned")
"""The values of the label `outcome`: how a *fill* (the fetch of a blob) has ended. `unknown`: the upstream does not
have the blob. `abandoned`: no client needs the blob any more, or the worker stops."""


class MirrorMetrics:
    """The metrics of all mirrors. Each number has a *cell* in the memory that all processes share."""

    def __init__(self, plan: CellPlan, routes: tuple[str, ...]) -> None:
        """`plan`: gives the metrics their cells. `routes`: the values of the label `route`. Call `attach_memory` before
        you call other methods."""
        by_upstream: Labels = {"upstream": SharedNames.all_label_values(UPSTREAM_CAPACITY)}
        kinds = [*dict.fromkeys(kind for _, kind in _ERROR_KINDS), BREAKER_OPEN]
        self._names: SharedNames
        self._answer_cells: dict[tuple[str, str, str], tuple[int, int]] = {}
        """A cache of the cells in `requests` and `served_bytes`. The key is the upstream, the route and the cache
        state."""
        self.requests = Counter(
            plan,
            "entrepot_mirror_requests_total",
            "Requests for mirrored content, by where the answer was found.",
            {**by_upstream, "route": routes, "cache": CACHE_STATES},
        )
        self.served_bytes = Counter(
            plan,
            "entrepot_mirror_served_bytes_total",
            "Bytes of mirrored content sent to clients, by where the content was found.",
            {**by_upstream, "route": routes, "cache": CACHE_STATES},
        )
        self.fetched_bytes = Counter(
            plan,
            "entrepot_mirror_fetched_bytes_total",
            "Bytes of manifests and blobs received from upstreams.",
            {**by_upstream, "content": ("manifest", "blob")},
        )
        self.fills_running = Gauge(plan, "entrepot_mirror_fills_running", "Blobs that are being fetched.", by_upstream)
        self.fills = Counter(
            plan,
            "entrepot_mirror_fills_total",
            "Ended fetches of blobs.",
            {**by_upstream, "outcome": FILL_OUTCOMES},
        )
        self.response_seconds = Histogram(
            plan,
            "entrepot_upstream_response_duration_seconds",
            "Time from a request to an upstream to the head of its response.",
            by_upstream,
            bounds=RESPONSE_SECONDS,
        )
        self.errors = Counter(
            plan,
            "entrepot_upstream_errors_total",
            "Failed requests to upstreams. Requests for content that the upstream does not have are not counted.",
            {**by_upstream, "kind": kinds},
        )
        self.open_breakers = Gauge(
            plan,
            "entrepot_upstream_open_breakers",
            "Endpoints that get no requests because they failed lately. Each worker counts for itself.",
            by_upstream,
        )

    def attach_memory(self, names: SharedNames) -> None:
        """Sets the list of the names of upstreams, which is in the shared memory."""
        self._names = names
        self._answer_cells.clear()

    def upstream_label(self, name: str) -> str:
        """Returns what to pass to `Family.cell` for the label `upstream`: the index of the upstream's name in the list
        of names, as a text such as `0`. Adds the name if the list does not have it. If the list is full and does not
        have the name, returns the index of the last name (`SharedNames.label_value`)."""
        return self._names.label_value(name)

    def count_answer(self, cells: memoryview[float], upstream: str, route: str, cache_state: str, size: int) -> None:
        """Counts a response with mirrored content. `size`: bytes of its body. `cells`: the cells to which this process
        writes."""
        answer_cells = self._answer_cells.get((upstream, route, cache_state))
        if answer_cells is None:
            labels = self.upstream_label(upstream), route, cache_state
            answer_cells = self.requests.cell(*labels), self.served_bytes.cell(*labels)
            self._answer_cells[upstream, route, cache_state] = answer_cells
        request_cell, byte_cell = answer_cells
        cells[request_cell] += 1
        cells[byte_cell] += size


class UpstreamCounts:
    """Counts the work of one mirror. Implements `registry.mirror.observer.MirrorObserver`."""

    def __init__(
        self, metrics: MirrorMetrics, cells: SharedCells, upstream: str, tracing: Tracing | None = None
    ) -> None:
        """`tracing`: makes a span for each request to the upstream; None: nothing makes spans."""
        self._upstream = upstream
        self._tracing = tracing
        self._metrics = metrics
        self._cells = cells
        self._label = metrics.upstream_label(upstream)

    def trace_request(self, endpoint: str, repo: str) -> AbstractContextManager[object]:
        return (
            nullcontext()
            if self._tracing is None
            else self._tracing.trace_upstream_request(self._upstream, endpoint, repo)
        )

    def on_response(self, seconds: float) -> None:
        histogram = self._metrics.response_seconds
        histogram.observe(self._cells.own, histogram.cell(self._label), seconds)

    def on_error(self, error: RegistryError) -> None:
        kind = next((kind for error_type, kind in _ERROR_KINDS if isinstance(error, error_type)), None)
        if kind is not None:
            self._cells.own[self._metrics.errors.cell(self._label, kind)] += 1

    def on_breaker(self, *, opened: bool) -> None:
        self._cells.own[self._metrics.open_breakers.cell(self._label)] += 1 if opened else -1

    # The mirror has sent no request, because its circuit breakers for all endpoints of the upstream were open.
    def on_refused(self) -> None:
        self._cells.own[self._metrics.errors.cell(self._label, BREAKER_OPEN)] += 1

    def on_fetched(self, content: Literal["manifest", "blob"], size: int) -> None:
        self._cells.own[self._metrics.fetched_bytes.cell(self._label, content)] += size

    def on_fill_started(self) -> None:
        self._cells.own[self._metrics.fills_running.cell(self._label)] += 1

    def on_fill_ended(self, error: RegistryError | None, *, is_abandoned: bool) -> None:
        cells = self._cells.own
        cells[self._metrics.fills_running.cell(self._label)] -= 1
        if error is None:
            outcome = "stored"
        elif is_abandoned:
            outcome = "abandoned"
        else:
            outcome = "unknown" if isinstance(error, BlobUnknown) else "failed"
        cells[self._metrics.fills.cell(self._label, outcome)] += 1
        # These errors occur although no request to the upstream failed, so they were not counted before.
        if isinstance(error, DigestInvalid | StorageFull | StorageFailed):
            self.on_error(error)
