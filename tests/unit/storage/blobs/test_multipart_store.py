"""A blob store that keeps blobs as objects in a bucket and uploads them in parts (multipart uploads). These tests check
what the contract tests of all blob stores do not check."""

from __future__ import annotations

import itertools
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.content import Span, digest_of
from storage.errors import BlobUnknown, BlobUploadInvalid
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.object_store.bucket import MIN_PART_BYTES, Bucket, EntityTooSmall, NoSuchKey, PreconditionFailed
from tests.fakes.object_store.multipart_blob_store import MultipartBlobStore, open_objects, place_of
from tests.fakes.object_store.upload_objects import UploadObjects
from tests.fakes.scrub_runs import scrub

APP = RepositoryName("team/app")
BODY = random.Random(5).randbytes(2 * MIN_PART_BYTES + 12_345)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    content = open_objects(tmp_path / "bucket", MIN_PART_BYTES)
    async with open_registry(tmp_path / "data", open_content=content) as opened:
        yield opened


@pytest.fixture
def bucket(store: StoredRegistry) -> Bucket:
    assert isinstance(store.blobs, MultipartBlobStore)
    return store.blobs.bucket


async def test_every_part_except_the_last_has_the_minimum_size(store: StoredRegistry, bucket: Bucket) -> None:
    """Every part except the last has at least the minimum size of the object store, even if the client sends small
    chunks. After the commit, the blob's object is the only object in the bucket."""
    writer = await store.start_upload(APP)
    chunk_starts = [0, 1, 70_000, MIN_PART_BYTES - 1, MIN_PART_BYTES + 5, len(BODY)]
    for start, stop in itertools.pairwise(chunk_starts):
        await writer.write(BODY[start:stop])
        await writer.aclose()
        writer = await store.resume_upload(APP, writer.id, stop)
    chunks = UploadObjects(bucket, writer.id).chunks()
    assert [chunk.length >= MIN_PART_BYTES for chunk in chunks[:-1]] == [True] * (len(chunks) - 1)
    assert len(chunks) == 2
    await writer.commit(digest_of(BODY))
    await writer.aclose()
    assert [listed.key for listed in bucket.list_objects("")] == [place_of(digest_of(BODY))]
    assert bucket.open_multiparts() == 0
    reader = await store.open_blob(APP, digest_of(BODY), Span(MIN_PART_BYTES - 3, MIN_PART_BYTES + 3))
    assert b"".join([piece async for piece in reader]) == BODY[MIN_PART_BYTES - 3 : MIN_PART_BYTES + 3]
    await reader.aclose()


async def test_late_part_of_a_former_owner_is_ignored(store: StoredRegistry, bucket: Bucket) -> None:
    """A second request resumes an upload session, so the first request no longer owns it. If the first request uploads
    a part after that, this part does not become part of the blob."""
    writer = await store.start_upload(APP)
    await writer.write(b"first ")
    await writer.aclose()
    former_owner = UploadObjects(bucket, writer.id, generation=1)
    writer = await store.resume_upload(APP, writer.id)
    # A chunk at the same offset, whose key says that it has 11 bytes instead of 6.
    bucket.put(
        former_owner.key(UploadObjects(bucket, writer.id).chunks()[0]).replace("00006-", "00011-"), b"first wrong"
    )
    with pytest.raises(BlobUploadInvalid):
        former_owner.put_chunk(6, b"wrong")
    await writer.write(b"right")
    await writer.commit(digest_of(b"first right"))
    await writer.aclose()
    assert bucket.read(place_of(digest_of(b"first right"))) == b"first right"


@pytest.mark.slow
async def test_a_partial_blob_is_copied_into_the_bucket(store: StoredRegistry, bucket: Bucket, tmp_path: Path) -> None:
    """The bytes of a mirrored blob are written to a local file. When the blob is complete, it is copied into the
    bucket."""
    partial = await store.partials.claim(digest_of(BODY), len(BODY))
    partial.write_at(0, BODY)
    await partial.commit(APP)
    partial.close()
    assert bucket.read(place_of(digest_of(BODY))) == BODY
    assert list((tmp_path / "data" / "partials").iterdir()) == []
    assert (await store.resolve_blob(APP, digest_of(BODY))).size == len(BODY)


async def test_collection_deletes_objects_without_a_row(store: StoredRegistry, bucket: Bucket) -> None:
    """If a push is interrupted before its row is in the database, its object stays in the bucket. Garbage collection
    finds such an object in the list of the bucket, and deletes it."""
    bucket.put(place_of(digest_of(b"stray")), b"stray")
    store.collector.grace = 0.0
    store.collector._clock = lambda: 4e9
    assert (await store.collector.collect()).strays == 1
    assert bucket.list_objects("") == []


def test_fake_bucket_follows_the_rules_of_an_object_store(tmp_path: Path) -> None:
    """The fake bucket refuses to put a key that exists, a part below the minimum size that is not the last one, and a
    read of a missing object."""
    bucket = Bucket(tmp_path, min_part_bytes=4)
    bucket.put("a", b"abc")
    with pytest.raises(PreconditionFailed):
        bucket.put("a", b"other")
    multipart = bucket.create_multipart("b")
    tags = [bucket.copy_part(multipart, number, "a") for number in (1, 2)]
    with pytest.raises(EntityTooSmall):
        bucket.complete_multipart(multipart, "b", tags)
    bucket.complete_multipart(multipart, "b", tags[:1])
    assert bucket.read("b", 1, 1) == b"b"
    with pytest.raises(NoSuchKey):
        bucket.read("c")


@pytest.mark.slow
async def test_scrub_quarantines_a_damaged_object(store: StoredRegistry, bucket: Bucket) -> None:
    """A scrub reads all blobs and checks their digests. It moves a damaged object to the quarantine. After that, a push
    of the same blob stores a new object."""
    writer = await store.start_upload(APP)
    await writer.write(BODY)
    await writer.commit(digest_of(BODY))
    await writer.aclose()
    place = place_of(digest_of(BODY))
    bucket.delete(place)
    bucket.put(place, BODY[:-1] + bytes([BODY[-1] ^ 1]))
    result, [step] = await scrub(store)
    assert (result["damaged"], step["digest"]) == (1, digest_of(BODY))
    assert [item.digest for item in await store.blobs.list_quarantine()] == [digest_of(BODY)]
    with pytest.raises(BlobUnknown):
        await store.open_blob(APP, digest_of(BODY))
    writer = await store.start_upload(APP)
    await writer.write(BODY)
    await writer.commit(digest_of(BODY))
    await writer.aclose()
    assert bucket.read(place) == BODY
    assert (await scrub(store))[0]["damaged"] == 0
    assert await store.blobs.delete_quarantined(digest_of(BODY))
    assert [listed.key for listed in bucket.list_objects("")] == [place]


@pytest.mark.slow
async def test_a_push_replaces_a_damaged_object(store: StoredRegistry, bucket: Bucket) -> None:
    """A crash may leave a damaged object in its place after the blob was marked as damaged. A push of the same blob
    replaces this object."""
    writer = await store.start_upload(APP)
    await writer.write(BODY)
    await writer.commit(digest_of(BODY))
    await writer.aclose()
    place = place_of(digest_of(BODY))
    bucket.delete(place)
    bucket.put(place, BODY[:-1])
    await store.damage.mark_blob_damaged(digest_of(BODY), place, "test", store.blobs.quarantine_place(digest_of(BODY)))
    writer = await store.start_upload(APP)
    await writer.write(BODY)
    await writer.commit(digest_of(BODY))
    await writer.aclose()
    assert bucket.read(place) == BODY
    assert (await scrub(store))[0]["damaged"] == 0
