"""The metrics that the processes of the server count in shared memory (`Metrics`).

A *cell* is one number of a metric. Each process has its own copy of all cells, its *column*, and writes only to this
column (`registry.telemetry.shared_cells`).

Names follow Prometheus ("Metric and label naming"): the prefix `entrepot_`, base units, counters with `_total`. No
label contains the name of a repository, because a registry can have a million repositories.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final, NamedTuple

from registry.telemetry.activity import ActivityCounts
from registry.telemetry.metric_families import CellPlan, Counter, Family, Gauge, Histogram
from registry.telemetry.mirror_metrics import UPSTREAM_CAPACITY, MirrorMetrics
from registry.telemetry.shared_cells import SharedCells, SharedMemory, SharedNames
from registry.telemetry.work_metrics import WEBHOOK_CAPACITY, EventMetrics, WorkMetrics

log = logging.getLogger("registry.telemetry")
ROUTES: Final = (
    *("ping", "catalog", "tags", "referrers", "manifests", "blobs", "uploads", "session"),
    *("extensions", "history", "api", "token", "login", "pages", "search", "health", "metrics", "other"),
)
"""The values of the label `route`. For a path below `/v2`, the value is the kind of the resource
(`registry.http.resource_path.Resource`). For any other path, the first part of the path decides. A request that the
server refuses before it reads the path counts as `other`."""
_CACHED_METHODS: Final = ("GET", "HEAD")
"""The methods of the requests that the response cache answers."""
METHODS: Final = ("GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "other")
STATUSES: Final = (*(str(status.value) for status in HTTPStatus), "other")
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)
"""Upper bounds of the buckets of durations."""
SIZES: Final = tuple(1024 << exponent for exponent in range(22))
"""Upper bounds of the buckets of sizes, in bytes: from 1 KiB to 2 GiB, as in CNCF Distribution."""
_MIN_COLUMNS: Final = 32
"""Smallest number of columns. A restart that increases the number of workers can continue the counts only if the memory
has enough columns for the new workers."""


class CountsMemory(NamedTuple):
    """The shared memory with the counts. `descriptor`: the file descriptor of the memory. `layout`: a text that
    identifies the meaning of each cell. A new version of the program continues the counts of the old version only if
    both versions have the same layout."""

    descriptor: int
    layout: str


class Metrics:
    """The metrics that all worker processes of one server count together. Create it before the fork. Call
    `start_worker` in each worker."""

    def __init__(
        self,
        upstreams: Sequence[str],
        workers: int,
        inherited: CountsMemory | None = None,
        webhooks: Sequence[str] = (),
    ) -> None:
        """`upstreams`, `webhooks`: the names in the settings. `workers`: number of worker processes, without those that
        a restart has replaced.

        `inherited`: the memory of the old version of the program, which this process ran before a restart (execve(2));
        None: there is no such memory, and all counts begin at 0. If the memory has a different layout or too few
        columns, it is closed, and all counts begin at 0. Otherwise, its counts continue."""
        plan = CellPlan()
        by_route = {"route": ROUTES}
        by_method = {**by_route, "method": METHODS}
        self.requests = Counter(
            plan, "entrepot_http_requests_total", "Complete responses.", {**by_method, "status": STATUSES}
        )
        self.aborted = Counter(
            plan, "entrepot_http_aborted_requests_total", "Requests without a complete response.", by_method
        )
        self.seconds = Histogram(
            plan,
            "entrepot_http_request_duration_seconds",
            "Time from the end of a request's head to the end of the response.",
            by_method,
            bounds=SECONDS,
        )
        self.received_bytes = Counter(
            plan, "entrepot_http_request_body_bytes_total", "Bytes of request bodies.", by_route
        )
        self.sent_bytes = Counter(
            plan, "entrepot_http_response_body_bytes_total", "Bytes of response bodies.", by_route
        )
        self.cached_answers = Counter(
            plan, "entrepot_http_cached_answers_total", "Responses that came from the response cache.", by_route
        )
        self.request_sizes = Histogram(
            plan, "entrepot_http_request_size_bytes", "Size of request bodies.", by_route, bounds=SIZES
        )
        self.response_sizes = Histogram(
            plan, "entrepot_http_response_size_bytes", "Size of response bodies.", by_route, bounds=SIZES
        )
        self._first_cached_answers_cell = self._add_sources(plan)
        self.worker_starts = Counter(plan, "entrepot_worker_starts_total", "Worker processes that were started.")
        self.mirror = MirrorMetrics(plan, ROUTES)
        self.work = WorkMetrics(plan)
        self.events = EventMetrics(plan)
        self.connections = Gauge(plan, "entrepot_open_connections", "Connections of clients that are open.")
        self.in_flight = Gauge(
            plan,
            "entrepot_http_requests_in_flight",
            "Requests in progress, without those that the response cache answers.",
        )
        self.activity = ActivityCounts(plan, self.requests, self.mirror)
        self._start_time_cell = plan.reserve(1)  # the time that `own_start_time` returns
        self.plan = plan
        # The memory holds the names of the upstreams, the names of the webhooks, and the cells, at these offsets.
        webhooks_start = SharedNames.needed_bytes(UPSTREAM_CAPACITY)
        cells_start = webhooks_start + SharedNames.needed_bytes(WEBHOOK_CAPACITY)
        # Four columns for each worker, because the replaced workers of several restarts can still run.
        columns = max(_MIN_COLUMNS, 4 * workers)
        memory = None
        if inherited is not None:
            column_bytes = SharedCells.needed_bytes(plan.size, 1)
            inherited_columns = (os.fstat(inherited.descriptor).st_size - cells_start) // column_bytes
            if inherited.layout == plan.layout_hash() and inherited_columns >= 4 * workers:
                columns = inherited_columns
                memory = SharedMemory(cells_start + columns * column_bytes, inherited.descriptor)
            else:
                os.close(inherited.descriptor)
                log.warning("all metrics begin at 0: this version cannot continue the counts of the previous version")
        memory = memory or SharedMemory(cells_start + SharedCells.needed_bytes(plan.size, columns))
        self.memory = CountsMemory(memory.descriptor, plan.layout_hash())
        """The memory that is passed on to a new version of the program."""
        self.upstreams = SharedNames(upstreams, UPSTREAM_CAPACITY, memory)
        self.webhooks = SharedNames(webhooks, WEBHOOK_CAPACITY, memory, webhooks_start)
        self.cells = SharedCells(plan.size, columns, memory, cells_start)
        self.mirror.attach_memory(self.upstreams)
        self.work.attach_memory(self.cells)
        self.activity.attach_memory(self.cells, self.totals)
        self.events.attach_memory(self.cells, self.webhooks)

    def _add_sources(self, plan: CellPlan) -> int:
        """Adds the sources to `plan`. A *source* is a cell whose value also counts in other cells. To save time, a
        process writes the value only to the source. `CellPlan.add_to_series` later adds the value to the other cells.

        Reserves sources for the requests that the response cache answers: one for each combination of route, method and
        bucket of the response's size. These requests have the status 200, and count in the first bucket of the
        durations and of the request sizes. Returns the first reserved cell."""
        first_cell = cell = plan.reserve(len(ROUTES) * len(_CACHED_METHODS) * (len(SIZES) + 1))
        for route in ROUTES:
            request_sizes_cell = self.request_sizes.cell(route)
            response_sizes_cell = self.response_sizes.cell(route)
            for method in _CACHED_METHODS:
                common_cells = (  # these cells count responses of every size
                    *(self.requests.cell(route, method, "200"), self.seconds.cell(route, method)),
                    *(self.cached_answers.cell(route), request_sizes_cell),
                )
                for bucket in range(len(SIZES) + 1):
                    plan.add_source(cell, *common_cells, response_sizes_cell + bucket)
                    cell += 1
            # A process adds the bytes of a request only to the counters of bytes, not to the sums in the histograms of
            # sizes. So each counter of bytes is a source: its value is added to the sum in one of the histograms.
            plan.add_source(self.sent_bytes.cell(route), self.response_sizes.sum_cell(response_sizes_cell))
            plan.add_source(self.received_bytes.cell(route), self.request_sizes.sum_cell(request_sizes_cell))
        return first_cell

    def cached_answers_cell(self, route: str, method: str, size: int) -> int:
        """Returns the cell to which a process adds 1 for each request that the response cache answers. `size`: size of
        the response's body in bytes. `CellPlan.add_to_series` adds the cell to all series that count the request."""
        # `bucket_cell` adds the index of the bucket to a first cell. It also works for the reserved cells, because the
        # cells of a route and method are consecutive: one for each bucket, in the order of the buckets.
        position = ROUTES.index(route) * len(_CACHED_METHODS) + _CACHED_METHODS.index(method)
        return self.response_sizes.bucket_cell(self._first_cached_answers_cell + position * (len(SIZES) + 1), size)

    def totals(self) -> list[float]:
        """Returns the total of each cell: the sum over the columns of all processes."""
        return self.plan.add_to_series(self.cells.totals())

    def own_numbers(self) -> list[float]:
        """Returns the numbers in the column of this process, which include the counts of earlier processes that had the
        column."""
        return self.plan.add_to_series([*self.cells.own])

    @property
    def own_start_time(self) -> float:
        """When the first process that had this column began to count, in seconds since 1970."""
        return self.cells.own[self._start_time_cell]

    def is_series_in_use(self, family: Family, values: Sequence[str]) -> bool:
        """Returns whether the upstream or webhook of the series exists. A family has series for UPSTREAM_CAPACITY
        upstreams or WEBHOOK_CAPACITY webhooks, even if fewer exist. Returns True for a series without an upstream or
        webhook. `values`: as for `label_values`."""
        shared_names = {"upstream": self.upstreams, "webhook": self.webhooks}
        return all(
            int(value) < len(shared_names[label].names())
            for label, value in zip(family.labels, values, strict=True)
            if label in shared_names
        )

    def label_values(self, family: Family, values: Sequence[str]) -> dict[str, str]:
        """Returns the labels of a series with their values. `values`: the values that `Family.series` yields. They have
        numbers in place of the names of upstreams and webhooks."""
        shared_names = {"upstream": self.upstreams, "webhook": self.webhooks}
        return {
            label: _name_of(value, shared_names[label].names()) if label in shared_names else value
            for label, value in zip(family.labels, values, strict=True)
        }

    def start_worker(self) -> None:
        """Claims a column for this process. Call it once in each worker."""
        if not self.cells.claim_column(self.plan.gauge_cells()):
            log.error("too many processes run: the metrics do not include process %d", os.getpid())
        # If no column was free, these counts go to private memory, and no total includes them.
        self.cells.own[self.worker_starts.first_cell] += 1
        if not self.cells.own[self._start_time_cell]:
            self.cells.own[self._start_time_cell] = time.time()


def _name_of(number: str, names: Sequence[str]) -> str:
    """Returns the name with this number; `other` if there is no such name."""
    return names[int(number)] if int(number) < len(names) else "other"
