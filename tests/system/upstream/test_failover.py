"""Tests of the upstream client while endpoints of an upstream fail: which error it raises, when it uses the next
endpoint, and its circuit breaker. An open circuit breaker means that no requests are sent to an endpoint for a
while."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from registry.telemetry.metrics import Metrics
from registry.telemetry.mirror_metrics import UpstreamCounts
from registry.upstream.breaker import FAILURES_TO_OPEN
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


async def test_refused_connection_is_unavailable(registry: StoredRegistry, upstream: Hub) -> None:
    """A refused connection raises UpstreamUnavailable, and not a timeout."""
    upstream.refuse()
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(UpstreamUnavailable) as raised:
            await source.get_manifest(REPO, TAG)
        assert not isinstance(raised.value, UpstreamTimeout)
        with pytest.raises(UpstreamUnavailable) as raised:
            await fetch(source, "sha256:" + "0" * 64)
        assert not isinstance(raised.value, UpstreamTimeout)


async def test_connect_timeout(registry: StoredRegistry) -> None:
    """If a connection is not established within `connect_timeout`, the client raises UpstreamTimeout."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        host, port = listener.getsockname()
        # These connections fill the accept queue, so the kernel does not answer further connection attempts.
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
            for connection in queued:
                connection.close()


async def _connecting(host: str, port: int) -> socket.socket:
    """Starts to connect, and does not wait for the connection."""
    sock = socket.socket()
    sock.setblocking(False)
    sock.connect_ex((host, port))
    return sock


async def test_names_that_do_not_resolve(registry: StoredRegistry) -> None:
    """The error for a name that does not resolve contains the name."""
    async with upstream_source(registry, "http://absent.invalid") as source:
        with pytest.raises(UpstreamUnavailable, match=r"absent\.invalid"):
            await source.get_manifest(REPO, TAG)
        with pytest.raises(UpstreamUnavailable, match=r"absent\.invalid"):
            await fetch(source, "sha256:" + "0" * 64)


@pytest.mark.parametrize("fault", [{"status": 503}, {"hangup": True, "times": 2}, {"stall": True}, {"status": 500}])
async def test_next_endpoint_is_used_after_a_failure(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path, fault: dict[str, Any]
) -> None:
    """If the first endpoint fails, the client uses the next endpoint. This holds for every kind of request."""
    with hub(tmp_path, UpstreamContent()) as first:
        async with upstream_source(registry, first.url, upstream.url, idle_timeout=2) as source:
            for request in (
                lambda: source.get_manifest(REPO, TAG),
                lambda: source.resolve_manifest(REPO, TAG),
                lambda: source.tags(REPO, None, 5),
                lambda: source.resolve_blob(REPO, Digest(image.layers[0].digest)),
                lambda: fetch(source, image.layers[0].digest),
            ):
                first.fault(on="any", method="", **fault)
                await request()
                first.clear()


async def test_circuit_breaker(registry: StoredRegistry, upstream: Hub) -> None:
    """After several failures in a row, the breaker opens: requests fail at once, and the endpoint gets none for some
    seconds. Then one request (the probe) is sent, and other requests still fail. After a successful probe, all requests
    are sent again."""
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


async def test_closed_client_reports_no_open_breakers(registry: StoredRegistry, upstream: Hub) -> None:
    """After a client is closed, the metric no longer counts its open breakers. Otherwise the metric would include the
    endpoints of clients that a reload of the settings has replaced."""
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


async def test_requests_refused_by_an_open_breaker_count_as_errors(
    registry: StoredRegistry, upstream: Hub, tmp_path: Path
) -> None:
    """Requests that an open breaker refuses count as errors in the metrics. Otherwise the error rate would fall to
    almost zero during an outage. A request that another endpoint serves does not count as an error."""
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


async def test_next_request_is_the_probe_after_a_cancelled_probe(registry: StoredRegistry, upstream: Hub) -> None:
    """If the request that probes an endpoint behind an open breaker is cancelled, the next request becomes the
    probe."""
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


async def test_breaker_closes_when_the_headers_of_the_probe_arrive(
    registry: StoredRegistry, upstream: Hub, image: ImageTree
) -> None:
    """The request that probes an endpoint may be a long download of a blob. As soon as its headers arrive, the breaker
    closes and other requests are sent."""
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
        probe = asyncio.create_task(source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink))
        await upstream.until_async(lambda: sink.next_offset > 0)
        await source.get_manifest(REPO, TAG)
        upstream.release()
        await probe


async def test_simultaneous_failures_do_not_open_the_breaker(registry: StoredRegistry, upstream: Hub) -> None:
    """Eight requests that fail at the same moment do not open the breaker."""
    upstream.fault(on="any", stall=True, times=8, status=503)
    async with upstream_source(registry, upstream.url) as source:
        tasks = [asyncio.create_task(source.get_manifest(REPO, TAG)) for _ in range(8)]
        await upstream.arrival(8)
        upstream.release()
        await asyncio.gather(*tasks, return_exceptions=True)
        await source.get_manifest(REPO, TAG)


async def test_failures_of_one_manifest_do_not_open_the_breaker(registry: StoredRegistry, upstream: Hub) -> None:
    """If the upstream answers every request for one manifest with 500, other manifests can still be requested."""
    upstream.fault(on="manifest", match="bad", status=500, times=None)
    async with upstream_source(registry, upstream.url) as source:
        for _ in range(2 * FAILURES_TO_OPEN):
            with pytest.raises(UpstreamUnavailable):
                await source.get_manifest(REPO, Tag("bad"))
        await source.get_manifest(REPO, TAG)


async def test_failed_endpoint_is_tried_last(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path
) -> None:
    """After an endpoint has failed, the client tries the other endpoints first."""
    content = UpstreamContent()
    content.add(REPO, image, "1")
    with hub(tmp_path, content) as failing:
        async with upstream_source(registry, failing.url, upstream.url) as source:
            failing.fault(on="any", status=503)
            await source.get_manifest(REPO, TAG)
            await source.get_manifest(REPO, TAG)
            assert (failing.count(), upstream.count()) == (1, 2)


@pytest.mark.parametrize("second_status", [404, 401, 403])
@pytest.mark.parametrize("failure", ["answers 503", "refuses connections", "breaker is open"])
async def test_only_the_first_endpoint_can_deny_a_tag(
    registry: StoredRegistry, upstream: Hub, failure: str, second_status: int
) -> None:
    """While the first endpoint fails, a "not found" from the second endpoint raises UpstreamUnavailable for tags and
    lists, because the second endpoint may be incomplete. Once the first endpoint answers again, its "not found" is
    final."""
    body = '{"errors": [{"code": "MANIFEST_UNKNOWN"}]}'
    clock = UpstreamClock()
    async with (
        scripted_server(lambda head: answer(second_status, body)) as second,
        upstream_source(registry, upstream.url, second.url, clock=clock) as source,
    ):
        if failure == "refuses connections":
            upstream.refuse()
        else:
            upstream.fault(on="any", method="", status=503, times=None)
        rounds = FAILURES_TO_OPEN + 1 if failure == "breaker is open" else 1
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
        if failure == "refuses connections":
            upstream.listen()
        clock.now += 61
        with pytest.raises(ManifestUnknown):
            await source.get_manifest(REPO, Tag("absent"))
        assert (await source.tags(REPO, None, 10)).items == ["1", "latest"]
