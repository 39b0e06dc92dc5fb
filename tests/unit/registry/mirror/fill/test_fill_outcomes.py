"""How the metrics count the outcomes of fills. A fill is the download of a blob from an upstream into the cache."""

from __future__ import annotations

import threading

import pytest

from registry.mirror.fill.demand import PULL_IDLE_SECONDS
from registry.telemetry.metrics import Metrics
from registry.telemetry.mirror_metrics import FILL_OUTCOMES, UpstreamCounts
from storage.content import digest_of
from storage.errors import BlobUnknown, RegistryError
from storage.names import Tag
from tests.fakes.registry_content import read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import BIG, DIGEST, MIB, MIRRORED_REPO, UPSTREAM_REPO, MirrorSite

TAG = Tag("1")
SMALL = b"a first layer"


@pytest.fixture
def metrics(site: MirrorSite) -> Metrics:
    """Metrics that count the fills of the mirrors of `site`."""
    mirror_metrics = Metrics(["docker.io"], workers=1)
    mirror_metrics.start_worker()
    site.observer = UpstreamCounts(mirror_metrics.mirror, mirror_metrics.cells, "docker.io")
    return mirror_metrics


def fills_by_outcome(metrics: Metrics) -> dict[str, float]:
    """Returns how many fills have ended, by outcome."""
    totals, fills = metrics.totals(), metrics.mirror.fills
    counts = {outcome: totals[fills.cell("0", outcome)] for outcome in FILL_OUTCOMES}
    return {outcome: count for outcome, count in counts.items() if count}


async def test_a_blob_that_the_upstream_does_not_have(site: MirrorSite, metrics: Metrics) -> None:
    """A fill of a blob that the upstream does not have counts as "unknown", not as a failure."""
    site.upstream.add_image(UPSTREAM_REPO, SMALL)
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        del site.upstream.blobs[UPSTREAM_REPO, digest_of(SMALL)]
        with pytest.raises(BlobUnknown):
            await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL))
        assert fills_by_outcome(metrics) == {"unknown": 1}


async def test_corrupt_bytes(site: MirrorSite, metrics: Metrics) -> None:
    """Each fill that receives corrupt bytes counts as a failure. So does a fill that then finds only paused
    endpoints."""
    site.upstream.add_image(UPSTREAM_REPO, SMALL)
    site.upstream.faults.corrupt = {"https://one"}
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        with pytest.raises(RegistryError):
            await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL))
        await wait_until(lambda: not worker.mirror.is_busy)
        # The fill is repeated once. A third one ends without a request, because the endpoint is then paused.
        assert site.upstream.calls["get blob"] == 2
        assert fills_by_outcome(metrics) == {"failed": 3}


async def test_a_prefetch_that_nobody_reads(site: MirrorSite, metrics: Metrics) -> None:
    """A prefetch is a fill that starts before a client requests the blob. If no client reads the blob until the pull of
    the image is over, the fill counts as abandoned."""
    site.configure(prefetch="layers")
    site.upstream.add_image(UPSTREAM_REPO, SMALL, BIG)
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        gate = site.upstream.faults.gates[MIB] = threading.Event()
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL))
        await wait_until(lambda: site.upstream.bytes_sent(DIGEST) >= MIB)
        await wait_until(lambda: fills_by_outcome(metrics) == {"stored": 2})  # the config and the first layer
        site.monotonic.now += PULL_IDLE_SECONDS + 1
        gate.set()
        await wait_until(lambda: not worker.mirror.is_busy)
        assert fills_by_outcome(metrics) == {"stored": 2, "abandoned": 1}


async def test_a_worker_that_stops(site: MirrorSite, metrics: Metrics) -> None:
    """The fills of a worker that stops count as abandoned."""
    site.upstream.add_image(UPSTREAM_REPO, BIG)
    gate = site.upstream.faults.gates[MIB] = threading.Event()
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
        await wait_until(lambda: site.upstream.bytes_sent(DIGEST) >= MIB)
        await reader.aclose()
        gate.set()
    assert fills_by_outcome(metrics) == {"abandoned": 1}
