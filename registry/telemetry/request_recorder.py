"""`RequestRecorder`: records each HTTP request once. It counts the request, writes a line to the access log, and ends
the trace. A *cell* is one number in the memory that all processes share (`registry.telemetry.metrics`)."""

from __future__ import annotations

import logging
from typing import Any, Final, Protocol

from registry.asgi import REQUEST_NOTES_EXTENSION, Scope, request_id_of
from registry.telemetry.access_log import LoggedAnswer, log, write_cached_answer, write_request
from registry.telemetry.metrics import Metrics
from registry.telemetry.recent_clients import RecentClients
from registry.telemetry.tracing import Tracing

MAX_CACHED_RESULTS: Final = 4096
"""Largest number of results of `RequestRecorder._find_cells` that are cached."""
_ROUTES_BY_PREFIX: Final = {
    "api": "api",
    "token": "token",
    "login": "login",
    "logout": "login",
    "ui": "pages",
    "v1": "search",  # `docker search` requests `/v1/search`
    "metrics": "metrics",
    **dict.fromkeys(("health", "livez", "readyz"), "health"),
}
"""The route of a request outside `/v2`, by the first part of its path."""


class RecordedEnd(Protocol):
    """How a request ended (`registry.server.connection.request_reports.RequestEnd`). `status`: 0 if no response was
    begun. `received_bytes`: size of the request's body. `sent_bytes`: size of the response's body. `seconds`: time
    since the head of the request was received. `is_complete`: whether the whole response was sent. `reason`: why the
    server itself has refused the request; empty if the server has not refused the request."""

    @property
    def status(self) -> int: ...
    @property
    def received_bytes(self) -> int: ...
    @property
    def sent_bytes(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def is_complete(self) -> bool: ...
    @property
    def reason(self) -> str: ...


class CountedAnswer(LoggedAnswer, Protocol):
    """A response from the response cache (`registry.http.answer_cache.CachedAnswer`)."""

    kind: str
    metric_cells: Any
    """How to count a request with this answer, a tuple of three numbers. The first is the index of the cell that counts
    the requests. The second is the index of the cell that counts the sent bytes. The third is not about a cell: it is
    the size of the answer's body in bytes. None until the first request with this answer."""


class RecordedExchange(Protocol):
    """What is recorded about a request to the distribution API (`registry.http.exchange.Exchange`). `kind`: the kind of
    the resource, such as `manifests`; empty if unknown. `resource_id`: a tag, a digest, or the id of an upload session,
    from the path. `principal_name`: the name of the client's account, or the name for anonymous clients."""

    kind: str
    repo: Any
    resource_id: str
    request_id: str
    cache_state: str
    upstream: str

    @property
    def principal_name(self) -> str: ...


class RequestRecorder:
    """Counts requests and logs them. The server calls the methods (`registry.server.connection.request_reports`). The
    methods return immediately and raise nothing."""

    def __init__(self, metrics: Metrics, recent_clients: RecentClients | None = None) -> None:
        """`recent_clients`: records the clients of requests to the distribution API; None: they are not recorded."""
        self.tracing: Tracing | None = None
        """Makes the spans of requests; None: traces are not configured."""
        self._metrics = metrics
        self._recent_clients = recent_clients
        self._found_cells: dict[tuple[str, str, int | None], tuple[int, ...]] = {}
        """The results of `_find_cells`, by its arguments."""

    def on_cached_answer(self, scope: Scope, answer: CountedAnswer, request_id: str) -> None:
        """Records a request that the response cache has answered."""
        if answer.metric_cells is None:
            size = len(answer.body)
            count_cell = self._metrics.cached_answers_cell(answer.kind, scope["method"], size)
            answer.metric_cells = count_cell, self._metrics.sent_bytes.cell(answer.kind), size
        count_cell, sent_cell, size = answer.metric_cells
        cells = self._metrics.cells.own
        cells[count_cell] += 1
        cells[sent_cell] += size
        if self._recent_clients is not None:
            self._recent_clients.record(scope)
        if log.isEnabledFor(logging.INFO):
            write_cached_answer(scope, answer, request_id)
        if self.tracing is not None:
            self.tracing.trace_cached_request(scope, answer.kind)

    def on_refused(self, scope: Scope, end: RecordedEnd) -> None:
        """Logs a request, or a connection, that the server has refused without calling the application. If the client
        got a response, also counts the request. `scope`: the part of the ASGI scope that is known
        (`registry.server.connection.request_reports.partial_scope`)."""
        if end.status:
            self._count("other", "other", end)
        if log.isEnabledFor(logging.INFO):
            write_request(
                *(scope, end.status, "", end.sent_bytes, end.received_bytes, end.seconds),
                # The principal, the repository, the reference and the cache state are not known.
                *("", "", "", "", request_id_of(scope["headers"]), end.reason),
            )

    def on_connection(self, change: int) -> None:
        """Adds `change` to the number of open connections: 1 for a new connection, -1 for a closed connection."""
        self._metrics.cells.own[self._metrics.connections.first_cell] += change

    def on_request_end(self, scope: Scope, end: RecordedEnd) -> None:
        """Records a request that the application has answered, or that was cut off."""
        exchange: RecordedExchange | None = scope["extensions"].get(REQUEST_NOTES_EXTENSION, {}).get("exchange")
        if exchange is not None:
            route = exchange.kind or "other"
            self._count(route, scope["method"], end)
            if self._recent_clients is not None:
                self._recent_clients.record(scope)
            if exchange.cache_state:
                self._metrics.mirror.count_answer(
                    self._metrics.cells.own, exchange.upstream, route, exchange.cache_state, end.sent_bytes
                )
            principal, repo, resource_id = exchange.principal_name, exchange.repo, exchange.resource_id
            cache_state, request_id = exchange.cache_state, exchange.request_id
        else:
            route = route_of(scope["path"])
            self._count(route, scope["method"], end)
            state = scope.get("state") or {}
            actor = state.get("actor")
            principal, repo, resource_id, cache_state = "-" if actor is None else actor.name, "", "", ""
            request_id = state.get("request_id") or request_id_of(scope["headers"])
        if log.isEnabledFor(logging.INFO):
            status_suffix = "" if end.is_complete else "(cut off)"
            write_request(
                *(scope, end.status, status_suffix, end.sent_bytes, end.received_bytes, end.seconds),
                *(principal, repo, resource_id, cache_state, request_id, end.reason),
            )
        if self.tracing is not None:
            self.tracing.end_request(scope, route, end.status)

    def _count(self, route: str, method: str, end: RecordedEnd) -> None:
        """Counts a request that has ended."""
        metrics, cells = self._metrics, self._metrics.cells.own
        status = int(end.status) if end.is_complete else None
        cell_numbers = self._found_cells.get((route, method, status)) or self._find_cells(route, method, status)
        request_cell, seconds_cell, request_size_cell, response_size_cell, received_cell, sent_cell = cell_numbers
        cells[request_cell] += 1
        if end.is_complete:
            metrics.seconds.observe(cells, seconds_cell, end.seconds)
        # Adds 1 to a bucket in each of the two histograms of sizes. `Metrics` computes the sums of these histograms
        # from the cells with the received and sent bytes.
        if end.received_bytes:
            cells[metrics.request_sizes.bucket_cell(request_size_cell, end.received_bytes)] += 1
            cells[received_cell] += end.received_bytes
        else:
            cells[request_size_cell] += 1  # the first bucket
        cells[metrics.response_sizes.bucket_cell(response_size_cell, end.sent_bytes)] += 1
        if end.sent_bytes:
            cells[sent_cell] += end.sent_bytes

    def _find_cells(self, route: str, method: str, status: int | None) -> tuple[int, ...]:
        """Returns the indexes of the cells that count the requests with this route, method and status. `status`: None
        for requests that were cut off. Caches a limited number of results, because clients choose the method."""
        metrics = self._metrics
        is_complete = status is not None
        cell_numbers = (
            metrics.requests.cell(route, method, str(status)) if is_complete else metrics.aborted.cell(route, method),
            metrics.seconds.cell(route, method),
            metrics.request_sizes.cell(route),
            metrics.response_sizes.cell(route),
            metrics.received_bytes.cell(route),
            metrics.sent_bytes.cell(route),
        )
        if len(self._found_cells) < MAX_CACHED_RESULTS:
            self._found_cells[route, method, status] = cell_numbers
        return cell_numbers


def route_of(path: str) -> str:
    """Returns the route of a path outside `/v2`."""
    prefix = path[1:].partition("/")[0]
    return _ROUTES_BY_PREFIX.get(prefix, "other")
