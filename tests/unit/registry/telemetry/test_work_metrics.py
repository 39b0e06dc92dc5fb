"""The metrics of registry calls, mirrors, the database, webhooks and upkeep."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from registry.asgi import REQUEST_NOTES_EXTENSION
from registry.backend import open_backend
from registry.config import Settings
from registry.events.attempts import DeliveryObserver, DeliveryOutcome
from registry.mirror.observer import UNOBSERVED, MirrorObserver
from registry.mirror.upstream_client import UpstreamContentInvalid
from registry.server.connection.request_reports import RequestEnd
from registry.telemetry.distribution_names import ACTIONS, HANDLERS, distribution_metrics
from registry.telemetry.exposition import CellCollector, render_metrics
from registry.telemetry.metrics import ROUTES, Metrics
from registry.telemetry.mirror_metrics import UpstreamCounts
from registry.telemetry.request_recorder import RequestRecorder
from registry.telemetry.telemetry import Telemetry
from registry.telemetry.work_metrics import JOB_KINDS, OPERATIONS
from registry.upkeep.scrub_job import scrub_arguments
from storage.composition import prepare_data_dir
from storage.errors import (
    BlobUnknown,
    Denied,
    DigestInvalid,
    RegistryError,
    StorageFailed,
    StorageFull,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.interface import Registry
from storage.jobs import JobState
from storage.names import RepositoryName
from storage.upkeep.collection_report import Removal, RemovalKind
from storage.upkeep.job_runner import run_in_command
from storage.upkeep.scrubber import SCRUB_KIND
from tests.fakes.registry_content import push_image


@pytest.fixture
def metrics() -> Metrics:
    metrics = Metrics(["docker.io"], workers=1)
    metrics.start_worker()
    return metrics


def test_each_call_of_the_interface_has_a_series() -> None:
    """Each method of the `Registry` interface has a label value of its own."""
    calls = {name for name, _ in inspect.getmembers(Registry, inspect.isfunction) if name[0] != "_"}
    assert set(OPERATIONS) == {*calls, "other"}
    assert set(ACTIONS) <= calls


async def test_each_kind_of_job_has_a_series(tmp_path: Path) -> None:
    """Each kind of job has a label value of its own."""
    prepare_data_dir(tmp_path)
    async with open_backend(Settings(data=tmp_path)) as backend:
        assert set(JOB_KINDS) == {*backend.upkeep.work_by_kind, "other"}


def test_handlers_of_distribution_are_mapped_to_routes() -> None:
    """Each handler in the metrics of the CNCF Distribution registry is mapped to a different route."""
    assert set(HANDLERS) <= set(ROUTES)
    assert len(set(HANDLERS.values())) == len(HANDLERS)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UpstreamTimeout("x"), "timeout"),
        (UpstreamUnavailable("x"), "unavailable"),
        (UpstreamContentInvalid("x"), "invalid"),
        (TooManyRequests("x", retry_after=1), "rate_limited"),
        (Denied("x"), "denied"),
        (DigestInvalid("x"), "wrong_digest"),
        (StorageFull(), "storage"),
        (BlobUnknown("x"), None),
    ],
)
def test_kinds_of_upstream_errors(metrics: Metrics, error: RegistryError, kind: str | None) -> None:
    """Errors of an upstream are counted by kind. A 404 for missing content is not counted."""
    UpstreamCounts(metrics.mirror, metrics.cells, "docker.io").on_error(error)
    totals, family = metrics.totals(), metrics.mirror.errors
    # The label value "0" is the number of the first upstream.
    assert [values for values, cell in family.series() if totals[cell]] == ([] if kind is None else [("0", kind)])


def test_the_empty_observer_accepts_all_calls() -> None:
    """`UNOBSERVED`, which counts nothing, accepts each call."""
    observer: MirrorObserver = UNOBSERVED
    with observer.trace_request("https://registry.example.com", "team/app"):
        pass
    observer.on_response(1.0)
    observer.on_error(BlobUnknown("x"))
    observer.on_breaker(opened=True)
    observer.on_refused()
    observer.on_fetched("blob", 1)
    observer.on_fill_started()
    observer.on_fill_ended(None, is_abandoned=False)


def test_running_and_ended_fills_are_counted(metrics: Metrics) -> None:
    """A fill is the download of a blob from an upstream into the cache. Running and ended fills are counted. A wrong
    digest or a storage error also counts as an error of the upstream."""
    counts, mirror = UpstreamCounts(metrics.mirror, metrics.cells, "docker.io"), metrics.mirror
    counts.on_fill_started()
    counts.on_fill_started()
    running_fills = mirror.fills_running.cell("0")
    assert metrics.cells.live_totals([running_fills]) == {running_fills: 2}
    counts.on_fill_ended(None, is_abandoned=False)
    counts.on_fill_ended(DigestInvalid("x"), is_abandoned=False)
    for error in (StorageFull(), StorageFailed(), UpstreamTimeout("counted when the request failed")):
        counts.on_fill_started()
        counts.on_fill_ended(error, is_abandoned=False)
    totals = metrics.totals()
    assert totals[mirror.fills_running.cell("0")] == 0
    assert (totals[mirror.fills.cell("0", "stored")], totals[mirror.fills.cell("0", "failed")]) == (1, 4)
    assert totals[mirror.errors.cell("0", "wrong_digest")] == 1
    assert totals[mirror.errors.cell("0", "storage")] == 2
    assert totals[mirror.errors.cell("0", "timeout")] == 0


def test_work_is_counted(metrics: Metrics) -> None:
    """Commits, denials, logins, removals, jobs and retention have their own series."""
    work = metrics.work
    work.on_commit(7, 0.001, 0.002)
    work.on_denied(["pull", "push"])
    work.on_login("password", "throttled")
    work.on_removed(Removal(RemovalKind.BLOB, "", "sha256:0", 11, ""))
    work.on_job_ended("gc", JobState.FAILED)
    work.on_call("get_manifest", 0.01)
    work.on_retention("tag", 3)
    totals = metrics.totals()
    for cell, value in (
        (work.changes.first_cell, 7),
        (work.denials.cell("push"), 1),
        (work.logins.cell("password", "throttled"), 1),
        (work.removed_items.cell("blob"), 1),
        (work.freed_bytes.cell("blob"), 11),
        (work.jobs.cell("gc", "failed"), 1),
        (work.retention_deletions.cell("tag"), 3),
    ):
        assert totals[cell] == value


def test_webhook_deliveries_are_counted() -> None:
    """Deliveries are counted by webhook, also for a webhook that a reload has added."""
    metrics = Metrics([], workers=1, webhooks=["ci"])
    metrics.start_worker()
    observer: DeliveryObserver = metrics.events
    for outcome in (
        DeliveryOutcome.DELIVERED,
        DeliveryOutcome.DELIVERED,
        DeliveryOutcome.REFUSED,
        DeliveryOutcome.DOWN,
    ):
        observer.on_attempt("ci", outcome)
    observer.on_given_up("ci")
    observer.on_attempt("chat", DeliveryOutcome.DELIVERED)
    observer.on_dropped("chat", 3, 2)
    metrics.events.on_unrecorded_pulls(5)
    text = render_metrics([CellCollector(metrics)], "")[0].decode()
    lines = [line for line in text.splitlines() if line.startswith("entrepot_events_")]
    assert lines == [
        'entrepot_events_sent_total{webhook="ci"} 2.0',
        'entrepot_events_sent_total{webhook="chat"} 1.0',
        'entrepot_events_failed_attempts_total{outcome="refused",webhook="ci"} 1.0',
        'entrepot_events_failed_attempts_total{outcome="down",webhook="ci"} 1.0',
        'entrepot_events_given_up_total{webhook="ci"} 1.0',
        'entrepot_events_dropped_total{state="pending",webhook="chat"} 3.0',
        'entrepot_events_dropped_total{state="dead",webhook="chat"} 2.0',
        "entrepot_events_unrecorded_pulls_total 5.0",
    ]


async def test_scrub_counts_the_bytes_that_it_reads(tmp_path: Path) -> None:
    """A scrub checks all content. It counts the bytes of the blobs and manifests that it reads."""
    prepare_data_dir(tmp_path)
    settings = Settings(data=tmp_path)
    telemetry = Telemetry(settings)
    telemetry.start_worker()
    async with open_backend(settings, telemetry=telemetry) as backend:
        store = backend.store
        manifest = await push_image(store, RepositoryName("team/app"), "text", "latest")
        work, arguments = backend.upkeep.work_by_kind[SCRUB_KIND], scrub_arguments(None, keep_going=False)
        result = await run_in_command(store.jobs, store.leases, SCRUB_KIND, arguments, work, actor="test")
    assert isinstance(result, dict)
    assert isinstance(result["bytes"], int)
    scrubbed_bytes = telemetry.metrics.totals()[telemetry.work.scrubbed_bytes.first_cell]
    assert scrubbed_bytes == result["bytes"] + len(manifest.body) > len(manifest.body)


def samples(metrics: Metrics) -> Iterator[tuple[str, dict[str, str], float]]:
    for metric in distribution_metrics(metrics):
        for sample in metric.samples:
            yield sample.name, sample.labels, sample.value


def test_size_histograms_of_distribution(metrics: Metrics) -> None:
    """The size histograms have the same names and buckets as in the CNCF Distribution registry."""
    recorder = RequestRecorder(metrics)
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/", "headers": [], "extensions": {}}
    for sent, kind in ((1024, "blobs"), (3_000_000, "blobs"), (5, "api")):
        request_notes = SimpleNamespace(
            kind=kind, repo="", resource_id="", request_id="", principal_name="", cache_state="", upstream=""
        )
        scope["extensions"] = {REQUEST_NOTES_EXTENSION: {"exchange": request_notes}}
        recorder.on_request_end(scope, RequestEnd(200, 7, sent, 0.1, is_complete=True))
    values = {
        (name.removeprefix("registry_http_"), labels.get("le")): value
        for name, labels, value in samples(metrics)
        if labels.get("handler") == "blob" and "_size_bytes" in name
    }
    assert values["response_size_bytes_bucket", "1024"] == 1
    assert values["response_size_bytes_bucket", str(2 << 20)] == 1
    assert values["response_size_bytes_bucket", str(4 << 20)] == 2
    assert values["response_size_bytes_sum", None] == 3_001_024
    assert (values["request_size_bytes_bucket", "1024"], values["request_size_bytes_sum", None]) == (2, 14)
    bounds = [bound for name, bound in values if name == "request_size_bytes_bucket"]
    assert len(bounds) == 23  # as in the CNCF Distribution registry


def test_proxy_counts_of_distribution(metrics: Metrics) -> None:
    """The metrics with the names of the CNCF Distribution registry count all upstreams together. A request is a hit if
    its content was not fetched."""
    own_cells = metrics.cells.own
    for upstream, cache in (("a", "miss"), ("b", "hit"), ("b", "stale"), ("b", "revalidated")):
        metrics.mirror.count_answer(own_cells, upstream, "blobs", cache, 10)
    metrics.mirror.count_answer(own_cells, "a", "tags", "miss", 10)
    UpstreamCounts(metrics.mirror, metrics.cells, "a").on_fetched("blob", 4)
    values = {name: value for name, labels, value in samples(metrics) if labels.get("type") == "blob"}
    assert values == {
        "registry_proxy_requests_total": 4,
        "registry_proxy_hits_total": 3,
        "registry_proxy_misses_total": 1,
        "registry_proxy_pulled_bytes_total": 4,
        "registry_proxy_pushed_bytes_total": 40,
    }
