"""`Metrics`: all metrics of the server that processes count in shared memory, and how to count each of them.

Names follow Prometheus ("Metric and label naming"): the prefix `entrepot_`, base units, counters with `_total`. No
label has a repository's name, because there can be a million of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

from registry.telemetry.metric_families import CellPlan, Counter, Gauge, Histogram
from registry.telemetry.mirror_metrics import UPSTREAM_CAPACITY, MirrorMetrics
from registry.telemetry.shared_cells import SharedCells, SharedNames
from registry.telemetry.work_metrics import WorkMetrics

log = logging.getLogger("registry.telemetry")
ROUTES: Final = (
    *("ping", "catalog", "tags", "referrers", "manifests", "blobs", "uploads", "session"),
    *("extensions", "history", "api", "token", "login", "health", "metrics", "other"),
)
"""The kinds of resource (`registry.http.resource_path.Resource`), and the first parts of other paths. A request that
the server refuses before it reads the path counts as `other`."""
METHODS: Final = ("GET", "HEAD", "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "other")
STATUSES: Final = (*(str(status.value) for status in HTTPStatus), "other")
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)
"""Upper bounds of the buckets of durations."""


class Metrics:
    """The metrics that all worker processes of one server count together. Create it before the fork. Call
    `cells.claim_column` in each worker."""

    def __init__(self, upstreams: Sequence[str], workers: int) -> None:
        """`upstreams`: the names in the settings. `workers`: number of processes that run at the same time; while they
        are replaced, there are twice as many."""
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
        self.worker_starts = Counter(plan, "entrepot_worker_starts_total", "Worker processes that were started.")
        self.upstreams = SharedNames(upstreams, UPSTREAM_CAPACITY)
        self.mirror = MirrorMetrics(plan, self.upstreams, ROUTES)
        self.work = WorkMetrics(plan)
        self.connections = Gauge(plan, "entrepot_open_connections", "Connections of clients that are open.")
        self.in_flight = Gauge(
            plan,
            "entrepot_http_requests_in_flight",
            "Requests that are being answered, except from the response cache.",
        )
        self.plan = plan
        self.cells = SharedCells(plan.size, 4 * workers)
        self.work.use(self.cells)

    def start_worker(self) -> None:
        """Claims a column for this process. Call it once in each worker."""
        if not self.cells.claim_column(self.plan.gauge_cells()):
            log.error("too many processes run: the metrics leave out what process %d does", os.getpid())
        self.cells.own[self.worker_starts.first] += 1
