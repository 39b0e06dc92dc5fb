"""The memory budget for request bodies and responses: who gets a share, who waits, and who is cut off."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from registry.memory_budget import MAX_WAITING, SMALL_SHARE_BYTES, MemoryBudget, Share, ShareScope
from storage.errors import TooManyRequests
from tests.fakes.instruction_count import count_instructions
from tests.unit.registry.conftest import wait_until


async def test_what_is_kept_in_a_block_is_held_until_it_ends() -> None:
    """A share is held until the end of the block. A share that is added after the end is closed at once."""
    memory = MemoryBudget(SMALL_SHARE_BYTES, "bodies")

    async def fetch(scope: ShareScope) -> None:
        share = memory.share()
        await share.grow(10)
        scope.hold(share)

    with ShareScope() as scope:
        await fetch(scope)
        await fetch(scope)
        assert memory.used == 20
    assert memory.used == 0
    await fetch(scope)
    assert memory.used == 0


async def test_a_cancelled_wait_leaves_no_trace() -> None:
    """After a waiting share was cancelled, the shares behind it are served."""
    memory = MemoryBudget(4 * SMALL_SHARE_BYTES, "bodies", wait_seconds=30)
    first, second, third = memory.share(), memory.share(), memory.share()
    await first.grow(3 * SMALL_SHARE_BYTES)
    waiting = [asyncio.create_task(share.grow(2 * SMALL_SHARE_BYTES)) for share in (second, third)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.wait([waiting[0]])
    first.close()
    await waiting[1]
    assert memory.used == 2 * SMALL_SHARE_BYTES


async def test_small_shares_do_not_starve_a_large_one() -> None:
    """While a large share waits, small shares get only the last quarter of the budget, so that the large share gets
    what others release."""
    memory = MemoryBudget(16 * SMALL_SHARE_BYTES, "bodies", wait_seconds=30, slow_seconds=60)
    small = [memory.share() for _ in range(16)]
    for share in small:
        await share.grow(SMALL_SHARE_BYTES)
    large = memory.share()
    waiting = asyncio.create_task(large.grow(8 * SMALL_SHARE_BYTES))
    await asyncio.sleep(0)
    for share in small:  # each leaves, and comes again at once
        share.close()
        share.try_grow(SMALL_SHARE_BYTES)
        await asyncio.sleep(0)
    assert waiting.done()
    assert large.size == 8 * SMALL_SHARE_BYTES
    assert memory.used <= memory.size


async def test_slow_bodies_make_way_together() -> None:
    """As many slow requests are cut off at once as the waiting share needs, those that have held memory for the longest
    time first."""
    memory = MemoryBudget(
        16 * SMALL_SHARE_BYTES, "bodies", wait_seconds=1, slow_seconds=0.0
    )  # one at a look would need two seconds
    small = [memory.share() for _ in range(16)]
    cut: list[Share] = []

    def end(share: Share) -> None:
        cut.append(share)
        share.close()

    for share in small:
        await share.grow(SMALL_SHARE_BYTES)
        share.on_cut = partial(end, share)
        await asyncio.sleep(0.001)  # they have to differ in age
    async with asyncio.timeout(10):
        await memory.share().grow(4 * SMALL_SHARE_BYTES)
    assert cut == small[:8]


@pytest.mark.slow
async def test_many_who_wait_do_not_hold_the_loop() -> None:
    """A limited number of shares may wait, and further ones are refused at once. The cost of a new share does not grow
    with the number of waiting ones."""
    memory = MemoryBudget(16 * SMALL_SHARE_BYTES, "bodies", wait_seconds=1, slow_seconds=60)
    held = [memory.share() for _ in range(16)]
    for share in held:
        await share.grow(SMALL_SHARE_BYTES)
        share.on_cut = share.close

    async def come() -> bool:
        try:
            await memory.share().grow(SMALL_SHARE_BYTES)
        except TooManyRequests:
            return False
        return True

    with count_instructions() as count:
        tasks = [asyncio.create_task(come()) for _ in range(2000)]
        await wait_until(lambda: sum(task.done() for task in tasks) >= 2000 - MAX_WAITING)
        assert sum(task.done() for task in tasks) == 2000 - MAX_WAITING
        assert not any(await asyncio.gather(*tasks))
    assert count.total < 10_000_000  # looking at each one who waits for each one who comes takes four times as many
    assert memory.used == 16 * SMALL_SHARE_BYTES
