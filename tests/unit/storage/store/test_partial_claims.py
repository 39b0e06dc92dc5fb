"""Claims of partial blobs within one process. A *partial blob* is a blob that a mirror is still downloading. It has two
files: the bytes that have arrived, and the state. One of its claims is the *owner*, which downloads the blob. The other
claims are *readers*."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from storage.composition import open_registry
from storage.content import PartialFailures, digest_of
from storage.errors import DigestInvalid, PartialBlobLost, SizeInvalid, StorageFull
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.open_files import open_files_below
from tests.fakes.partial_peer import BOOT, UBUNTU, digest
from tests.system.crash.workload import files_below, read
from tests.unit.storage.store.conftest import BODY, DIGEST, PIECE_BYTES, SIZE, write_missing


async def test_the_next_owner_continues_with_the_existing_bytes(registry: StoredRegistry) -> None:
    """When the owner closes a partial blob, a reader that waits for a missing byte gets PartialBlobLost. One of the
    readers can then become the owner, and downloads only the missing bytes."""
    owner, second, third = [await registry.partials.claim(DIGEST, SIZE) for _ in range(3)]
    await asyncio.to_thread(owner.write_at, PIECE_BYTES, BODY[PIECE_BYTES : 2 * PIECE_BYTES])
    wait_task = asyncio.create_task(second.wait(0))
    await asyncio.sleep(0)
    owner.close()
    with pytest.raises(PartialBlobLost):
        await wait_task
    with pytest.raises(PartialBlobLost):
        await asyncio.to_thread(owner.write_at, 0, b"x")
    assert not owner.take_ownership()
    assert await second.wait(PIECE_BYTES) == 2 * PIECE_BYTES, "the stored bytes can be read"
    assert second.take_ownership()
    assert second.is_owner
    assert not third.take_ownership()
    assert second.missing() == [(0, PIECE_BYTES), (2 * PIECE_BYTES, SIZE)]
    await write_missing(second)
    await second.commit(UBUNTU)
    assert await third.wait(SIZE) == SIZE
    second.close()
    third.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY


async def test_impossible_sizes_are_refused(registry: StoredRegistry, data: Path) -> None:
    """A negative size is refused, and so are bytes beyond the size. If the disk has no space for the size, the claim is
    refused and leaves no file."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    for offset, piece in ((SIZE - 1, b"xy"), (-1, b"xy"), (SIZE + 5, b"x")):
        with pytest.raises(SizeInvalid):
            partial.write_at(offset, piece)
    with pytest.raises(SizeInvalid):
        await registry.partials.claim(digest_of(b"a"), -1)
    with pytest.raises(StorageFull):
        await registry.partials.claim(digest_of(b"a"), 1 << 60)
    assert len(files_below(data / "partials")) == 2
    partial.close()


async def test_claims_with_different_sizes_are_separate(registry: StoredRegistry, data: Path) -> None:
    """A claim with a wrong size gets a partial blob of its own, with its own owner and bytes. This partial blob cannot
    become a blob, because its digest is wrong. The bytes of the claim with the right size stay."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    await asyncio.to_thread(partial.write_at, 0, BODY[:PIECE_BYTES])
    partial.close()
    for size in (SIZE + 1, PIECE_BYTES):
        wrong_partial = await registry.partials.claim(DIGEST, size)
        assert wrong_partial.is_owner
        assert wrong_partial.missing() == [(0, size)]
        await write_missing(wrong_partial, BODY + b"x")
        with pytest.raises(DigestInvalid):
            await wrong_partial.commit(UBUNTU)
        wrong_partial.close()
    partial = await registry.partials.claim(DIGEST, SIZE)
    assert partial.missing() == [(PIECE_BYTES, SIZE)]
    await write_missing(partial)
    await partial.commit(UBUNTU)
    partial.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY
    assert files_below(data / "partials") == []


async def test_the_owner_sees_that_readers_wait(registry: StoredRegistry) -> None:
    """`has_waiters` returns whether another claim of the partial blob waits for bytes. A claim waits from its call of
    `add_waiter` until it is closed. `has_upstream_request` returns whether the owner has started to request bytes,
    `has_response` whether the upstream has started to send. For the next owner both are False again."""
    owner, first, second = [await registry.partials.claim(DIGEST, SIZE) for _ in range(3)]
    owner.add_waiter()
    assert not owner.has_waiters
    assert first.has_waiters
    owner.mark_upstream_request(UBUNTU)
    assert first.has_upstream_request
    assert first.has_upstream_request_to(UBUNTU)
    assert not first.has_upstream_request_to(RepositoryName("docker.io/library/debian"))
    assert not first.has_response
    owner.mark_response()
    assert first.has_response
    first.add_waiter()
    second.add_waiter()
    first.close()
    assert owner.has_waiters
    second.close()
    assert not owner.has_waiters
    owner.close()
    new_claim = await registry.partials.claim(DIGEST, SIZE)
    assert new_claim.is_owner
    assert not new_claim.has_upstream_request
    assert not new_claim.has_response
    new_claim.close()


async def test_an_expired_partial_is_claimed_anew(registry: StoredRegistry, data: Path) -> None:
    """If a partial blob is deleted because it has expired, a reader that still has it open gets PartialBlobLost and
    cannot become its owner. The next claim starts without bytes."""
    first = await registry.partials.claim(DIGEST, SIZE)
    await asyncio.to_thread(first.write_at, 0, BODY[:PIECE_BYTES])
    reader = await registry.partials.claim(DIGEST, SIZE)
    first.close()
    assert await registry.partials.expire(time.time() + 60)
    assert not reader.take_ownership()
    with pytest.raises(PartialBlobLost):
        await reader.wait(PIECE_BYTES)
    new_claim = await registry.partials.claim(DIGEST, SIZE)
    assert new_claim.is_owner
    assert new_claim.missing() == [(0, SIZE)]
    reader.close()
    new_claim.close()


async def test_only_idle_partials_without_an_owner_expire(registry: StoredRegistry, data: Path) -> None:
    """A partial blob stays if it has an owner or was written recently. Old files that an interrupted claim or an
    interrupted deletion has left behind are deleted."""
    owned = await registry.partials.claim(DIGEST, SIZE)
    idle = await registry.partials.claim(digest(2, 10), 10)
    idle.close()
    (data / "partials" / f"docker.io~sha256-{'a' * 64}.10.state").touch()
    (data / "partials" / f"sha256-{'b' * 64}.data").touch()
    (data / "partials" / "something else").touch()
    assert await registry.partials.expire(time.time() - 3600) == []
    assert len(await registry.partials.expire(time.time() + 3600)) == 3  # `idle` and the first two of these files
    assert {path.name for path in files_below(data / "partials")} == {
        "something else", f"sha256-{DIGEST.encoded}.{SIZE}.data", f"sha256-{DIGEST.encoded}.{SIZE}.state",
    }  # fmt: skip
    await asyncio.to_thread(owned.write_at, 0, BODY)
    await owned.commit(UBUNTU)
    owned.close()


async def test_garbage_collection_deletes_idle_partials(data: Path) -> None:
    """Garbage collection deletes idle partial blobs after the same time as idle upload sessions."""
    async with open_registry(data, boot=BOOT) as registry:
        (await registry.partials.claim(DIGEST, SIZE)).close()
        assert (await registry.collector.collect()).partials == 0
    async with open_registry(data, boot=BOOT, expire=60, clock=lambda: time.time() + 3600) as registry:
        assert (await registry.collector.collect()).partials == 1
    assert files_below(data / "partials") == []


async def test_partials_from_before_a_reboot_are_deleted_at_once(data: Path) -> None:
    """Partial blobs from before a reboot are deleted at once, because they cannot be continued."""
    async with open_registry(data, boot="before") as registry:
        (await registry.partials.claim(DIGEST, SIZE)).close()
    async with open_registry(data, boot="after") as registry:
        assert (await registry.collector.collect()).partials == 1
    assert files_below(data / "partials") == []


async def test_concurrent_claims_have_one_owner_and_share_open_files(registry: StoredRegistry, data: Path) -> None:
    """If a blob is claimed a hundred times at the same time, exactly one claim is the owner. The claims share the open
    files: the process opens each of the two files of the partial blob only once."""
    partials_folder = data / "partials"
    assert open_files_below(partials_folder) == []
    partials = await asyncio.gather(*(registry.partials.claim(DIGEST, SIZE) for _ in range(100)))
    assert sum(partial.is_owner for partial in partials) == 1
    assert len(open_files_below(partials_folder)) == 2
    for partial in partials:
        partial.close()
        partial.close()  # the second call has no effect
    assert open_files_below(partials_folder) == []


async def test_a_cancelled_claim_leaves_nothing_open(registry: StoredRegistry, data: Path) -> None:
    """A claim that is cancelled at any step leaves no file open and does not own the partial blob."""
    for steps in range(6):
        claiming = asyncio.create_task(registry.partials.claim(DIGEST, SIZE))
        for _ in range(steps):
            await asyncio.sleep(0)
        claiming.cancel()
        await asyncio.wait([claiming])
        if not claiming.cancelled():
            claiming.result().close()
    assert open_files_below(data / "partials") == []
    partial = await registry.partials.claim(DIGEST, SIZE)
    assert partial.is_owner
    partial.close()


async def test_readers_see_why_the_owner_gave_up(data: Path) -> None:
    """When an owner gives up, it reports the reason. Readers in all processes can get this reason and the number of
    reports so far, which shows whether the reason is new. A report by a reader is ignored. The downloaded bytes stay.
    The reason that the next owner reports replaces the previous reason."""
    async with open_registry(data, boot=BOOT) as first, open_registry(data, boot=BOOT) as second:
        owner, next_owner = await first.partials.claim(DIGEST, SIZE), await second.partials.claim(DIGEST, SIZE)
        assert next_owner.owner_failures == PartialFailures()
        await next_owner.report_failure("reported by a reader")  # it is not the owner yet
        assert next_owner.owner_failures == PartialFailures()
        owner.write_at(0, BODY[:1000])
        await owner.report_failure("because")
        owner.close()
        assert next_owner.owner_failures == PartialFailures(1, "because")
        assert next_owner.take_ownership()
        assert next_owner.missing() == [(1000, SIZE)]
        next_owner.write_at(1000, BODY[1000:])
        await next_owner.report_failure("long " * 1000)
        later = await first.partials.claim(DIGEST, SIZE)
        assert later.owner_failures.count == 2
        assert 1000 < len(later.owner_failures.reason) < 4096
        await next_owner.commit(UBUNTU)
        later.close()
        next_owner.close()
