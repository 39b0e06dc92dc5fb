"""`Telemetry`: the metrics and traces of one server, and the recorder of its requests."""

from __future__ import annotations

import asyncio
import os
import time
from asyncio import Future
from collections.abc import Callable
from typing import Any

from prometheus_client.registry import Collector

from registry.config import Settings
from registry.telemetry.distribution_names import distribution_metrics
from registry.telemetry.exposition import CellCollector, collector_of, process_metrics
from registry.telemetry.metrics import CountsMemory, Metrics
from registry.telemetry.mirror_metrics import UpstreamCounts
from registry.telemetry.otel_configuration import are_metrics_sent, are_traces_sent
from registry.telemetry.otlp_metrics import OtlpMetrics
from registry.telemetry.recent_clients import RecentClients
from registry.telemetry.request_recorder import RequestRecorder
from registry.telemetry.tracing import Tracing


class Telemetry:
    """The metrics and traces of a server, and the recorder of its requests. Create one object before the fork, so that
    all workers share the metrics. Then call `start_worker` in each worker."""

    def __init__(
        self,
        settings: Settings,
        metrics_port: int | None = None,
        clock: Callable[[], float] = time.time,
        inherited: CountsMemory | None = None,
    ) -> None:
        """`metrics_port`: the port that serves only the metrics; None: there is no such port. `clock` returns seconds
        since 1970. `inherited`: the counts of the previous version of the program, which has started this version with
        `exec`; None: there is no previous version (see `Metrics`)."""
        self.metrics = Metrics(
            [upstream.name for upstream in settings.upstream],
            settings.workers,
            inherited,
            [webhook.name for webhook in settings.webhook],
        )
        self.work = self.metrics.work
        """Counts logins, commits of the database, upkeep, and calls of the registry's methods."""
        self.events = self.metrics.events
        """Counts the deliveries of events to webhooks."""
        self.recent_clients = RecentClients(clock) if settings.pages.enabled else None
        """For the web pages: the times of the latest requests of container clients; None: there are no web pages."""
        self.requests = RequestRecorder(self.metrics, self.recent_clients)
        """Records the requests of this process."""
        self.metrics_port = metrics_port
        self._counting_pid: int | None = None
        self._started_at = clock()
        self._certificate = settings.tls.certificate
        self._otel_endpoint = settings.otel.endpoint
        self.tracing: Tracing | None = None
        """Makes the spans of this worker; None: traces are not configured, or `start_worker` was not called yet."""
        self._otlp_metrics: OtlpMetrics | None = None
        self._serves_distribution_names = settings.metrics.distribution_names
        """Whether the server also serves the metrics under the names that CNCF Distribution 3 uses."""

    def mirror_observer(self, upstream: str) -> UpstreamCounts:
        """Returns the object that counts and traces the work of the mirror of one upstream in this process."""
        return UpstreamCounts(self.metrics.mirror, self.metrics.cells, upstream, self.tracing)

    def on_queued(self, change: Future[Any]) -> None:
        """Traces a change of the metadata (see `storage.metadata.catalog.CommitObserver`). `change` is done when the
        change is committed or has failed."""
        if self.tracing is not None:
            self.tracing.trace_change(change)

    def on_commit(self, change_count: int, wait_seconds: float, commit_seconds: float) -> None:
        """Counts a batch of `change_count` changes of the metadata. `wait_seconds`: how long the batch waited for the
        lock of the database. `commit_seconds`: how long the changes and their commit took."""
        self.work.on_commit(change_count, wait_seconds, commit_seconds)

    def collectors(self) -> list[Collector]:
        """Returns the collectors of all metrics that can be computed without reading the store."""
        metrics = self.metrics
        collectors: list[Collector] = [CellCollector(metrics)]
        collectors.append(collector_of(lambda: process_metrics(metrics, self._started_at, self._certificate)))
        if self._serves_distribution_names:
            collectors.append(collector_of(lambda: distribution_metrics(metrics)))
        return collectors

    def start_worker(self) -> None:
        """Claims a *column* for this process: the part of the shared memory that holds the counts of this process. If
        OpenTelemetry is configured, starts to send traces and metrics. A second call in the same process does
        nothing."""
        if self._counting_pid == os.getpid():
            return
        self._counting_pid = os.getpid()
        self.metrics.start_worker()
        if are_traces_sent(self._otel_endpoint):
            self.tracing = self.requests.tracing = Tracing(self._otel_endpoint)
        if are_metrics_sent(self._otel_endpoint):
            self._otlp_metrics = OtlpMetrics(self.metrics, self._otel_endpoint)

    async def aclose(self) -> None:
        """Sends the last spans and metrics to the OpenTelemetry collector. Must be called at the end of each worker."""
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)
        if self._otlp_metrics is not None:
            await asyncio.to_thread(self._otlp_metrics.close)
