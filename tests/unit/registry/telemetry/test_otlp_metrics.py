"""Metrics that a worker sends to an OpenTelemetry collector."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from registry.telemetry.metrics import CountsMemory, Metrics
from registry.telemetry.otlp_metrics import OtlpMetrics
from tests.fakes.otlp_collector import Collector, attributes


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def send(metrics: Metrics, collector: Collector) -> dict[str, Any]:
    """Sends the metrics of this process. Returns the metrics that the collector got, by their names."""
    OtlpMetrics(metrics, collector.url).close()
    ((_, received),) = collector.metrics.items()
    return {metric.name: metric for metric in received}


@pytest.mark.slow
def test_a_gauge_of_zero_is_sent(collector: Collector) -> None:
    """Gauges that are 0 are sent, so that the collector does not keep an earlier value: for each upstream in the
    settings, and for no other."""
    metrics = Metrics(["docker.io"], workers=1)
    metrics.start_worker()
    received = send(metrics, collector)
    assert [point.as_double for point in received["entrepot_open_connections"].gauge.data_points] == [0]
    breakers = received["entrepot_upstream_open_breakers"].gauge.data_points
    assert {attributes(point)["upstream"] for point in breakers} == {"docker.io"}
    assert {point.as_double for point in breakers} == {0}


def test_counters_keep_their_start_after_a_takeover(collector: Collector) -> None:
    """After a new version has taken over the counts, a counter has the same start as before. With a later start, the
    collector would take the counter for a new one and add its whole value again."""
    old = Metrics([], workers=1)
    old.start_worker()
    start_before = send(old, collector)["entrepot_worker_starts_total"].sum.data_points[0]
    inherited = CountsMemory(os.dup(old.memory.descriptor), old.memory.layout)
    new = Metrics([], workers=1, inherited=inherited)
    new.start_worker()
    start_after = send(new, collector)["entrepot_worker_starts_total"].sum.data_points[0]
    assert (start_before.as_double, start_after.as_double) == (1, 2)
    assert start_after.start_time_unix_nano == start_before.start_time_unix_nano
