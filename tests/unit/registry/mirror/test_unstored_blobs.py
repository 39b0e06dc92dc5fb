"""Blobs that a mirror sends to its clients without storing them, because the disk is too full."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from storage.composition import prepare_data_dir
from storage.content import Descriptor, Span
from storage.errors import DigestInvalid, UpstreamUnavailable
from storage.names import Tag
from tests.fakes.mirror_source import FakeSource
from tests.fakes.registry_content import image_of, read_blob
from tests.unit.registry.mirror.conftest import (
    BIG,
    DIGEST,
    MIB,
    MIRRORED_REPO,
    UPSTREAM_REPO,
    MirrorSite,
    MirrorWorker,
    begin_pull,
)

LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"


@pytest.fixture
async def full_worker(site: MirrorSite) -> AsyncIterator[MirrorWorker]:
    """A worker of a mirror that can store no blobs. Its upstream has two endpoints."""
    site.upstream = FakeSource(endpoints=("https://one", "https://two"))
    site.disk.refuses_blobs = True
    async with site.worker() as worker:
        yield worker


@pytest.mark.parametrize("can_store_records", [True, False])
@pytest.mark.slow
async def test_endpoint_that_sent_corrupt_bytes_is_asked_last(
    site: MirrorSite, full_worker: MirrorWorker, can_store_records: bool
) -> None:
    """After an endpoint has sent corrupt bytes to a client, the next client gets the bytes of another endpoint. This
    holds also if the disk is too full to store the record of the corrupt bytes."""
    await begin_pull(site, full_worker)
    site.upstream.faults.corrupt = {"https://one"}
    site.disk.full = not can_store_records
    with pytest.raises(DigestInvalid):
        await read_blob(full_worker.mirror, MIRRORED_REPO, DIGEST)
    for _ in range(2):
        assert await read_blob(full_worker.mirror, MIRRORED_REPO, DIGEST) == BIG


@pytest.mark.parametrize("is_full", [True, False])
async def test_empty_blob_with_the_digest_of_other_bytes(
    site: MirrorSite, full_worker: MirrorWorker, is_full: bool
) -> None:
    """A manifest states size 0 for a digest, although the digest is not that of the empty blob. The upstream sends no
    bytes. The client gets an error instead of an empty blob, whether or not the mirror can store blobs."""
    site.disk.refuses_blobs = is_full
    config = site.upstream.add_blob(UPSTREAM_REPO, b"{}")
    site.upstream.blobs[UPSTREAM_REPO, DIGEST] = b""
    site.upstream.add_manifest(UPSTREAM_REPO, image_of(config, [Descriptor(LAYER_TYPE, DIGEST, 0)]), Tag("1"))
    await full_worker.mirror.get_manifest(MIRRORED_REPO, Tag("1"))
    with pytest.raises(UpstreamUnavailable):
        await full_worker.mirror.open_blob(MIRRORED_REPO, DIGEST)


async def test_a_range_draws_only_its_own_bytes(site: MirrorSite, full_worker: MirrorWorker) -> None:
    """For a range without the last byte of the blob, the upstream sends only the bytes of the range. A
    range with the last byte needs the whole blob, because that byte is sent only after the digest is verified."""
    await begin_pull(site, full_worker)
    data = await read_blob(full_worker.mirror, MIRRORED_REPO, DIGEST, Span(MIB, MIB + 5))
    assert data == BIG[MIB : MIB + 5]
    assert site.upstream.sent[DIGEST] == [(MIB, MIB + 5)]


async def test_blobs_are_passed_on_if_the_data_directory_was_replaced(site: MirrorSite, worker: MirrorWorker) -> None:
    """If the data directory was moved away or replaced while the mirror ran, the mirror stores nothing, and clients get
    blobs directly from the upstream."""
    await begin_pull(site, worker)
    site.data.rename(site.data.with_name("old"))
    prepare_data_dir(site.data)
    assert await read_blob(worker.mirror, MIRRORED_REPO, DIGEST) == BIG
    assert not any(path.is_file() for folder in ("partials", "blobs") for path in (site.data / folder).rglob("*"))
