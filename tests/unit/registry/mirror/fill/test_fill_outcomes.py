"""How the metrics count the outcomes of fills."""

from __future__ import annotations

import threading

import pytest

from registry.mirror.fill.slots import PULL_IDLE_SECONDS
from registry.telemetry.metrics import Metrics
from registry.telemetry.mirror_metrics import FILL_OUTCOMES, UpstreamCounts
from storage.content import digest_of
from storage.errors import BlobUnknown, RegistryError
from storage.names import Tag
from tests.fakes.registry_content import read_blob
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.mirror.conftest import BIG, DIGEST, MIB, MIRRORED_REPO, UPSTREAM_REPO, MirrorStore

TAG = Tag("1")
SMALL = b"a first layer"


@pytest.fixture
def metrics(site: MirrorStore) -> Metrics:
    """Metrics that count the fills of the mirrors of `site`."""
    found = Metrics(["docker.io"], workers=1)
    found.start_worker()
    site.observer = UpstreamCounts(found.mirror, found.cells, "docker.io")
    return found


def ended(metrics: Metrics) -> dict[str, float]:
    """Returns how many fills ended, by outcome."""
    totals, fills = metrics.totals(), metrics.mirror.fills
    counts = {outcome: totals[fills.cell("0", outcome)] for outcome in FILL_OUTCOMES}
    return {outcome: count for outcome, count in counts.items() if count}


async def test_a_blob_that_the_upstream_does_not_have(site: MirrorStore, metrics: Metrics) -> None:
    """A fill of a blob that the upstream does not have does not count as a failure."""
    site.far.add_image(UPSTREAM_REPO, SMALL)
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        del site.far.blobs[UPSTREAM_REPO, digest_of(SMALL)]
        with pytest.raises(BlobUnknown):
            await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL))
        assert ended(metrics) == {"unknown": 1}


async def test_corrupt_bytes(site: MirrorStore, metrics: Metrics) -> None:
    """A fill with corrupt bytes counts as a failure, and each repetition counts as one more."""
    site.far.add_image(UPSTREAM_REPO, SMALL)
    site.far.faults.corrupt = {"https://one"}
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        with pytest.raises(RegistryError):
            await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL))
        await wait_until(lambda: not worker.mirror.busy)
        assert set(ended(metrics)) == {"failed"}


async def test_a_prefetch_that_nobody_reads(site: MirrorStore, metrics: Metrics) -> None:
    """A prefetch without readers counts as abandoned once the pull is over."""
    site.configure(prefetch="layers")
    site.far.add_image(UPSTREAM_REPO, SMALL, BIG)
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        gate = site.far.faults.gates[MIB] = threading.Event()
        await read_blob(worker.mirror, MIRRORED_REPO, digest_of(SMALL))
        await wait_until(lambda: site.far.bytes_sent(DIGEST) >= MIB)
        await wait_until(lambda: ended(metrics) == {"stored": 2})  # the config and the first layer
        site.monotonic.now += PULL_IDLE_SECONDS + 1
        gate.set()
        await wait_until(lambda: not worker.mirror.busy)
        assert ended(metrics) == {"stored": 2, "abandoned": 1}


async def test_a_worker_that_stops(site: MirrorStore, metrics: Metrics) -> None:
    """The fills of a worker that stops count as abandoned."""
    site.far.add_image(UPSTREAM_REPO, BIG)
    gate = site.far.faults.gates[MIB] = threading.Event()
    async with site.worker() as worker:
        await worker.mirror.get_manifest(MIRRORED_REPO, TAG)
        reader = await worker.mirror.open_blob(MIRRORED_REPO, DIGEST)
        await wait_until(lambda: site.far.bytes_sent(DIGEST) >= MIB)
        await reader.aclose()
        gate.set()
    assert ended(metrics) == {"abandoned": 1}
