"""Partial blobs (mirrored blobs that are being downloaded) in one process: what is written, read, committed and
kept."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from storage.blobs.files.partial_state_format import MAX_STORED_EXTENTS, Progress, decode_progress
from storage.composition import open_registry
from storage.content import digest_of
from storage.errors import BlobUnknown, DigestInvalid, PartialLost, StorageFailed
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.partial_peer import UBUNTU
from tests.system.crash.workload import files_below, read
from tests.unit.storage.store.conftest import BODY, DIGEST, SIZE, STEP, bytes_of, fill


async def test_what_was_written_in_any_order_becomes_a_blob(registry: StoredRegistry, data: Path) -> None:
    """Pieces that four threads write in any order, one of them twice, become the blob with its bytes. No file of the
    partial blob stays."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    assert partial.is_owner
    assert partial.missing() == [(0, SIZE)]
    starts = [*range(0, SIZE, STEP), 0]
    random.Random(2).shuffle(starts)

    def write(mine: list[int]) -> None:
        for start in mine:
            partial.write_at(start, memoryview(BODY)[start : start + STEP])

    await asyncio.gather(*(asyncio.to_thread(write, starts[number::4]) for number in range(4)))
    assert partial.missing() == []
    assert (await partial.commit(UBUNTU)).size == SIZE
    assert await read(registry, UBUNTU, DIGEST) == BODY
    assert bytes_of(partial, 0, SIZE) == BODY, "it stays open"
    assert await partial.wait(0) == await partial.wait(SIZE) == SIZE
    assert not partial.is_owner
    assert files_below(data / "partials") == []
    partial.close()
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(RepositoryName("docker.io/library/other"), DIGEST)


async def test_an_empty_blob_can_come_in(registry: StoredRegistry) -> None:
    """An empty partial blob has no missing bytes, and is a blob after its commit."""
    partial = await registry.partials.claim(digest_of(b""), 0)
    assert partial.missing() == []
    await partial.commit(UBUNTU)
    assert await partial.wait(0) == 0
    partial.close()
    assert await read(registry, UBUNTU, digest_of(b"")) == b""


async def test_readers_follow_what_is_there_without_a_gap(registry: StoredRegistry) -> None:
    """A reader learns up to which byte it can read without a gap from its position. It reaches the last byte only after
    the digest was checked."""
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    assert not reader.is_owner
    assert not reader.take_ownership()
    first = asyncio.create_task(reader.wait(0))
    inner = asyncio.create_task(reader.wait(2 * STEP + 5))
    end = asyncio.create_task(reader.wait(SIZE))
    await asyncio.to_thread(owner.write_at, STEP, BODY[STEP : 2 * STEP])
    await asyncio.to_thread(owner.write_at, 2 * STEP, BODY[2 * STEP : 3 * STEP])
    assert await inner == 3 * STEP
    assert not first.done()
    await asyncio.to_thread(owner.write_at, 0, BODY[:STEP])
    assert await first in (STEP, 3 * STEP)
    assert await reader.wait(0) == 3 * STEP
    assert bytes_of(reader, 0, 3 * STEP) == BODY[: 3 * STEP]
    await fill(owner)
    assert await reader.wait(3 * STEP) == SIZE
    assert not end.done(), "not content before its digest is checked"
    await owner.commit(UBUNTU)
    assert await end == SIZE
    owner.close()
    assert bytes_of(reader, 0, SIZE) == BODY
    reader.close()


async def test_a_reader_that_goes_away_leaves_the_others_waiting(registry: StoredRegistry) -> None:
    """Of two readers that wait for the same byte, one is cancelled, and the other one gets the byte."""
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    gone, stays = [asyncio.create_task(reader.wait(0)) for _ in range(2)]
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    await asyncio.to_thread(owner.write_at, 0, BODY[:STEP])
    assert await stays == STEP
    reader.close()
    owner.close()


async def test_wrong_bytes_keep_nothing(registry: StoredRegistry, data: Path) -> None:
    """With wrong bytes, the commit and all readers get DigestInvalid, no repository has the blob, no file stays, and
    the next claim starts with no bytes."""
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    waiting = asyncio.create_task(reader.wait(SIZE))
    await fill(owner, b"x" + BODY[1:])
    with pytest.raises(DigestInvalid):
        await owner.commit(UBUNTU)
    with pytest.raises(DigestInvalid):
        await waiting
    with pytest.raises(DigestInvalid):
        await reader.wait(0)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(UBUNTU, DIGEST)
    assert files_below(data / "partials") == []
    assert DIGEST.encoded not in {path.name for path in files_below(data / "blobs")}
    again = await registry.partials.claim(DIGEST, SIZE)
    assert again.is_owner
    assert again.missing() == [(0, SIZE)]
    for partial in (owner, reader, again):
        partial.close()


async def test_bytes_that_are_there_are_never_changed(registry: StoredRegistry) -> None:
    """Of bytes that arrive a second time, for example from another endpoint, only the new part is written. So bytes
    never change after they were read or hashed."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    await asyncio.to_thread(partial.write_at, 0, BODY[: 2 * STEP])
    await asyncio.to_thread(partial.write_at, STEP, b"\0" * STEP + BODY[2 * STEP :])
    assert bytes_of(partial, 0, SIZE) == BODY
    await partial.commit(UBUNTU)
    partial.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY


async def test_what_has_come_survives_the_process_and_not_the_machine(data: Path) -> None:
    """After a restart of the process, all bytes are there. After a reboot of the machine, none are."""
    for boot, missing in (("one", [(0, SIZE)]), ("one", [(STEP, SIZE)]), ("two", [(0, SIZE)])):
        async with open_registry(data, boot=boot) as registry:
            partial = await registry.partials.claim(DIGEST, SIZE)
            assert partial.is_owner
            assert partial.missing() == missing
            await asyncio.to_thread(partial.write_at, 0, BODY[:STEP])
            partial.close()


async def test_a_commit_needs_all_bytes_and_the_owner(registry: StoredRegistry) -> None:
    """Neither a reader, nor an owner while bytes are missing, can commit. The attempt loses nothing."""
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    await asyncio.to_thread(owner.write_at, 1, BODY[1:])
    for partial in (owner, reader):
        with pytest.raises(PartialLost):
            await partial.commit(UBUNTU)
    await fill(owner)
    with pytest.raises(PartialLost):
        await reader.commit(UBUNTU)
    await owner.commit(UBUNTU)
    owner.close()
    reader.close()


async def test_a_commit_whose_caller_is_cancelled_is_made_all_the_same(registry: StoredRegistry) -> None:
    """A commit whose caller is cancelled is completed, also if the partial blob is closed at once."""
    owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
    await fill(owner)
    committing = asyncio.create_task(owner.commit(UBUNTU))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    committing.cancel()
    await asyncio.wait([committing])
    owner.close()
    assert await reader.wait(SIZE) == SIZE
    reader.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY


async def test_a_blob_that_was_pushed_meanwhile_does_no_harm(registry: StoredRegistry) -> None:
    """If the same blob was pushed meanwhile, the commit still adds it to the repository."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    await fill(partial)
    writer = await registry.start_upload(RepositoryName("team/app"))
    await writer.write(BODY)
    await writer.commit(DIGEST)
    await writer.aclose()
    await partial.commit(UBUNTU)
    partial.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY
    assert await read(registry, RepositoryName("team/app"), DIGEST) == BODY


async def test_who_sent_wrong_bytes_is_noted_before_anybody_learns_of_them(registry: StoredRegistry) -> None:
    """The endpoint that sent corrupt bytes is recorded before readers get the error, so that the next download knows
    it. If it cannot be recorded, the bytes are deleted nevertheless."""
    for failing in (False, True):
        owner, reader = [await registry.partials.claim(DIGEST, SIZE) for _ in range(2)]
        waiting = asyncio.create_task(reader.wait(SIZE))
        await fill(owner, b"x" + BODY[1:])
        told: list[bool] = []

        async def blame(waiting: asyncio.Task[int] = waiting, told: list[bool] = told, *, fail: bool = failing) -> None:
            told.append(waiting.done())
            if fail:
                raise StorageFailed

        with pytest.raises(StorageFailed if failing else DigestInvalid):
            await owner.commit(UBUNTU, blame)
        with pytest.raises(DigestInvalid):
            await waiting
        assert told == [False]
        owner.close()
        reader.close()


async def test_closing_while_threads_write_lets_them_finish(registry: StoredRegistry) -> None:
    """The partial blob has no owner only after the last write has ended. No write goes to a closed file."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    begun = threading.Barrier(5)

    def write(number: int) -> int:
        begun.wait()
        for done, start in enumerate(range(number * STEP, SIZE, 4 * STEP)):
            try:
                partial.write_at(start, BODY[start : start + STEP])
            except PartialLost:
                return done
        return done + 1

    writing = [asyncio.create_task(asyncio.to_thread(write, number)) for number in range(4)]
    await asyncio.to_thread(begun.wait)
    partial.close()
    written = sum(await asyncio.gather(*writing))
    again = await registry.partials.claim(DIGEST, SIZE)
    assert again.is_owner
    assert sum(stop - start for start, stop in again.missing()) in (
        SIZE - written * STEP, SIZE - (written - 1) * STEP - SIZE % STEP,
    )  # fmt: skip
    await fill(again)
    await again.commit(UBUNTU)
    again.close()


async def test_more_extents_than_are_kept_cost_only_the_last_ones(registry: StoredRegistry) -> None:
    """If there are more extents than are recorded, the next owner has the first ones, and the blob is completed."""
    partial = await registry.partials.claim(DIGEST, SIZE)

    def write() -> None:
        for number in range(MAX_STORED_EXTENTS + 20):
            partial.write_at(number * 4096, BODY[number * 4096 : number * 4096 + 2048])

    await asyncio.to_thread(write)
    partial.close()
    again = await registry.partials.claim(DIGEST, SIZE)
    assert len(again.missing()) == MAX_STORED_EXTENTS
    await fill(again)
    await again.commit(UBUNTU)
    again.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY


async def test_a_file_that_was_cut_short_is_told(registry: StoredRegistry, data: Path) -> None:
    """If the file of the bytes is shortened from outside, the commit fails, and the next claim starts with no bytes."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    await fill(partial)
    os.truncate(data / "partials" / f"sha256-{DIGEST.encoded}.{SIZE}.data", 2 * 1024 * 1024)
    with pytest.raises((StorageFailed, DigestInvalid)):
        await partial.commit(UBUNTU)
    again = await registry.partials.claim(DIGEST, SIZE)
    assert again.missing() == [(0, SIZE)]
    again.close()
    partial.close()


def test_a_state_that_is_not_whole_is_seen() -> None:
    """A record that is cut short or has a changed byte is not used. Bytes after the record do not matter."""
    whole = Progress("boot", 100, extents=[(0, 5), (10, 20)])
    encoded = whole.encode()
    assert decode_progress(encoded + b"rest") == whole
    assert decode_progress(bytes(4096)) is None
    for at in range(len(encoded)):
        assert decode_progress(encoded[:at]) is None
        assert decode_progress(encoded[:at] + bytes([encoded[at] ^ 1]) + encoded[at + 1 :]) is None


async def test_a_poke_that_comes_late_finds_nobody(registry: StoredRegistry) -> None:
    """If a reader stops waiting and closes the file in the moment in which the owner closes its own, no error
    follows."""
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))
    owner = await registry.partials.claim(DIGEST, len(BODY))
    other = await registry.partials.claim(DIGEST, len(BODY))
    waiting = asyncio.create_task(other.wait(0))
    await asyncio.sleep(0)
    owner.close()  # wakes whoever waits
    waiting.cancel()
    other.close()
    with suppress(asyncio.CancelledError, PartialLost):
        await waiting
    for _ in range(5):
        await asyncio.sleep(0.002)
    assert errors == []
