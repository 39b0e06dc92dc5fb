"""Manifests that are large or refer to many blobs must not delay other requests or use much memory."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.content import OCI_INDEX, OCI_MANIFEST, Actor, Manifest, digest_of
from storage.errors import ManifestUnknown
from storage.manifest_parser import MAX_REFERENCES
from storage.metadata.sqlite.lookups import MAX_ANNOTATIONS_BYTES, REFERRER_PAGE_BYTES
from storage.metadata.sqlite.sqlite_metadata import SqliteMetadata
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.second_connection import second_connection

APP = RepositoryName("team/app")
BY = Actor("somebody")
SUBJECT = Digest("sha256:" + "5" * 64)
CONFIG = {"mediaType": "a/b", "digest": digest_of(b"{}"), "size": 2}


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as opened:
        yield opened


def image(**more: object) -> Manifest:
    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": CONFIG, "layers": [], **more}
    return Manifest.parse(json.dumps(document).encode(), OCI_MANIFEST)


def referrer(number: int, **more: object) -> Manifest:
    subject = {"mediaType": OCI_MANIFEST, "digest": SUBJECT, "size": 1}
    annotations = {"n": str(number), **more.pop("annotations", {})}  # type: ignore[dict-item]
    return image(subject=subject, annotations=annotations, **more)


@pytest.mark.slow
async def test_a_manifest_with_many_references_takes_little_time(registry: StoredRegistry) -> None:
    """A manifest with as many references as allowed is stored and deleted within two seconds of CPU time, so that other
    changes do not wait long. All its blobs are queued for garbage collection."""
    layers = [{"mediaType": "a/b", "digest": f"sha256:{n:064x}", "size": 1} for n in range(MAX_REFERENCES - 1)]
    large, small = image(layers=layers), image()
    cpu_time_before = time.process_time()
    await registry.put_manifest(APP, large, [Tag("large")], by=BY, sparse=True)
    await registry.delete_manifest(APP, large.digest, by=BY)
    assert time.process_time() - cpu_time_before < 2.0
    queued = await registry.metadata.queued_links(time.time() + 1, 2 * MAX_REFERENCES)
    assert len(queued) == MAX_REFERENCES
    await registry.put_manifest(APP, small, by=BY, sparse=True)
    with pytest.raises(ManifestUnknown):
        await registry.get_manifest(APP, Tag("large"))


async def test_blobs_of_other_manifests_are_not_queued_for_collection(registry: StoredRegistry) -> None:
    """When a manifest is deleted, a blob is queued for garbage collection only if no other manifest refers to it."""
    layers = [{"mediaType": "a/b", "digest": f"sha256:{n:064x}", "size": 1} for n in range(2)]
    with_both_layers, with_first_layer = image(layers=layers), image(layers=layers[:1])
    for manifest in (with_both_layers, with_first_layer):
        await registry.put_manifest(APP, manifest, by=BY, sparse=True)
    await registry.delete_manifest(APP, with_both_layers.digest, by=BY)
    queued = await registry.metadata.queued_links(time.time() + 1, 10)
    assert [entry.digest for entry in queued] == [layers[1]["digest"]]


async def test_an_index_may_list_blobs_and_manifests(registry: StoredRegistry) -> None:
    """An index is accepted if it lists a stored blob with an unknown media type and a stored manifest."""
    blob = digest_of(b"layer")
    writer = await registry.start_upload(APP)
    await writer.write(b"layer")
    await writer.commit(blob)
    child = image()
    await registry.put_manifest(APP, child, by=BY, sparse=True)
    entries = [
        {"mediaType": "a/cache", "digest": blob, "size": 5},
        {"mediaType": OCI_MANIFEST, "digest": child.digest, "size": len(child.body)},
    ]
    index = json.dumps({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries}).encode()
    await registry.put_manifest(APP, Manifest.parse(index, OCI_INDEX), by=BY)


async def test_reads_of_the_same_large_manifest_share_its_bytes(registry: StoredRegistry) -> None:
    """If several readers hold the same manifest, read by tag or by digest, its bytes are in memory once."""
    large = image(annotations={"a": "x" * 500_000})
    await registry.put_manifest(APP, large, [Tag("large")], by=BY, sparse=True)
    by_tag = await registry.get_manifest(APP, Tag("large"))
    assert by_tag == large
    assert (await registry.get_manifest(APP, large.digest)).body is by_tag.body


async def test_a_head_request_reads_no_annotations(registry: StoredRegistry) -> None:
    """The descriptor that a HEAD request reads has no annotations and no artifact type, which may be large."""
    large = image(annotations={"a": "x" * 500_000}, artifactType="a/c")
    await registry.put_manifest(APP, large, [Tag("large")], by=BY, sparse=True)
    descriptor = await registry.resolve_manifest(APP, Tag("large"))
    assert (descriptor.digest, descriptor.size, descriptor.media_type) == (large.digest, len(large.body), OCI_MANIFEST)
    assert (descriptor.annotations, descriptor.artifact_type) == (None, None)


async def referrer_pages(registry: StoredRegistry, kind: str | None = None) -> list[list[Digest]]:
    """Returns the referrers of SUBJECT as pages of digests. Checks that no page is too large."""
    pages: list[list[Digest]] = []
    after: str | None = None
    while True:
        page = await registry.referrers(APP, SUBJECT, kind, after, 1000)
        size = sum(len(each.as_json_bytes()) for each in page.items)
        assert size <= REFERRER_PAGE_BYTES + MAX_ANNOTATIONS_BYTES + 1000
        pages.append([each.digest for each in page.items])
        if not page.more:
            return pages
        after = page.items[-1].digest


async def test_pages_of_referrers_are_limited_in_bytes(registry: StoredRegistry) -> None:
    """The annotations and types on a page of referrers are limited in bytes. All pages together have every referrer."""
    stored = [referrer(n, annotations={"a": "é" * 150_000}) for n in range(12)]
    for each in stored:
        await registry.put_manifest(APP, each, by=BY, sparse=True)
    pages = await referrer_pages(registry)
    assert len(pages) > 2
    assert sorted(digest for page in pages for digest in page) == sorted(each.digest for each in stored)


async def test_annotations_that_are_too_large_for_a_list(registry: StoredRegistry) -> None:
    """A referrer whose annotations are too large for a list is listed without annotations."""
    stored = [referrer(1, annotations={"a": "x" * MAX_ANNOTATIONS_BYTES}), referrer(2)]
    for each in stored:
        await registry.put_manifest(APP, each, by=BY, sparse=True)
    listed = (await registry.referrers(APP, SUBJECT, None, None, 10)).items
    annotations = {each.digest: each.annotations for each in listed}
    assert annotations[stored[0].digest] is None
    assert dict(annotations[stored[1].digest] or {}) == {"n": "2"}


@pytest.mark.slow
async def test_long_artifact_types_of_earlier_versions_are_not_listed(tmp_path: Path) -> None:
    """A store of an earlier version may have artifact types of several megabytes. Lists leave out these types, so that
    their size stays limited."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    stored = [referrer(n, artifactType="a/c") for n in range(20)]
    async with open_registry(data) as registry:
        for each in stored:
            await registry.put_manifest(APP, each, by=BY, sparse=True)
    db = second_connection(data / "entrepot.db")
    db.execute("UPDATE manifest SET artifact_type = ?", ("x" * 1_000_000,))
    db.close()
    async with open_registry(data) as registry:
        listed = await registry.referrers(APP, SUBJECT, None, None, 1000)
        assert {each.digest for each in listed.items} == {each.digest for each in stored}
        assert {each.artifact_type for each in listed.items} == {None}
        assert await referrer_pages(registry, "a/c") == [[]]
        assert (await registry.get_manifest(APP, stored[0].digest)).body == stored[0].body


async def test_referrers_of_one_type_are_found_by_an_index(registry: StoredRegistry) -> None:
    """The database has an index for the referrers of one artifact type, so referrers of other types are not read."""
    for number in range(30):
        await registry.put_manifest(APP, referrer(number, artifactType=f"a/{number % 3}"), by=BY, sparse=True)
    assert len((await referrer_pages(registry, "a/1"))[0]) == 10
    assert isinstance(registry.metadata, SqliteMetadata)
    rows = registry.metadata._db.execute(
        "EXPLAIN QUERY PLAN SELECT 1 FROM manifest m WHERE m.repository = 1 AND m.subject = 'x' "
        "AND m.artifact_type = 'y' AND m.digest > 'z' ORDER BY m.digest"
    ).fetchall()
    assert "manifest_subject_type (repository=? AND subject=? AND artifact_type=? AND digest>?)" in str(rows)
