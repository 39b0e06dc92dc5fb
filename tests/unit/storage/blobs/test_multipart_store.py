"""A blob store over multipart objects: the rules of an object store, and behaviour that the contract tests cannot
check."""

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
async def stored(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    content = open_objects(tmp_path / "bucket", MIN_PART_BYTES)
    async with open_registry(tmp_path / "data", open_content=content) as opened:
        yield opened


@pytest.fixture
def bucket(stored: StoredRegistry) -> Bucket:
    assert isinstance(stored.blobs, MultipartBlobStore)
    return stored.blobs.bucket


async def test_parts_have_the_least_size_but_the_last(stored: StoredRegistry, bucket: Bucket) -> None:
    """Every part except the last has at least the smallest allowed size, however small the chunks are that a client
    sends. At the end, only the blob's object stays."""
    writer = await stored.start_upload(APP)
    cuts = [0, 1, 70_000, MIN_PART_BYTES - 1, MIN_PART_BYTES + 5, len(BODY)]
    for start, stop in itertools.pairwise(cuts):
        await writer.write(BODY[start:stop])
        await writer.aclose()
        writer = await stored.resume_upload(APP, writer.id, stop)
    chunks = UploadObjects(bucket, writer.id).chunks()
    assert [chunk.length >= MIN_PART_BYTES for chunk in chunks[:-1]] == [True] * (len(chunks) - 1)
    assert len(chunks) == 2
    await writer.commit(digest_of(BODY))
    await writer.aclose()
    assert [listed.key for listed in bucket.list_objects("")] == [place_of(digest_of(BODY))]
    assert bucket.open_multiparts() == 0
    reader = await stored.open_blob(APP, digest_of(BODY), Span(MIN_PART_BYTES - 3, MIN_PART_BYTES + 3))
    assert b"".join([piece async for piece in reader]) == BODY[MIN_PART_BYTES - 3 : MIN_PART_BYTES + 3]
    await reader.aclose()


async def test_what_a_former_owner_puts_late_does_not_count(stored: StoredRegistry, bucket: Bucket) -> None:
    """A part that the former owner of a session uploads after another request has taken the session over is not in the
    content."""
    writer = await stored.start_upload(APP)
    await writer.write(b"first ")
    await writer.aclose()
    former = UploadObjects(bucket, writer.id, generation=1)
    writer = await stored.resume_upload(APP, writer.id)
    bucket.put(former.key(UploadObjects(bucket, writer.id).chunks()[0]).replace("00006-", "00011-"), b"first wrong")
    with pytest.raises(BlobUploadInvalid):
        former.put_chunk(6, b"wrong")
    await writer.write(b"right")
    await writer.commit(digest_of(b"first right"))
    await writer.aclose()
    assert bucket.read(place_of(digest_of(b"first right"))) == b"first right"


async def test_a_partial_blob_is_copied_into_the_bucket(stored: StoredRegistry, bucket: Bucket, tmp_path: Path) -> None:
    """A mirrored blob is collected in a file, and becomes an object when it is complete."""
    partial = await stored.partials.claim(digest_of(BODY), len(BODY))
    partial.write_at(0, BODY)
    await partial.commit(APP)
    partial.close()
    assert bucket.read(place_of(digest_of(BODY))) == BODY
    assert list((tmp_path / "data" / "partials").iterdir()) == []
    assert (await stored.resolve_blob(APP, digest_of(BODY))).size == len(BODY)


async def test_objects_without_a_row_are_swept(stored: StoredRegistry, bucket: Bucket) -> None:
    """A commit that stops before its row leaves an object. Garbage collection finds the object in the list of the
    bucket."""
    bucket.put(place_of(digest_of(b"stray")), b"stray")
    stored.collector.grace = 0.0
    stored.collector._clock = lambda: 4e9
    assert (await stored.collector.collect()).strays == 1
    assert bucket.list_objects("") == []


def test_the_bucket_keeps_the_rules_of_an_object_store(tmp_path: Path) -> None:
    """The fake bucket refuses a second put of a key, a small part that is not the last, and a read of a missing
    object."""
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


async def test_scrub_quarantines_a_damaged_object(stored: StoredRegistry, bucket: Bucket) -> None:
    """Scrub works over objects as well: it moves a damaged object to the quarantine, and a push stores a new object."""
    writer = await stored.start_upload(APP)
    await writer.write(BODY)
    await writer.commit(digest_of(BODY))
    await writer.aclose()
    place = place_of(digest_of(BODY))
    bucket.delete(place)
    bucket.put(place, BODY[:-1] + bytes([BODY[-1] ^ 1]))
    result, [step] = await scrub(stored)
    assert (result["damaged"], step["digest"]) == (1, digest_of(BODY))
    assert [item.digest for item in await stored.blobs.list_quarantine()] == [digest_of(BODY)]
    with pytest.raises(BlobUnknown):
        await stored.open_blob(APP, digest_of(BODY))
    writer = await stored.start_upload(APP)
    await writer.write(BODY)
    await writer.commit(digest_of(BODY))
    await writer.aclose()
    assert bucket.read(place) == BODY
    assert (await scrub(stored))[0]["damaged"] == 0
    assert await stored.blobs.delete_quarantined(digest_of(BODY))
    assert [listed.key for listed in bucket.list_objects("")] == [place]


async def test_a_push_replaces_a_damaged_object(stored: StoredRegistry, bucket: Bucket) -> None:
    """After a crash that left the damaged object in its place, although the blob was marked as damaged, a push replaces
    the object."""
    writer = await stored.start_upload(APP)
    await writer.write(BODY)
    await writer.commit(digest_of(BODY))
    await writer.aclose()
    place = place_of(digest_of(BODY))
    bucket.delete(place)
    bucket.put(place, BODY[:-1])
    await stored.damage.mark_blob(digest_of(BODY), place, "test", stored.blobs.quarantine_place(digest_of(BODY)))
    writer = await stored.start_upload(APP)
    await writer.write(BODY)
    await writer.commit(digest_of(BODY))
    await writer.aclose()
    assert bucket.read(place) == BODY
    assert (await scrub(stored))[0]["damaged"] == 0
