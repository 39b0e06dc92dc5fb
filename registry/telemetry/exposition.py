"""Writes metrics in the text format of Prometheus, or in OpenMetrics if the client asks for it (`render_metrics`).
`CellCollector` and `process_metrics` collect the metrics that do not need the store."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from registry import __version__
from registry.server.gate.certificates import CertificateError, expiry_of
from registry.server.process.free_memory import resident_bytes
from registry.telemetry.metric_families import Family, Histogram
from registry.telemetry.metrics import Metrics

Collect = Callable[[], Iterable[Metric]]
"""A function that returns metrics that are not in shared memory, such as the size of the store. It may read files and
the database."""


class CellCollector(Collector):
    """Collects the metrics in shared memory, where a *cell* holds one number of one process. Leaves out each series
    that has labels and the value 0, because most of the possible series are of this kind."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        plan, cells = self._metrics.plan, self._metrics.cells
        totals = self._metrics.totals()
        # `totals` includes processes that have ended. For a gauge, such as the number of open connections, only running
        # processes count.
        for cell, value in cells.live_totals(plan.gauge_cells()).items():
            totals[cell] = value
        for family in plan.families:
            yield _metric_of(family, totals, self._metrics)


def _metric_of(family: Family, totals: Sequence[float], metrics: Metrics) -> Metric:
    """Returns a family (a metric with all its series) for Prometheus. `totals`: for each cell, the total over all
    processes."""
    label_names = list(family.labels)
    histogram = HistogramMetricFamily(family.name, family.help_text, labels=label_names)
    number_metric = (CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily)(
        family.name, family.help_text, labels=label_names
    )
    unlabelled: list[tuple[tuple[str, ...], Sequence[float]]] = [
        ((), totals[family.first_cell : family.first_cell + family.width])
    ]
    for label_values, cells in family.nonzero_series(totals) if label_names else unlabelled:
        labels = [*metrics.label_values(family, label_values).values()]
        if isinstance(family, Histogram):
            histogram.add_metric(labels, *cumulative_buckets(family, cells))
        else:
            number_metric.add_metric(labels, cells[0])
    return histogram if isinstance(family, Histogram) else number_metric


def cumulative_buckets(family: Histogram, cells: Sequence[float]) -> tuple[list[tuple[str, float]], float]:
    """Returns the buckets of a series, and the sum of all observed values. A bucket has its upper bound as text and the
    number of observed values up to this bound. `cells`: a number for each bucket, and after them the sum of all
    observed values. In the numbers, each value counts only once: in the first bucket whose bound is at least the
    value."""
    total, buckets = 0.0, []
    bounds = [*map(str, family.bounds), "+Inf"]
    for bound, count in zip(bounds, cells, strict=False):  # the last cell has the sum
        total += count
        buckets.append((bound, total))
    return buckets, cells[-1]


def process_metrics(metrics: Metrics, started_at: float, certificate: Path | None = None) -> Iterator[Metric]:
    """Yields the metrics about the server and its processes. `started_at`: when the server was started, in seconds
    since 1970. `certificate`: the file with the server's certificate; None if the server has no certificate. Reads this
    file and files in /proc."""
    build_info = {"version": __version__, "python": platform.python_version()}
    yield InfoMetricFamily("entrepot_build", "The version of the server.", value=build_info)
    yield GaugeMetricFamily(
        "entrepot_start_time_seconds", "When the server was started, in seconds since 1970.", value=started_at
    )
    processes = metrics.cells.processes()
    yield GaugeMetricFamily("entrepot_workers", "Worker processes that are running.", value=len(processes))
    memory = GaugeMetricFamily(
        "entrepot_worker_resident_memory_bytes", "Resident memory of each worker process.", labels=["worker"]
    )
    for worker, pid in processes:
        if resident := resident_bytes(pid):
            memory.add_metric([str(worker)], resident)
    yield memory
    if certificate is not None:
        yield from _certificate_metrics(certificate)


def _certificate_metrics(path: Path) -> Iterator[Metric]:
    """Yields a metric with the time at which the server's certificate expires; no metric if the file cannot be
    read."""
    with suppress(CertificateError):
        expires_at = expiry_of(path).timestamp()
        text = "When the server's certificate expires, in seconds since 1970."
        yield GaugeMetricFamily("entrepot_certificate_expiry_time_seconds", text, value=expires_at)


class _FunctionCollector(Collector):
    def __init__(self, collect: Collect) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def render_metrics(collectors: Sequence[Collector], accept: str) -> tuple[bytes, str]:
    """Returns the metrics of all collectors as text, and the media type of the text. `accept`: the client's Accept
    header. Blocks for milliseconds or longer, so call it in a thread. Raises the errors of the collectors."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in collectors:
        registry.register(collector)
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type


def collector_of(collect: Collect) -> Collector:
    """Returns a collector that calls `collect` at each scrape."""
    return _FunctionCollector(collect)
