"""Claims of partial blobs in one process: who is the owner, what the owner learns, and when a partial blob expires. A
*partial blob* is a file with the bytes of a mirror's download that have arrived. Its *owner* downloads it."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest

from storage.composition import open_registry
from storage.content import PartialFailures, digest_of
from storage.errors import DigestInvalid, PartialLost, SizeInvalid, StorageFull
from storage.store.stored_registry import StoredRegistry
from tests.fakes.partial_peer import BOOT, UBUNTU, digest
from tests.system.crash.workload import files_below, read
from tests.unit.storage.store.conftest import BODY, DIGEST, SIZE, STEP, fill


async def test_the_next_owner_goes_on_with_what_is_there(registry: StoredRegistry) -> None:
    """When the owner closes a partial blob, a reader that waits for a missing byte gets PartialLost and can become the
    owner. The new owner needs only the missing bytes. Of two such readers, one becomes the owner."""
    owner, second, third = [await registry.partials.claim(DIGEST, SIZE) for _ in range(3)]
    await asyncio.to_thread(owner.write_at, STEP, BODY[STEP : 2 * STEP])
    waiting = asyncio.create_task(second.wait(0))
    await asyncio.sleep(0)
    owner.close()
    with pytest.raises(PartialLost):
        await waiting
    with pytest.raises(PartialLost):
        await asyncio.to_thread(owner.write_at, 0, b"x")
    assert not owner.take_ownership()
    assert await second.wait(STEP) == 2 * STEP, "what is there can be read"
    assert second.take_ownership()
    assert second.is_owner
    assert not third.take_ownership()
    assert second.missing() == [(0, STEP), (2 * STEP, SIZE)]
    await fill(second)
    await second.commit(UBUNTU)
    assert await third.wait(SIZE) == SIZE
    second.close()
    third.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY


async def test_sizes_that_cannot_be_are_refused(registry: StoredRegistry, data: Path) -> None:
    """A negative size, and bytes outside the size, are refused. A size for which the disk has no room is refused before
    the download, and leaves no file."""
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


async def test_a_partial_of_another_size_is_another(registry: StoredRegistry, data: Path) -> None:
    """A claim with a wrong size does not disturb other claims: its partial blob has its own owner and its own bytes,
    and cannot become a blob. The bytes of the right one stay."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    await asyncio.to_thread(partial.write_at, 0, BODY[:STEP])
    partial.close()
    for size in (SIZE + 1, STEP):
        wrong = await registry.partials.claim(DIGEST, size)
        assert wrong.is_owner
        assert wrong.missing() == [(0, size)]
        await fill(wrong, BODY + b"x")
        with pytest.raises(DigestInvalid):
            await wrong.commit(UBUNTU)
        wrong.close()
    partial = await registry.partials.claim(DIGEST, SIZE)
    assert partial.missing() == [(STEP, SIZE)]
    await fill(partial)
    await partial.commit(UBUNTU)
    partial.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY
    assert files_below(data / "partials") == []


async def test_the_owner_learns_that_somebody_waits(registry: StoredRegistry) -> None:
    """The owner sees that readers want the blob, until they close it. Its own interest does not count. Readers see
    whether the download has begun."""
    owner, first, second = [await registry.partials.claim(DIGEST, SIZE) for _ in range(3)]
    owner.add_waiter()
    assert not owner.has_waiters
    assert first.has_waiters
    owner.mark_started()
    assert first.has_started
    first.add_waiter()
    second.add_waiter()
    first.close()
    assert owner.has_waiters
    second.close()
    assert not owner.has_waiters
    owner.close()
    again = await registry.partials.claim(DIGEST, SIZE)
    assert again.is_owner
    assert not again.has_started
    again.close()


async def test_a_partial_that_was_dropped_is_claimed_anew(registry: StoredRegistry, data: Path) -> None:
    """A reader that still has a discarded partial blob open gets PartialLost, and cannot become its owner."""
    first = await registry.partials.claim(DIGEST, SIZE)
    await asyncio.to_thread(first.write_at, 0, BODY[:STEP])
    reader = await registry.partials.claim(DIGEST, SIZE)
    first.close()
    assert await registry.partials.expire(time.time() + 60)
    assert not reader.take_ownership()
    with pytest.raises(PartialLost):
        await reader.wait(STEP)
    again = await registry.partials.claim(DIGEST, SIZE)
    assert again.is_owner
    assert again.missing() == [(0, SIZE)]
    reader.close()
    again.close()


async def test_only_idle_partials_without_an_owner_expire(registry: StoredRegistry, data: Path) -> None:
    """A partial blob that has an owner, or was written recently, stays. Files that an interrupted start or end has left
    are deleted when they are old."""
    owned = await registry.partials.claim(DIGEST, SIZE)
    idle = await registry.partials.claim(digest(2, 10), 10)
    idle.close()
    (data / "partials" / f"docker.io~sha256-{'a' * 64}.10.state").touch()
    (data / "partials" / f"sha256-{'b' * 64}.data").touch()
    (data / "partials" / "something else").touch()
    assert await registry.partials.expire(time.time() - 3600) == []
    assert len(await registry.partials.expire(time.time() + 3600)) == 3
    assert {path.name for path in files_below(data / "partials")} == {
        "something else", f"sha256-{DIGEST.encoded}.{SIZE}.data", f"sha256-{DIGEST.encoded}.{SIZE}.state",
    }  # fmt: skip
    await asyncio.to_thread(owned.write_at, 0, BODY)
    await owned.commit(UBUNTU)
    owned.close()


async def test_the_collector_drops_idle_partials(data: Path) -> None:
    """Garbage collection deletes idle partial blobs after the same time as idle upload sessions."""
    async with open_registry(data, boot=BOOT) as registry:
        (await registry.partials.claim(DIGEST, SIZE)).close()
        assert (await registry.collector.collect()).partials == 0
    async with open_registry(data, boot=BOOT, expire=60, clock=lambda: time.time() + 3600) as registry:
        assert (await registry.collector.collect()).partials == 1
    assert files_below(data / "partials") == []


async def test_partials_of_another_run_of_the_machine_are_collected_at_once(data: Path) -> None:
    """Partial blobs from before a reboot are deleted at once, because they cannot be continued."""
    async with open_registry(data, boot="before") as registry:
        (await registry.partials.claim(DIGEST, SIZE)).close()
    async with open_registry(data, boot="after") as registry:
        assert (await registry.collector.collect()).partials == 1
    assert files_below(data / "partials") == []


async def test_many_claims_at_once_have_one_owner_and_one_file(registry: StoredRegistry) -> None:
    """Of a hundred claims at the same time, one is the owner. Together they have two files open."""
    before = len(os.listdir("/proc/self/fd"))
    partials = await asyncio.gather(*(registry.partials.claim(DIGEST, SIZE) for _ in range(100)))
    assert sum(partial.is_owner for partial in partials) == 1
    assert len(os.listdir("/proc/self/fd")) == before + 2
    for partial in partials:
        partial.close()
        partial.close()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_claim_that_is_cancelled_holds_nothing(registry: StoredRegistry) -> None:
    """A cancelled claim leaves no file open and does not own the partial blob."""
    before = len(os.listdir("/proc/self/fd"))
    for turns in range(6):
        claiming = asyncio.create_task(registry.partials.claim(DIGEST, SIZE))
        for _ in range(turns):
            await asyncio.sleep(0)
        claiming.cancel()
        await asyncio.wait([claiming])
        if not claiming.cancelled():
            claiming.result().close()
    assert len(os.listdir("/proc/self/fd")) == before
    partial = await registry.partials.claim(DIGEST, SIZE)
    assert partial.is_owner
    partial.close()


async def test_why_an_owner_gave_up_is_told(data: Path) -> None:
    """When an owner gives up, followers in all processes learn the reason, with a count that tells them whether it is
    new. The bytes stay. The reason of the next owner replaces the old one."""
    async with open_registry(data, boot=BOOT) as one, open_registry(data, boot=BOOT) as two:
        owner, follower = await one.partials.claim(DIGEST, SIZE), await two.partials.claim(DIGEST, SIZE)
        assert follower.owner_failures == PartialFailures()
        await follower.report_failure("not its owner's")
        assert follower.owner_failures == PartialFailures()
        owner.write_at(0, BODY[:1000])
        await owner.report_failure("because")
        owner.close()
        assert follower.owner_failures == PartialFailures(1, "because")
        assert follower.take_ownership()
        assert follower.missing() == [(1000, SIZE)]
        follower.write_at(1000, BODY[1000:])
        await follower.report_failure("long " * 1000)
        later = await one.partials.claim(DIGEST, SIZE)
        assert later.owner_failures.times == 2
        assert 1000 < len(later.owner_failures.reason) < 4096
        await follower.commit(UBUNTU)
        later.close()
        follower.close()
