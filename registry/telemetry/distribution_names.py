"""`distribution_metrics`: Entrepot's metrics under the names of CNCF Distribution 3, for dashboards that were made for
Distribution.

The names, labels and values are those of Distribution's `registry/handlers/app.go`, `registry/proxy/proxymetrics.go`
and `registry/storage/driver/base/base.go`, with four differences:

- Histograms of durations have the buckets of Entrepot's own metrics.
- The size of a request is the size of its body, without its head.
- The requests of a mirror include the requests that are answered with an error (`_proxy_metrics`).
- Entrepot has no storage driver. Instead, each call of an operation of the `Registry` interface counts as one storage
  action (`ACTIONS`). Operations that are not in `ACTIONS` are not counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from registry.telemetry.exposition import cumulative_buckets
from registry.telemetry.metric_families import Family, Histogram
from registry.telemetry.metrics import Metrics

HANDLERS: Final[Mapping[str, str]] = {
    "ping": "base",
    "catalog": "catalog",
    "tags": "tags",
    "manifests": "manifest",
    "blobs": "blob",
    "uploads": "blob_upload",
    "session": "blob_upload_chunk",
}
"""Maps Entrepot's routes to Distribution's handlers. Distribution has no handler for Entrepot's other routes."""
ACTIONS: Final[Mapping[str, str]] = {
    "resolve_blob": "Stat",
    "open_blob": "Reader",
    "resolve_manifest": "GetContent",
    "get_manifest": "GetContent",
    "start_upload": "Writer",
    "resume_upload": "Writer",
    "put_manifest": "PutContent",
    "delete_blob": "Delete",
    "delete_manifest": "Delete",
    "delete_tag": "Delete",
    "repositories": "Walk",
    "tags": "List",
}
"""Maps operations of the `Registry` interface to Distribution's storage actions. The storage action is the one that
does most of the work of the operation."""
_PROXY_TYPES: Final[Mapping[str, str]] = {"blobs": "blob", "manifests": "manifest"}
"""Maps Entrepot's routes for mirrored content to the values of Distribution's label `type`."""
_DRIVER: Final = "filesystem"
"""The value of Distribution's label `driver`."""
TranslateLabels = Callable[..., tuple[str, ...] | None]
"""A function that gets the label values of a series of Entrepot, and returns the label values of Distribution's series.
Returns None if Distribution has no such series."""


def distribution_metrics(metrics: Metrics) -> Iterator[Metric]:
    """Yields the metrics with Distribution's names. The counts are those of Entrepot's own metrics. Each process
    counts in *cells*, which are numbers. The parameter `totals` of the functions in this module contains, for each
    cell, the sum over all processes."""
    totals = metrics.totals()
    yield from _http_metrics(metrics, totals)
    yield from _proxy_metrics(metrics, totals)
    yield _histogram(
        "registry_storage_action_seconds",
        "The number of seconds that the storage action takes",
        ["driver", "action"],
        metrics.work.calls,
        totals,
        lambda operation: (_DRIVER, ACTIONS[operation]) if operation in ACTIONS else None,
    )


def _http_metrics(metrics: Metrics, totals: Sequence[float]) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "registry_http_requests", "Total number of HTTP requests made.", labels=["code", "handler", "method"]
    )
    for (route, method, status), count in _counts(metrics.requests, totals):
        if route in HANDLERS:
            requests.add_metric([status, HANDLERS[route], method.lower()], count)
    yield requests
    yield _histogram(
        "registry_http_request_duration_seconds",
        "The HTTP request latencies in seconds.",
        ["handler", "method"],
        metrics.seconds,
        totals,
        lambda route, method: (HANDLERS[route], method.lower()) if route in HANDLERS else None,
    )
    for name, text, family in (
        ("request_size_bytes", "The HTTP request sizes in bytes.", metrics.request_sizes),
        ("response_size_bytes", "The HTTP response sizes in bytes.", metrics.response_sizes),
    ):
        yield _histogram(
            *(f"registry_http_{name}", text, ["handler"], family, totals),
            lambda route: (HANDLERS[route],) if route in HANDLERS else None,
        )
    in_flight = metrics.cells.live_totals([metrics.in_flight.first_cell])[metrics.in_flight.first_cell]
    yield GaugeMetricFamily("registry_http_in_flight_requests", "The in-flight HTTP requests", value=in_flight)


def _proxy_metrics(metrics: Metrics, totals: Sequence[float]) -> Iterator[Metric]:
    """Yields the metrics of mirrors. A response with the cache state `miss` counts as a miss. Any other response, even
    an error, counts as a hit. Distribution does not count errors."""
    requests: dict[str, float] = dict.fromkeys(_PROXY_TYPES.values(), 0.0)
    misses, pulled = dict(requests), dict(requests)
    for (_, route, cache), count in _counts(metrics.mirror.requests, totals):
        if route in _PROXY_TYPES:
            requests[_PROXY_TYPES[route]] += count
            misses[_PROXY_TYPES[route]] += count if cache == "miss" else 0
    for (_, content), count in _counts(metrics.mirror.fetched_bytes, totals):
        pulled[content] += count
    pushed = {
        name: sum(count for (_, served, _), count in _counts(metrics.mirror.served_bytes, totals) if served == route)
        for route, name in _PROXY_TYPES.items()
    }
    for name, text, values in (
        ("requests", "The number of total incoming proxy request received", requests),
        (
            "hits",
            "The number of total proxy request hits",
            {content: requests[content] - misses[content] for content in requests},
        ),
        ("misses", "The number of total proxy request misses", misses),
        ("pulled_bytes", "The size of total bytes pulled from the upstream", pulled),
        ("pushed_bytes", "The size of total bytes pushed to the client", pushed),
    ):
        metric = CounterMetricFamily(f"registry_proxy_{name}", text, labels=["type"])
        for content, value in values.items():
            metric.add_metric([content], value)
        yield metric


def _counts(family: Family, totals: Sequence[float]) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yields, for each series whose count is not 0, the label values and the count."""
    for values, cells in family.nonzero_series(totals):
        yield values, cells[0]


def _histogram(
    name: str, text: str, labels: list[str], family: Histogram, totals: Sequence[float], translate: TranslateLabels
) -> Metric:
    """Returns Entrepot's histogram `family` under the name `name`. Adds up all series for which `translate` returns the
    same label values. Leaves out the series for which `translate` returns None."""
    sums: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0] * family.width)
    for values, cells in family.nonzero_series(totals):
        translated = translate(*values)
        if translated is not None:
            sums[translated] = [total + count for total, count in zip(sums[translated], cells, strict=True)]
    metric = HistogramMetricFamily(name, text, labels=labels)
    for distribution_labels, total in sums.items():
        metric.add_metric(distribution_labels, *cumulative_buckets(family, total))
    return metric
