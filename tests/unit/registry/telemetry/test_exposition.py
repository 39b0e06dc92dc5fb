"""Families of metrics (series with the same name and different labels), and the text in which they are exposed to
Prometheus."""

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


def exposed_samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Returns all samples as Prometheus reads them, by name and labels."""
    body, _ = render_metrics([CellCollector(metrics)], "")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics(["docker.io"], workers=1)
    metrics.start_worker()
    return metrics


def test_each_series_has_cells_of_its_own() -> None:
    """The numbers of all series are in cells of shared memory. No two series share a cell."""
    plan = CellPlan()
    families = [
        Counter(plan, "a_total", "A.", {"x": ("1", "2"), "y": ("3", "4", "other")}),
        Histogram(plan, "b", "B.", {"x": ("1", "2")}, bounds=[1, 2]),
        Counter(plan, "c_total", "C."),
    ]
    used_cells = [cell + number for family in families for _, cell in family.series() for number in range(family.width)]
    assert used_cells == list(range(plan.size))
    # The value of each cell is its index, so the first value of a series tells at which cell it starts. The method
    # `nonzero_series` leaves out series of zeros: here none, because only cell 0 is 0.
    totals = [float(number) for number in range(plan.size)]
    for family in families:
        nonzero = [values for values, _ in family.nonzero_series(totals)]
        assert nonzero[-1:] == [values for values, _ in family.series()][-1:]
        assert all(numbers[0] == family.cell(*values) for values, numbers in family.nonzero_series(totals))
        assert [(family.cell(*values), values) for values, _ in family.series()] == [
            (first, values) for values, first in family.series()
        ]


def test_an_unknown_value_counts_as_the_last_one() -> None:
    """A label value that the family does not know counts as the last of its values, such as `other`, so that clients
    cannot create series."""
    family = Counter(CellPlan(), "a_total", "A.", {"method": ("GET", "other")})
    assert family.cell("BREW") == family.cell("other")


def test_only_series_with_counts_are_exposed(metrics: Metrics) -> None:
    """A series is exposed when its value is not 0. A metric without labels is always exposed."""
    metrics.cells.own[metrics.requests.cell("manifests", "GET", "200")] += 3
    samples = exposed_samples(metrics)
    labels = (("method", "GET"), ("route", "manifests"), ("status", "200"))
    assert samples[("entrepot_http_requests_total", labels)] == 3
    assert len([name for name, _ in samples if name == "entrepot_http_requests_total"]) == 1
    assert samples[("entrepot_worker_starts_total", ())] == 1


def test_buckets_are_cumulative(metrics: Metrics) -> None:
    """Each bucket of a histogram counts the values that are less than or equal to its bound. The last bucket counts all
    values."""
    first = metrics.seconds.cell("blobs", "GET")
    for seconds in (0.0, 0.001, 0.002, 0.05, 1000.0):
        metrics.seconds.observe(metrics.cells.own, first, seconds)
    samples = {
        dict(labels).get("le", name.rsplit("_", 1)[1]): value
        for (name, labels), value in exposed_samples(metrics).items()
        if name.startswith("entrepot_http_request_duration_seconds_")
    }
    assert (samples["0.001"], samples["0.0025"], samples["0.05"], samples["600.0"], samples["+Inf"]) == (2, 3, 4, 4, 5)
    assert samples["count"] == 5
    assert samples["sum"] == pytest.approx(1000.053)


def test_upstreams_are_labelled_by_name(metrics: Metrics) -> None:
    """The label of a mirror's metrics is the name of the upstream, also for an upstream that a reload has added. If
    there are more upstreams than fit into the shared memory, the requests of the others count for the last one that
    fits."""
    names = ["docker.io", "ghcr.io", *(f"{number}.example" for number in range(UPSTREAM_CAPACITY))]
    for name in names:
        cell = metrics.mirror.requests.cell(metrics.mirror.upstream_label(name), "blobs", "hit")
        metrics.cells.own[cell] += 1
    samples = {
        dict(labels)["upstream"]: value
        for (name, labels), value in exposed_samples(metrics).items()
        if name == "entrepot_mirror_requests_total"
    }
    *known, last = names[:UPSTREAM_CAPACITY]
    assert samples == {**dict.fromkeys(known, 1), last: 3}


def test_openmetrics_if_the_client_accepts_it(metrics: Metrics) -> None:
    """A client that accepts the OpenMetrics format, such as Prometheus, gets it. Other clients get the text format."""
    metrics.seconds.observe(metrics.cells.own, metrics.seconds.cell("ping", "GET"), 0.1)
    body, media_type = render_metrics([CellCollector(metrics)], "application/openmetrics-text;version=1.0.0")
    assert media_type.startswith("application/openmetrics-text")
    families = parse_openmetrics(body.decode())  # type: ignore[no-untyped-call]
    assert any(family.name == "entrepot_http_requests" for family in families)
    body, media_type = render_metrics([CellCollector(metrics)], "*/*")
    assert media_type.startswith("text/plain")
    assert b"# EOF" not in body


def test_names_follow_the_conventions(metrics: Metrics) -> None:
    """All metrics have the prefix `entrepot_`, only counters end with `_total`, and help texts end with a full stop. No
    metric has a label for repositories."""
    for family in metrics.plan.families:
        assert family.name.startswith("entrepot_")
        assert family.name.endswith("_total") == (family.kind == "counter"), family.name
        assert family.help_text.endswith("."), family.name
        assert "repository" not in family.labels


def test_expiry_time_of_the_certificate(metrics: Metrics, tmp_path: Path) -> None:
    """The certificate file is read at each scrape, so the metric is right after a renewal. If the file cannot be read,
    the metric is not exposed."""
    authority = CertificateAuthority(tmp_path)
    pair = authority.sign("localhost")  # valid for two days
    certificate_link = tmp_path / "certificate.pem"

    def days_left() -> list[float]:
        metrics_by_name = {metric.name: metric for metric in process_metrics(metrics, 0.0, certificate_link)}
        expiry = metrics_by_name.get("entrepot_certificate_expiry_time_seconds")
        return [] if expiry is None else [(sample.value - time.time()) / 86400 for sample in expiry.samples]

    assert days_left() == []
    certificate_link.symlink_to(authority.expired(pair).certificate)
    assert [days < 0 for days in days_left()] == [True]
    certificate_link.unlink()
    certificate_link.symlink_to(pair.certificate)
    assert [round(days) for days in days_left()] == [2]
