"""Sends metrics to an OpenTelemetry collector (`OtlpMetrics`), by OTLP over HTTP.

Each worker sends the numbers in its own *column*, the part of the shared memory to which only this worker writes. Each
column is a separate service instance: `service.instance.id` contains the number of the column. When a worker dies, the
next worker that claims its column adds to the numbers there. So the sum over the instances is the total.

The OpenTelemetry libraries come with the extra `entrepot[otel]`, and are imported only if a collector is configured.
"""

from __future__ import annotations

import logging
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from registry import __version__
from registry.telemetry.metric_families import Family, Histogram
from registry.telemetry.metrics import Metrics
from registry.telemetry.otel_configuration import metrics_interval

if TYPE_CHECKING:
    from opentelemetry.sdk.metrics.export import Metric, MetricsData

METRICS_PATH: Final = "/v1/metrics"
"""Path at which a collector accepts metrics (OTLP 1, "OTLP/HTTP Request")."""
_TIMEOUT_SECONDS: Final = 5.0
"""Time limit for one transmission of the metrics."""
log = logging.getLogger("registry.telemetry")


class OtlpMetrics:
    """Sends the metrics of one process, at regular intervals, in a thread. Create this object after the fork, when the
    process has claimed its column. If the collector does not answer, only the data points of that interval are lost,
    and no request is delayed."""

    def __init__(self, metrics: Metrics, endpoint: str | None) -> None:
        """`endpoint`: the setting `otel.endpoint`; None: OpenTelemetry's environment variables name the collector."""
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.resources import Resource

        self._metrics = metrics
        self._started_at = int(metrics.own_start_time * 1e9)
        self._resource = Resource.create(
            {
                "service.name": os.environ.get("OTEL_SERVICE_NAME", "entrepot"),
                "service.version": __version__,
                "service.instance.id": f"{platform.node()}-{metrics.cells.own_column_number}",
            }
        )
        url = None if endpoint is None else endpoint.rstrip("/") + METRICS_PATH
        self._exporter = OTLPMetricExporter(url, timeout=_TIMEOUT_SECONDS)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="otlp-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Sends the numbers once more, and ends the thread. Blocks for some seconds if the collector does not answer,
        so call this method in another thread than the event loop's."""
        self._stopped.set()
        self._thread.join()
        self._exporter.shutdown()

    def _run(self) -> None:
        interval, is_last = metrics_interval(), False
        while not is_last:
            is_last = self._stopped.wait(interval)
            try:
                self._exporter.export(self._data())
            except Exception:
                log.exception("the metrics could not be sent")

    def _data(self) -> MetricsData:
        from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        scope = ScopeMetrics(InstrumentationScope("entrepot", __version__), [*self._all_metrics()], "")
        return MetricsData([ResourceMetrics(self._resource, [scope], "")])

    def _all_metrics(self) -> Iterator[Metric]:
        own_numbers, now = self._metrics.own_numbers(), time.time_ns()
        for family in self._metrics.plan.families:
            if metric := self._metric(family, own_numbers, now):
                yield metric

    def _metric(self, family: Family, own_numbers: Sequence[float], now: int) -> Metric | None:
        """Returns the metric of a family; None if the family has no series to send. `own_numbers`: the numbers in the
        column of this process. `now`: nanoseconds since 1970."""
        from opentelemetry.sdk.metrics.export import (
            AggregationTemporality,
            Gauge,
            HistogramDataPoint,
            Metric,
            NumberDataPoint,
            Sum,
        )
        from opentelemetry.sdk.metrics.export import Histogram as HistogramData

        points: list[Any] = []
        for values, cells in self._series(family, own_numbers):
            labels = self._metrics.label_values(family, values)
            if isinstance(family, Histogram):
                counts, sum_of_values = [int(number) for number in cells[:-1]], cells[-1]
                bounds = [float(bound) for bound in family.bounds]
                # Minimum and maximum are optional (OTLP, HistogramDataPoint), and the cells do not contain them.
                no_value: Any = None
                points.append(
                    HistogramDataPoint(
                        labels, self._started_at, now, sum(counts), sum_of_values, counts, bounds, no_value, no_value
                    )
                )
            else:
                points.append(NumberDataPoint(labels, self._started_at, now, cells[0]))
        if not points:
            return None
        cumulative = AggregationTemporality.CUMULATIVE
        if family.kind == "gauge":
            return Metric(family.name, family.help_text, "", Gauge(points))
        data = HistogramData(points, cumulative) if isinstance(family, Histogram) else Sum(points, cumulative, True)
        return Metric(family.name, family.help_text, "", data)

    def _series(
        self, family: Family, own_numbers: Sequence[float]
    ) -> Iterator[tuple[tuple[str, ...], Sequence[float]]]:
        """Yields the label values and the cells of each series to send. A cell is one number in the column.

        - For a counter or histogram: the series that are not 0.
        - For a gauge: also the series that are 0, so that the collector does not keep an older value. Leaves out the
          series of upstreams and webhooks that do not exist (`Metrics.is_series_in_use`)."""
        if family.kind != "gauge":
            yield from family.nonzero_series(own_numbers)
            return
        for values, first_cell in family.series():
            if self._metrics.is_series_in_use(family, values):
                yield values, own_numbers[first_cell : first_cell + family.width]
