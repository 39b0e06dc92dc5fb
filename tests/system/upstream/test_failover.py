"""Upstreams that fail: the error reported, the next endpoint asked, and the circuit breaker."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from registry.telemetry.metrics import Metrics
from registry.telemetry.mirror_metrics import UpstreamCounts
from registry.upstream.endpoints import FAILURES_TO_OPEN
from storage.content import Span
from storage.errors import ManifestUnknown, UpstreamTimeout, UpstreamUnavailable
from storage.names import Digest, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.upstream_content import ImageTree, UpstreamContent
from tests.fakes.upstream_source import (
    REPO,
    TAG,
    CollectingSink,
    UpstreamClock,
    answer,
    fetch,
    scripted_server,
    upstream_source,
)


async def test_nobody_listens(registry: StoredRegistry, upstream: Hub) -> None:
    """A refused connection is reported at once."""
    upstream.refuse()
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(UpstreamUnavailable) as raised:
            await source.get_manifest(REPO, TAG)
        assert not isinstance(raised.value, UpstreamTimeout)
        with pytest.raises(UpstreamUnavailable) as raised:
            await fetch(source, "sha256:" + "0" * 64)
        assert not isinstance(raised.value, UpstreamTimeout)


async def test_connections_that_do_not_come_about(registry: StoredRegistry) -> None:
    """A connection that is not established is a timeout after connect_timeout."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        host, port = full.getsockname()
        # A connection beyond what the queue holds waits for a response that never comes.
        queued = [await _connecting(host, port) for _ in range(4)]
        try:
            async with upstream_source(
                registry, f"http://{host}:{port}", connect_timeout=0.3, idle_timeout=0.3
            ) as source:
                with pytest.raises(UpstreamTimeout):
                    await source.get_manifest(REPO, TAG)
                with pytest.raises(UpstreamTimeout):
                    await fetch(source, "sha256:" + "0" * 64)
        finally:
            for each in queued:
                each.close()


async def _connecting(host: str, port: int) -> socket.socket:
    made = socket.socket()
    made.setblocking(False)
    made.connect_ex((host, port))
    return made


async def test_names_that_do_not_resolve(registry: StoredRegistry) -> None:
    """The error for a name that does not resolve contains the name."""
    async with upstream_source(registry, "http://absent.invalid") as source:
        with pytest.raises(UpstreamUnavailable, match=r"absent\.invalid"):
            await source.get_manifest(REPO, TAG)
        with pytest.raises(UpstreamUnavailable, match=r"absent\.invalid"):
            await fetch(source, "sha256:" + "0" * 64)


@pytest.mark.parametrize("fault", [{"status": 503}, {"hangup": True, "times": 2}, {"stall": True}, {"status": 500}])
async def test_the_next_endpoint_is_asked(
    registry: StoredRegistry, upstream: Hub, held: ImageTree, tmp_path: Path, fault: dict[str, Any]
) -> None:
    """When the first endpoint fails, the next is asked, for every kind of request."""
    with hub(tmp_path, UpstreamContent()) as first:
        async with upstream_source(registry, first.url, upstream.url, idle_timeout=2) as source:
            for request in (
                lambda: source.get_manifest(REPO, TAG),
                lambda: source.resolve_manifest(REPO, TAG),
                lambda: source.tags(REPO, None, 5),
                lambda: source.resolve_blob(REPO, Digest(held.layers[0].digest)),
                lambda: fetch(source, held.layers[0].digest),
            ):
                first.fault(on="any", method="", **fault)
                await request()
                first.clear()


async def test_the_breaker(registry: StoredRegistry, upstream: Hub) -> None:
    """After failures in a row the endpoint is not asked for a moment. Then one request tries it, and the others wait
    for its result."""
    clock = UpstreamClock()
    upstream.fault(on="any", status=503, times=None)
    async with upstream_source(registry, upstream.url, clock=clock) as source:
        for _ in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable, match="answers 503"):
                await source.get_manifest(REPO, TAG)
        upstream.forget()
        with pytest.raises(UpstreamUnavailable, match="did not answer lately"):
            await source.get_manifest(REPO, TAG)
        with pytest.raises(UpstreamUnavailable, match="did not answer lately"):
            await fetch(source, "sha256:" + "0" * 64)
        assert upstream.count() == 0
        clock.now += 5
        with pytest.raises(UpstreamUnavailable, match="answers 503"):
            await source.get_manifest(REPO, TAG)
        clock.now += 5
        with pytest.raises(UpstreamUnavailable, match="did not answer lately"):
            await source.get_manifest(REPO, TAG)
        clock.now += 5.1
        upstream.clear()
        upstream.fault(on="manifest", stall=True)
        probe = asyncio.create_task(source.get_manifest(REPO, TAG))
        await upstream.arrival(2, "manifest")
        with pytest.raises(UpstreamUnavailable, match="did not answer lately"):
            await source.get_manifest(REPO, TAG)
        upstream.release()
        await probe
        await source.get_manifest(REPO, TAG)


async def test_a_closed_client_has_no_open_breakers(registry: StoredRegistry, upstream: Hub) -> None:
    """A closed client counts no open breakers. Otherwise the metric would count the endpoints of a client that a reload
    has replaced."""
    clock, metrics = UpstreamClock(), Metrics(["far.test"], workers=1)
    metrics.start_worker()
    counts = UpstreamCounts(metrics.mirror, metrics.cells, "far.test")
    open_breakers = metrics.mirror.open_breakers.cell("0")
    upstream.fault(on="any", status=503, times=None)
    async with upstream_source(registry, upstream.url, clock=clock, observer=counts) as source:
        for _ in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable, match="answers 503"):
                await source.get_manifest(REPO, TAG)
        assert metrics.cells.totals()[open_breakers] == 1
        await source.aclose()
        assert metrics.cells.totals()[open_breakers] == 0
    assert metrics.cells.totals()[open_breakers] == 0  # after the second `aclose`


async def test_what_an_open_breaker_refuses_is_counted(registry: StoredRegistry, upstream: Hub, tmp_path: Path) -> None:
    """Requests that an open breaker refuses count as errors. Otherwise the rate of errors would fall to almost nothing
    during an outage. A request that another endpoint serves is no error."""
    clock, metrics = UpstreamClock(), Metrics(["far.test"], workers=1)
    metrics.start_worker()
    counts = UpstreamCounts(metrics.mirror, metrics.cells, "far.test")
    refused = metrics.mirror.errors.cell("0", "breaker_open")
    with hub(tmp_path, UpstreamContent()) as first:
        first.fault(on="any", status=503, times=None)
        async with upstream_source(registry, first.url, upstream.url, clock=clock, observer=counts) as source:
            for _ in range(FAILURES_TO_OPEN + 1):
                clock.now += 0.1
                await source.get_manifest(REPO, TAG)
            assert metrics.cells.totals()[refused] == 0
            upstream.fault(on="any", status=503, times=None)
            for _ in range(FAILURES_TO_OPEN):
                clock.now += 0.1
                with pytest.raises(UpstreamUnavailable, match="answers 503"):
                    await source.get_manifest(REPO, TAG)
            assert metrics.cells.totals()[refused] == 0
            for _ in range(2):
                with pytest.raises(UpstreamUnavailable, match="did not answer lately"):
                    await source.get_manifest(REPO, TAG)
            assert metrics.cells.totals()[refused] == 2


async def test_a_probe_that_is_cancelled(registry: StoredRegistry, upstream: Hub) -> None:
    """If the request that tries the endpoint is cancelled, the next one tries it."""
    clock = UpstreamClock()
    upstream.fault(on="any", status=503, times=FAILURES_TO_OPEN)
    async with upstream_source(registry, upstream.url, clock=clock) as source:
        for _ in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable):
                await source.get_manifest(REPO, TAG)
        clock.now += 6
        upstream.fault(on="manifest", stall=True)
        probe = asyncio.create_task(source.get_manifest(REPO, TAG))
        await upstream.arrival(FAILURES_TO_OPEN + 1, "manifest")
        probe.cancel()
        with pytest.raises(asyncio.CancelledError):
            await probe
        await source.get_manifest(REPO, TAG)


async def test_a_probe_that_takes_long(registry: StoredRegistry, upstream: Hub, held: ImageTree) -> None:
    """The request that tries an endpoint may be for a blob. Once its headers arrive, other requests are let through,
    and later failures are counted from zero."""
    clock = UpstreamClock()
    upstream.fault(on="any", status=503, times=FAILURES_TO_OPEN)
    async with upstream_source(registry, upstream.url, clock=clock) as source:
        for _ in range(FAILURES_TO_OPEN):
            clock.now += 0.1
            with pytest.raises(UpstreamUnavailable):
                await source.get_manifest(REPO, TAG)
        clock.now += 6
        upstream.fault(stall_after=100_000)
        sink = CollectingSink()
        probe = asyncio.create_task(source.fetch_blob(REPO, Digest(held.layers[1].digest), Span(0), sink))
        await upstream.until_async(lambda: sink.at > 0)
        await source.get_manifest(REPO, TAG)
        upstream.release()
        await probe


async def test_many_failures_at_once_are_one(registry: StoredRegistry, upstream: Hub) -> None:
    """Eight connections that break together do not open the breaker."""
    upstream.fault(on="any", stall=True, times=8, status=503)
    async with upstream_source(registry, upstream.url) as source:
        tasks = [asyncio.create_task(source.get_manifest(REPO, TAG)) for _ in range(8)]
        await upstream.arrival(8)
        upstream.release()
        await asyncio.gather(*tasks, return_exceptions=True)
        await source.get_manifest(REPO, TAG)


async def test_one_bad_thing_is_no_bad_endpoint(registry: StoredRegistry, upstream: Hub) -> None:
    """A manifest that always gets 500, or a blob that breaks off, does not stop other requests."""
    upstream.fault(on="manifest", match="bad", status=500, times=None)
    async with upstream_source(registry, upstream.url) as source:
        for _ in range(2 * FAILURES_TO_OPEN):
            with pytest.raises(UpstreamUnavailable):
                await source.get_manifest(REPO, Tag("bad"))
        await source.get_manifest(REPO, TAG)


async def test_the_one_that_failed_comes_later(
    registry: StoredRegistry, upstream: Hub, held: ImageTree, tmp_path: Path
) -> None:
    """After a failure, the other endpoints are asked first."""
    content = UpstreamContent()
    content.add(REPO, held, "1")
    with hub(tmp_path, content) as first:
        async with upstream_source(registry, first.url, upstream.url) as source:
            first.fault(on="any", status=503)
            await source.get_manifest(REPO, TAG)
            await source.get_manifest(REPO, TAG)
            assert (first.count(), upstream.count()) == (1, 2)


@pytest.mark.parametrize("says", [404, 401, 403])
@pytest.mark.parametrize("trouble", ["ill", "gone", "left alone"])
async def test_only_the_first_says_what_tags_there_are(
    registry: StoredRegistry, upstream: Hub, trouble: str, says: int
) -> None:
    """While the first endpoint fails, "not found" from another endpoint is not believed for content without a digest.
    Once the first endpoint answers, its "not found" counts."""
    body = '{"errors": [{"code": "MANIFEST_UNKNOWN"}]}'
    clock = UpstreamClock()
    async with (
        scripted_server(lambda head: answer(says, body)) as second,
        upstream_source(registry, upstream.url, second.url, clock=clock) as source,
    ):
        if trouble == "gone":
            upstream.refuse()
        else:
            upstream.fault(on="any", method="", status=503, times=None)
        rounds = FAILURES_TO_OPEN + 1 if trouble == "left alone" else 1
        for _ in range(rounds):
            for request in (source.get_manifest(REPO, TAG), source.resolve_manifest(REPO, TAG)):
                clock.now += 0.1
                with pytest.raises(UpstreamUnavailable):
                    await request
        with pytest.raises(UpstreamUnavailable):
            await source.tags(REPO, None, 10)
        with pytest.raises(UpstreamUnavailable):
            await source.referrers(REPO, Digest("sha256:" + "0" * 64), None, None, 10)
        upstream.clear()
        if trouble == "gone":
            upstream.listen()
        clock.now += 61
        with pytest.raises(ManifestUnknown):
            await source.get_manifest(REPO, Tag("absent"))
        assert (await source.tags(REPO, None, 10)).items == ["1", "latest"]
