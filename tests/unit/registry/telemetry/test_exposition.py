"""Families of metrics, and the text that Prometheus reads."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from registry.telemetry.exposition import CellCollector, process_metrics, render_metrics
from registry.telemetry.metric_families import CellPlan, Counter, Histogram
from registry.telemetry.metrics import Metrics
from registry.telemetry.mirror_metrics import UPSTREAM_CAPACITY
from tests.fakes.certificate_authority import CertificateAuthority


def exposed(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Returns all samples as Prometheus reads them, by name and labels."""
    body, _ = render_metrics([CellCollector(metrics)], "")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


@pytest.fixture
def metrics() -> Metrics:
    found = Metrics(["docker.io"], workers=1)
    found.start_worker()
    return found


def test_each_series_has_cells_of_its_own() -> None:
    """No two series share a cell."""
    plan = CellPlan()
    families = [
        Counter(plan, "a_total", "A.", {"x": ("1", "2"), "y": ("3", "4", "other")}),
        Histogram(plan, "b", "B.", {"x": ("1", "2")}, bounds=[1, 2]),
        Counter(plan, "c_total", "C."),
    ]
    taken = [cell + number for family in families for _, cell in family.series() for number in range(family.width)]
    assert taken == list(range(plan.size))
    totals = [float(number) for number in range(plan.size)]  # all but the first cell are not 0
    for family in families:
        assert [values for values, _ in family.counted(totals)][-1:] == [values for values, _ in family.series()][-1:]
        assert all(numbers[0] == family.cell(*values) for values, numbers in family.counted(totals))
        assert [(family.cell(*values), values) for values, _ in family.series()] == [
            (first, values) for values, first in family.series()
        ]


def test_an_unknown_value_counts_as_the_last_one() -> None:
    """An unknown label value counts as the last known value, so that clients cannot create series."""
    family = Counter(CellPlan(), "a_total", "A.", {"method": ("GET", "other")})
    assert family.cell("BREW") == family.cell("other")


def test_counts_are_exposed_and_zeros_are_not(metrics: Metrics) -> None:
    """A series is exposed from its first count on. A metric without labels is always exposed."""
    metrics.cells.own[metrics.requests.cell("manifests", "GET", "200")] += 3
    found = exposed(metrics)
    labels = (("method", "GET"), ("route", "manifests"), ("status", "200"))
    assert found[("entrepot_http_requests_total", labels)] == 3
    assert len([name for name, _ in found if name == "entrepot_http_requests_total"]) == 1
    assert found[("entrepot_worker_starts_total", ())] == 1


def test_buckets_are_cumulative(metrics: Metrics) -> None:
    """Each bucket counts the values up to its bound, including the bound. The last bucket counts all values."""
    first = metrics.seconds.cell("blobs", "GET")
    for seconds in (0.0, 0.001, 0.002, 0.05, 1000.0):
        metrics.seconds.observe(metrics.cells.own, first, seconds)
    found = {
        dict(labels).get("le", name.rsplit("_", 1)[1]): value
        for (name, labels), value in exposed(metrics).items()
        if name.startswith("entrepot_http_request_duration_seconds_")
    }
    assert (found["0.001"], found["0.0025"], found["0.05"], found["600.0"], found["+Inf"]) == (2, 3, 4, 4, 5)
    assert found["count"] == 5
    assert found["sum"] == pytest.approx(1000.053)


def test_upstreams_have_their_names(metrics: Metrics) -> None:
    """The label has the upstream's name, also for an upstream that a reload has added. Upstreams beyond the capacity
    count as `other`."""
    for name in ("docker.io", "ghcr.io", *(f"{number}.example" for number in range(UPSTREAM_CAPACITY))):
        cell = metrics.mirror.requests.cell(metrics.mirror.label(name), "blobs", "hit")
        metrics.cells.own[cell] += 1
    found = {
        dict(labels)["upstream"]: value
        for (name, labels), value in exposed(metrics).items()
        if name == "entrepot_mirror_requests_total"
    }
    assert found["docker.io"] == found["ghcr.io"] == 1
    assert sum(found.values()) == UPSTREAM_CAPACITY + 2


def test_openmetrics_where_the_client_asks_for_it(metrics: Metrics) -> None:
    """A client that accepts OpenMetrics, such as Prometheus, gets OpenMetrics."""
    metrics.seconds.observe(metrics.cells.own, metrics.seconds.cell("ping", "GET"), 0.1)
    body, media_type = render_metrics([CellCollector(metrics)], "application/openmetrics-text;version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    assert any(family.name == "entrepot_http_requests" for family in parse_openmetrics(body.decode()))  # type: ignore[no-untyped-call]
    body, media_type = render_metrics([CellCollector(metrics)], "*/*")
    assert media_type.startswith("text/plain")
    assert b"# EOF" not in body


def test_names_follow_the_conventions(metrics: Metrics) -> None:
    """Metrics have the prefix, counters end with `_total`, units are base units, and the help text is a sentence."""
    for family in metrics.plan.families:
        assert family.name.startswith("entrepot_")
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert family.text.endswith("."), family.name
        assert "repository" not in family.labels


def test_when_the_certificate_expires(metrics: Metrics, tmp_path: Path) -> None:
    """The metric follows the file, so a renewal shows at the next scrape. Without a readable file there is none."""
    authority = CertificateAuthority(tmp_path)
    pair = authority.sign("localhost")  # good for two days
    link = tmp_path / "certificate.pem"

    def days_left() -> list[float]:
        found = {metric.name: metric for metric in process_metrics(metrics, 0.0, link)}
        expiry = found.get("entrepot_certificate_expiry_time_seconds")
        return [] if expiry is None else [(sample.value - time.time()) / 86400 for sample in expiry.samples]

    assert days_left() == []
    link.symlink_to(authority.expired(pair).certificate)
    assert [days < 0 for days in days_left()] == [True]
    link.unlink()
    link.symlink_to(pair.certificate)
    assert [round(days) for days in days_left()] == [2]
