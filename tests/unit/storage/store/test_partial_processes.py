"""Partial blobs (mirrored blobs that are being downloaded) that other processes follow and take over."""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from storage.errors import DigestInvalid, PartialLost
from storage.store.stored_registry import StoredRegistry
from tests.fakes.partial_peer import UBUNTU, content, digest, partial_peer
from tests.system.crash.workload import files_below, read

pytestmark = pytest.mark.slow

SIZE = 2 * 1024 * 1024 + 5
SEED = 7
BODY, DIGEST = content(SEED, SIZE), digest(SEED, SIZE)
HALF = 1024 * 1024


async def test_another_process_follows_and_reads_what_this_one_writes(registry: StoredRegistry, data: Path) -> None:
    """Another process learns of each piece and of the commit, without asking repeatedly."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    async with partial_peer(data) as there:
        assert await there.ask("claim", SEED, SIZE) is False
        assert await there.ask("own") is False
        assert await there.ask("missing") == [[0, SIZE]]
        await there.start("wait", 0)
        await asyncio.to_thread(partial.write_at, 0, BODY[:HALF])
        assert await there.answer() == HALF
        assert await there.ask("missing") == [[HALF, SIZE]]
        await there.start("wait", SIZE)
        await asyncio.to_thread(partial.write_at, HALF, BODY[HALF:])
        await partial.commit(UBUNTU)
        assert await there.answer() == SIZE
        assert await there.ask("write", 0, 10) == "PartialLost"
        assert await there.ask("commit") == "PartialLost"
    partial.close()


async def test_this_process_follows_another_one(registry: StoredRegistry, data: Path) -> None:
    """This process can read the bytes of another process as soon as that process reports them. The blob exists here
    once the other process has committed."""
    async with partial_peer(data) as there:
        assert await there.ask("claim", SEED, SIZE) is True
        partial = await registry.partials.claim(DIGEST, SIZE)
        assert not partial.is_owner
        waiting = [asyncio.create_task(partial.wait(at)) for at in (0, 5, HALF - 1)]
        await there.ask("write", 0, HALF)
        assert await asyncio.gather(*waiting) == [HALF] * 3
        assert os.pread(partial.file.fd, HALF, 0) == BODY[:HALF]
        end = asyncio.create_task(partial.wait(SIZE))
        await there.ask("write", HALF, SIZE)
        assert await partial.wait(HALF) == SIZE
        assert await there.ask("commit") == SIZE
        assert await end == SIZE
        assert await read(registry, UBUNTU, DIGEST) == BODY
        assert os.pread(partial.file.fd, SIZE, 0) == BODY
    partial.close()


async def test_wrong_bytes_are_told_to_those_who_follow_elsewhere(registry: StoredRegistry, data: Path) -> None:
    """Followers in other processes get DigestInvalid as well. The next claim, in any process, starts with no bytes."""
    partial = await registry.partials.claim(DIGEST, SIZE)
    async with partial_peer(data) as there:
        await there.ask("claim", SEED, SIZE)
        await there.start("wait", SIZE)
        await asyncio.to_thread(partial.write_at, 0, bytes(SIZE))
        with pytest.raises(DigestInvalid):
            await partial.commit(UBUNTU)
        assert await there.answer() == "DigestInvalid"
        assert await there.ask("own") is False
        assert await there.ask("claim", SEED, SIZE) is True
        assert await there.ask("missing") == [[0, SIZE]]
    partial.close()


async def test_an_owner_that_is_killed_is_followed_by_another_and_nothing_is_lost(
    registry: StoredRegistry, data: Path
) -> None:
    """When the owner is killed, the waiting processes learn of it within a moment. One becomes the owner and has all
    bytes that were reported before. The blob is completed, and the other process keeps waiting."""
    async with partial_peer(data) as first, partial_peer(data) as second:
        assert await first.ask("claim", SEED, SIZE) is True
        assert await second.ask("claim", SEED, SIZE) is False
        partial = await registry.partials.claim(DIGEST, SIZE)
        await first.ask("write", 0, 1000)
        await first.ask("write", HALF, HALF + 1000)
        waiting = asyncio.create_task(partial.wait(1000))
        await second.start("wait", 1000)
        assert await partial.wait(0) == 1000
        await first.kill()
        with pytest.raises(PartialLost):
            async with asyncio.timeout(60):
                await waiting
        assert await second.answer() == "PartialLost"
        assert partial.take_ownership()
        assert await second.ask("own") is False
        assert partial.missing() == [(1000, HALF), (HALF + 1000, SIZE)]
        await second.start("wait", SIZE)
        for start, stop in partial.missing():
            await asyncio.to_thread(partial.write_at, start, BODY[start:stop])
        await partial.commit(UBUNTU)
        assert await second.answer() == SIZE
    partial.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY
    assert files_below(data / "partials") == []


async def test_an_owner_that_lets_go_is_noticed_elsewhere(registry: StoredRegistry, data: Path) -> None:
    """When an owner closes the partial blob, another process notices it within a tenth of a second if both processes
    get processor time, and continues the download."""
    async with partial_peer(data) as there:
        took: list[float] = []
        while len(took) < 3 or (min(took) >= 0.1 and len(took) < 20):
            partial = await registry.partials.claim(DIGEST, SIZE)
            await there.ask("claim", SEED, SIZE)
            await there.start("wait", 5)
            at = time.monotonic()
            partial.close()
            assert await there.answer() == "PartialLost"
            took.append(time.monotonic() - at)
            assert await there.ask("own") is True
            assert await there.ask("close") is None
        assert min(took) < 0.1


async def test_many_processes_that_take_a_blob_over_again_and_again_bring_it_whole(
    registry: StoredRegistry, data: Path
) -> None:
    """Each of six owners downloads a part and is killed. The seventh needs only the rest."""
    part = SIZE // 7
    for turn in range(6):
        async with AsyncExitStack() as stack:
            owner, reader = [await stack.enter_async_context(partial_peer(data)) for _ in range(2)]
            assert await owner.ask("claim", SEED, SIZE) is True
            assert await reader.ask("claim", SEED, SIZE) is False
            await owner.ask("write", turn * part, (turn + 1) * part)
            await reader.start("wait", SIZE)
            await owner.kill()
            assert await reader.answer() == "PartialLost"
            await reader.kill()
    partial = await registry.partials.claim(DIGEST, SIZE)
    assert partial.missing() == [(6 * part, SIZE)]
    await asyncio.to_thread(partial.write_at, 6 * part, BODY[6 * part :])
    await partial.commit(UBUNTU)
    partial.close()
    assert await read(registry, UBUNTU, DIGEST) == BODY


async def test_marks_reach_other_processes_and_fall_with_them(registry: StoredRegistry, data: Path) -> None:
    """An owner sees that a reader waits in another process, and other processes see that the download has begun. The
    marks of a killed process do not count."""
    async with partial_peer(data) as owner, partial_peer(data) as reader:
        assert await owner.ask("claim", SEED, SIZE) is True
        assert await reader.ask("claim", SEED, SIZE) is False
        partial = await registry.partials.claim(DIGEST, SIZE)
        assert await owner.ask("wanted") is False
        await reader.ask("add_waiter")
        assert await owner.ask("wanted") is True
        partial.add_waiter()
        await reader.kill()
        assert await owner.ask("wanted") is True
        partial.close()
        assert await owner.ask("wanted") is False
        partial = await registry.partials.claim(DIGEST, SIZE)
        assert not partial.has_started
        await owner.ask("mark_started")
        assert partial.has_started
        await owner.kill()
        assert not partial.has_started
    partial.close()
