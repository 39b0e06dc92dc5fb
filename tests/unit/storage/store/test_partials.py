"""Partial blobs within one process. A *partial blob* is a file with the bytes of a mirror's download that have arrived.
Its *owner* writes the bytes and commits the blob; others read the bytes."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from storage.blobs.files.partial_state_format import MAX_STORED_EXTENTS, PartialProgress, decode_progress
from storage.composition import open_registry
from storage.content import digest_of
from storage.errors import BlobUnknown, DigestInvalid, PartialBlobLost, QuotaExceeded, StorageFailed
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.usage import ScopeDefinition
from tests.fakes.partial_peer import UBUNTU
from tests.system.crash.workload import files_below, read
from tests.unit.storage.store.conftest import BODY, DIGEST, PIECE_BYTES, SIZE, read_bytes, write_missing


async def test_pieces_written_in_any_order_become_a_blob(registry: StoredRegistry, data: Path) -> None:
    """Four threads write the pieces of a blob in any order, and one piece twice. After the commit, the blob has the
    right bytes, and no file of the partial blob stays."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    assert partial.is_owner
    assert partial.missing() == [(0, SIZE)]
    starts = [*range(0, SIZE, PIECE_BYTES), 0]
    random.Random(2).shuffle(starts)

    def write(piece_starts: list[int]) -> None:
        for start in piece_starts:
            partial.write_at(start, memoryview(BODY)[start : start + PIECE_BYTES])

    await asyncio.gather(*(asyncio.to_thread(write, starts[number::4]) for number in range(4)))
    assert partial.missing() == []
    assert (await partial.commit(UBUNTU)).size == SIZE
    assert await read(registry, UBUNTU, DIGEST) == BODY
    assert read_bytes(partial, 0, SIZE) == BODY, "the partial blob stays open"
    assert await partial.wait(0) == await partial.wait(SIZE) == SIZE
    assert not partial.is_owner
    assert files_below(data / "partials") == []
    partial.close()
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(RepositoryName("docker.io/library/other"), DIGEST)


async def test_an_empty_blob(registry: StoredRegistry) -> None:
    """An empty partial blob has no missing bytes and can be committed."""
    partial = await registry.partials.claim(digest_of(b""), 0)
    assert partial.missing() == []
    await partial.commit(UBUNTU)
    assert await partial.wait(0) == 0
    partial.close()
    assert await read(registry, UBUNTU, digest_of(b"")) == b""


async def test_readers_wait_for_bytes_without_a_gap(registry: StoredRegistry) -> None:
    """`wait` returns the offset up to which a reader can read from its position without a gap. This is the end of the
    blob only after the digest was checked."""
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    assert not reader.is_owner
    assert not reader.take_ownership()
    first = asyncio.create_task(reader.wait(0))
    middle = asyncio.create_task(reader.wait(2 * PIECE_BYTES + 5))
    end = asyncio.create_task(reader.wait(SIZE))
    await asyncio.to_thread(owner.write_at, PIECE_BYTES, BODY[PIECE_BYTES : 2 * PIECE_BYTES])
    await asyncio.to_thread(owner.write_at, 2 * PIECE_BYTES, BODY[2 * PIECE_BYTES : 3 * PIECE_BYTES])
    assert await middle == 3 * PIECE_BYTES
    assert not first.done()
    await asyncio.to_thread(owner.write_at, 0, BODY[:PIECE_BYTES])
    assert await first in (PIECE_BYTES, 3 * PIECE_BYTES)
    assert await reader.wait(0) == 3 * PIECE_BYTES
    assert read_bytes(reader, 0, 3 * PIECE_BYTES) == BODY[: 3 * PIECE_BYTES]
    await write_missing(owner)
    assert await reader.wait(3 * PIECE_BYTES) == SIZE
    assert not end.done(), "the end is not readable before the digest is checked"
    await owner.commit(UBUNTU)
    assert await end == SIZE
    owner.close()
    assert read_bytes(reader, 0, SIZE) == BODY
    reader.close()


async def test_a_cancelled_wait_does_not_affect_other_waits(registry: StoredRegistry) -> None:
    """Two readers wait for the same byte. If one wait is cancelled, the other reader still gets the byte."""
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    cancelled, remaining = [asyncio.create_task(reader.wait(0)) for _ in range(2)]
    await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.wait([cancelled])
    await asyncio.to_thread(owner.write_at, 0, BODY[:PIECE_BYTES])
    assert await remaining == PIECE_BYTES
    reader.close()
    owner.close()


async def test_corrupt_bytes_are_deleted(registry: StoredRegistry, data: Path) -> None:
    """If the bytes do not have the blob's digest, the commit and all readers get DigestInvalid. No repository has the
    blob, no file stays, and the next claim starts without bytes."""
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    wait_task = asyncio.create_task(reader.wait(SIZE))
    await write_missing(owner, b"x" + BODY[1:])
    with pytest.raises(DigestInvalid):
        await owner.commit(UBUNTU)
    with pytest.raises(DigestInvalid):
        await wait_task
    with pytest.raises(DigestInvalid):
        await reader.wait(0)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(UBUNTU, DIGEST)
    assert files_below(data / "partials") == []
    assert DIGEST.encoded not in {path.name for path in files_below(data / "blobs")}
    new_claim = await registry.partials.claim(DIGEST, SIZE)
    assert new_claim.is_owner
    assert new_claim.missing() == [(0, SIZE)]
    for partial in (owner, reader, new_claim):
        partial.close()


async def test_stored_bytes_are_never_changed(registry: StoredRegistry) -> None:
    """If bytes arrive a second time, for example from another endpoint, only the bytes that are still missing are
    written. So bytes never change after they were read or hashed."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    await asyncio.to_thread(partial.write_at, 0, BODY[: 2 * PIECE_BYTES])
    await asyncio.to_thread(partial.write_at, PIECE_BYTES, b"\0" * PIECE_BYTES + BODY[2 * PIECE_BYTES :])
    assert read_bytes(partial, 0, SIZE) == BODY
    await partial.commit(UBUNTU)
    partial.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY


async def test_bytes_are_kept_over_a_restart_but_not_over_a_reboot(data: Path) -> None:
    """After a restart of the process, the next owner has all bytes. After a reboot of the machine, it has none."""
    for boot, missing in (("one", [(0, SIZE)]), ("one", [(PIECE_BYTES, SIZE)]), ("two", [(0, SIZE)])):
        async with open_registry(data, boot=boot) as registry:
            partial = await registry.partials.claim(DIGEST, SIZE)
            assert partial.is_owner
            assert partial.missing() == missing
            await asyncio.to_thread(partial.write_at, 0, BODY[:PIECE_BYTES])
            partial.close()


async def test_a_commit_needs_all_bytes_and_the_owner(registry: StoredRegistry) -> None:
    """A reader cannot commit a blob, and an owner cannot commit it while bytes are missing. After a refused commit, the
    stored bytes are still there."""
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    await asyncio.to_thread(owner.write_at, 1, BODY[1:])
    for partial in (owner, reader):
        with pytest.raises(PartialBlobLost):
            await partial.commit(UBUNTU)
    await write_missing(owner)
    with pytest.raises(PartialBlobLost):
        await reader.commit(UBUNTU)
    await owner.commit(UBUNTU)
    owner.close()
    reader.close()


async def test_a_commit_is_completed_if_its_caller_is_cancelled(registry: StoredRegistry) -> None:
    """If the caller of a commit is cancelled, the commit is still completed, even if the partial blob is closed at
    once."""
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    await write_missing(owner)
    committing = asyncio.create_task(owner.commit(UBUNTU))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    committing.cancel()
    await asyncio.wait([committing])
    owner.close()
    assert await reader.wait(SIZE) == SIZE
    reader.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY


async def test_a_commit_of_a_blob_that_was_pushed_meanwhile(registry: StoredRegistry) -> None:
    """If the same blob was pushed meanwhile, the commit still adds it to the repository."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    await write_missing(partial)
    writer = await registry.start_upload(RepositoryName("team/app"))
    await writer.write(BODY)
    await writer.commit(DIGEST)
    await writer.aclose()
    await partial.commit(UBUNTU)
    partial.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY
    assert await read(registry, RepositoryName("team/app"), DIGEST) == BODY


async def test_the_sender_of_corrupt_bytes_is_recorded_before_readers_get_the_error(registry: StoredRegistry) -> None:
    """The endpoint that sent corrupt bytes is recorded before readers get the error, so that the next download can
    avoid this endpoint. If it cannot be recorded, the bytes are deleted nevertheless."""
    for failing in (False, True):
        owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
        waiting = asyncio.create_task(reader.wait(SIZE))
        await write_missing(owner, b"x" + BODY[1:])
        reader_had_error: list[bool] = []

        async def record_sender(
            waiting: asyncio.Task[int] = waiting,
            reader_had_error: list[bool] = reader_had_error,
            *,
            fail: bool = failing,
        ) -> None:
            reader_had_error.append(waiting.done())
            if fail:
                raise StorageFailed

        with pytest.raises(StorageFailed if failing else DigestInvalid):
            await owner.commit(UBUNTU, record_sender)
        with pytest.raises(DigestInvalid):
            await waiting
        assert reader_had_error == [False]
        owner.close()
        reader.close()


async def test_close_waits_for_running_writes(registry: StoredRegistry) -> None:
    """If the owner closes a partial blob while threads write, running writes are completed before the next owner can
    take over. Later writes get PartialBlobLost."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    all_started = threading.Barrier(5)

    def write(number: int) -> int:
        all_started.wait()
        for done, start in enumerate(range(number * PIECE_BYTES, SIZE, 4 * PIECE_BYTES)):
            try:
                partial.write_at(start, BODY[start : start + PIECE_BYTES])
            except PartialBlobLost:
                return done
        return done + 1

    writing = [asyncio.create_task(asyncio.to_thread(write, number)) for number in range(4)]
    await asyncio.to_thread(all_started.wait)
    partial.close()
    written = sum(await asyncio.gather(*writing))
    new_claim = await registry.partials.claim(DIGEST, SIZE)
    assert new_claim.is_owner
    # All written pieces have PIECE_BYTES, except the last piece of the blob, which may be among them.
    assert sum(stop - start for start, stop in new_claim.missing()) in (
        SIZE - written * PIECE_BYTES, SIZE - (written - 1) * PIECE_BYTES - SIZE % PIECE_BYTES,
    )  # fmt: skip
    await write_missing(new_claim)
    await new_claim.commit(UBUNTU)
    new_claim.close()


async def test_only_a_limited_number_of_extents_is_recorded(registry: StoredRegistry) -> None:
    """The written ranges of a partial blob are recorded as extents. If there are too many, only the first ones are
    recorded, and the next owner downloads the bytes of the others again."""
    partial = await registry.partials.claim(DIGEST, SIZE)

    def write() -> None:
        for number in range(MAX_STORED_EXTENTS + 20):
            partial.write_at(number * 4096, BODY[number * 4096 : number * 4096 + 2048])

    await asyncio.to_thread(write)
    partial.close()
    new_claim = await registry.partials.claim(DIGEST, SIZE)
    assert len(new_claim.missing()) == MAX_STORED_EXTENTS
    await write_missing(new_claim)
    await new_claim.commit(UBUNTU)
    new_claim.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY


async def test_a_truncated_file_is_not_committed(registry: StoredRegistry, data: Path) -> None:
    """If another program truncates the file of a partial blob, the commit fails and the next claim starts without
    bytes."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    await write_missing(partial)
    os.truncate(data / "partials" / f"sha256-{DIGEST.encoded}.{SIZE}.data", 2 * 1024 * 1024)
    with pytest.raises((StorageFailed, DigestInvalid)):
        await partial.commit(UBUNTU)
    new_claim = await registry.partials.claim(DIGEST, SIZE)
    assert new_claim.missing() == [(0, SIZE)]
    new_claim.close()
    partial.close()


def test_a_damaged_state_record_is_ignored() -> None:
    """The record of a partial blob's state is not used if it is cut short or a byte was changed. Bytes after the record
    do not matter."""
    progress = PartialProgress("boot", 100, extents=[(0, 5), (10, 20)])
    encoded = progress.encode()
    assert decode_progress(encoded + b"rest") == progress
    assert decode_progress(bytes(4096)) is None
    for at in range(len(encoded)):
        assert decode_progress(encoded[:at]) is None
        assert decode_progress(encoded[:at] + bytes([encoded[at] ^ 1]) + encoded[at + 1 :]) is None


async def test_a_late_notification_causes_no_error(registry: StoredRegistry) -> None:
    """The owner notifies a waiting reader when it closes a partial blob. If the reader stops waiting and closes the
    partial blob at the same time, no error occurs."""
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    owner = await registry.partials.claim(DIGEST, len(BODY))
    reader = await registry.partials.claim(DIGEST, len(BODY))
    waiting = asyncio.create_task(reader.wait(0))
    await asyncio.sleep(0)
    owner.close()  # notifies the waiting reader
    waiting.cancel()
    reader.close()
    with suppress(asyncio.CancelledError, PartialBlobLost):
        await waiting
    for _ in range(5):
        await asyncio.sleep(0.002)
    assert errors == []


async def test_a_blob_beyond_a_quota_leaves_no_files(registry: StoredRegistry, data: Path) -> None:
    """If the complete blob does not fit into a quota, the commit deletes its bytes. A user that waits for the blob gets
    PartialBlobLost. The next claim begins with no bytes."""
    await registry.usage.configure([ScopeDefinition("quota docker.io/", ("docker.io/",), max_bytes=SIZE - 1)])
    while await registry.usage.count_batch():
        pass
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    await write_missing(owner)
    waiting = asyncio.create_task(reader.wait(SIZE))
    with pytest.raises(QuotaExceeded):
        await owner.commit(UBUNTU)
    with pytest.raises(PartialBlobLost):
        async with asyncio.timeout(5):
            await waiting
    assert files_below(data / "partials") == files_below(data / "blobs") == []
    for handle in (owner, reader):
        handle.close()
    next_owner = await registry.partials.claim(DIGEST, SIZE)
    assert next_owner.is_owner
    assert next_owner.missing() == [(0, SIZE)]
    next_owner.close()
