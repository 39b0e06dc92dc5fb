"""Tests of the OpenTelemetry traces and metrics that a real server sends to a collector."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from registry.telemetry.otel_configuration import are_metrics_sent, are_traces_sent
from tests.fakes.mirror_site import REPO, MirrorSite
from tests.fakes.otlp_collector import Collector, attributes
from tests.fakes.plain_client import plain_request
from tests.fakes.server_process import running_server

# The ids of the trace and of the span of the client.
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def test_spans_of_a_push(tmp_path: Path, collector: Collector) -> None:
    """The span of the request is a child of the client's span. The span of the registry call is a child of the
    request's span. The spans of database writes are children of the request's span or of the registry call's span."""
    body = b"x"
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    with running_server(tmp_path, env={"ENTREPOT_OTEL__ENDPOINT": collector.url}) as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = plain_request(
            "POST", f"{server.url}/v2/team/app/blobs/uploads/?digest={digest}", content=body, headers=headers
        )
        assert answer.status_code == 201
        for _ in range(3):
            assert plain_request("GET", f"{server.url}/v2/").status_code == 200
    (request,) = collector.named("POST uploads")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    request_attributes = attributes(request)
    assert (
        request_attributes["http.response.status_code"],
        request_attributes["http.route"],
        request_attributes["http.request.method"],
    ) == (*(201, "uploads", "POST"),)
    (call,) = collector.named("registry.start_upload")
    assert call.parent_span_id == request.span_id
    database_spans = [span for span in collector.named("database.write") if span.trace_id == request.trace_id]
    assert database_spans
    assert {span.parent_span_id for span in database_spans} <= {request.span_id, call.span_id}
    assert len(collector.named("GET ping")) == 3
    assert all(span.end_time_unix_nano >= span.start_time_unix_nano for span in collector.spans)


def test_spans_of_upstream_requests(site: MirrorSite, collector: Collector) -> None:
    """The spans of upstream requests are in the trace of the client request that caused them."""
    site.start(settings='prefetch = "off"', more=f'[otel]\nendpoint = "{collector.url}/"')
    site.get_manifest()
    site.server.stop()
    (request,) = collector.named("GET manifests")
    upstream_spans = [span for span in collector.named("upstream.request") if span.trace_id == request.trace_id]
    assert upstream_spans
    assert attributes(upstream_spans[0])["entrepot.repository"] == REPO


def test_each_worker_sends_its_metrics(tmp_path: Path, collector: Collector) -> None:
    """Each worker sends its counters with their labels and its histograms. What it has not sent yet, it sends when it
    stops."""
    with running_server(tmp_path, env={"ENTREPOT_OTEL__ENDPOINT": collector.url}) as server:
        for _ in range(30):
            assert plain_request("GET", f"{server.url}/v2/").status_code == 200
    assert len(collector.metrics) == 2, "each worker is an instance"
    metrics = [metric for instance in collector.metrics.values() for metric in instance]
    points = [
        point for each in metrics if each.name == "entrepot_http_requests_total" for point in each.sum.data_points
    ]
    pings = [point for point in points if attributes(point)["route"] == "ping"]
    assert {attributes(point)["status"] for point in pings} == {"200"}
    assert sum(point.as_double for point in pings) == 30
    durations = [
        point
        for each in metrics
        if each.name == "entrepot_http_request_duration_seconds"
        for point in each.histogram.data_points
        if attributes(point)["route"] == "ping"
    ]
    assert sum(point.count for point in durations) == sum(sum(point.bucket_counts) for point in durations) == 30
    assert all(len(point.bucket_counts) == len(point.explicit_bounds) + 1 for point in durations)


def test_server_works_while_the_collector_refuses_data(tmp_path: Path) -> None:
    """While the collector refuses all data, requests are served, and the server can be stopped."""
    collector = Collector(status=503)
    with running_server(tmp_path, workers=1, env={"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}) as server:
        for _ in range(20):
            assert plain_request("GET", f"{server.url}/v2/").status_code == 200
    collector.close()
    assert collector.spans == []


@pytest.mark.parametrize(
    ("endpoint", "environment", "expected"),
    [
        (None, {}, False),
        ("http://127.0.0.1:4318", {}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        ("http://127.0.0.1:4318", {"OTEL_SDK_DISABLED": "true"}, False),
        ("http://127.0.0.1:4318", {"OTEL_TRACES_EXPORTER": "none"}, False),
        (None, {"OTEL_SERVICE_NAME": "x"}, False),
    ],
)
def test_traces_are_sent_only_if_a_collector_is_configured(
    endpoint: str | None, environment: dict[str, str], expected: bool
) -> None:
    """Traces are sent only if the settings or the environment variables of OpenTelemetry name a collector."""
    assert are_traces_sent(endpoint, environment) == expected


@pytest.mark.parametrize(
    ("endpoint", "environment", "expected"),
    [
        (None, {}, False),
        ("http://127.0.0.1:4318", {}, True),
        ("http://127.0.0.1:4318", {"OTEL_METRICS_EXPORTER": "none"}, False),
        (None, {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:4318/v1/metrics"}, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, False),
        ("http://127.0.0.1:4318", {"OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_metrics_are_sent_only_if_a_collector_is_configured(
    endpoint: str | None, environment: dict[str, str], expected: bool
) -> None:
    """Metrics are sent only if the settings or the environment variables of OpenTelemetry name a collector."""
    assert are_metrics_sent(endpoint, environment) == expected


def test_the_sdk_is_not_imported_without_a_collector() -> None:
    """Without a collector the server does not import the OpenTelemetry SDK, because the import costs memory and start
    time."""
    code = "import sys, registry.app; sys.exit('opentelemetry.sdk' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
