"""The memory budget for the bodies of requests and responses. Each body has a share of the budget. If the budget is
used up, shares wait, and slow requests may be cut off."""

from __future__ import annotations

import asyncio
from functools import partial

import pytest

from registry.memory_budget import MAX_CUT_AT_ONCE, MAX_WAITING, SMALL_SHARE_BYTES, MemoryBudget, Share, ShareScope
from storage.errors import TooManyRequests
from tests.fakes.instruction_count import count_instructions
from tests.unit.registry.conftest import wait_until


async def test_shares_of_a_scope_are_released_at_its_end() -> None:
    """The shares that a `ShareScope` holds are released at the end of its `with` block. A share that is added after the
    end is released at once."""
    memory = MemoryBudget(SMALL_SHARE_BYTES, "bodies")

    async def fetch(scope: ShareScope) -> None:
        share = memory.new_share()
        await share.grow(10)
        scope.hold(share)

    with ShareScope() as scope:
        await fetch(scope)
        await fetch(scope)
        assert memory.used == 20
    assert memory.used == 0
    await fetch(scope)
    assert memory.used == 0


async def test_a_cancelled_wait_does_not_block_other_shares() -> None:
    """If the wait of a share is cancelled, the shares that wait behind it still get memory."""
    memory = MemoryBudget(4 * SMALL_SHARE_BYTES, "bodies", wait_seconds=30)
    first, second, third = memory.new_share(), memory.new_share(), memory.new_share()
    await first.grow(3 * SMALL_SHARE_BYTES)
    grow_tasks = [asyncio.create_task(share.grow(2 * SMALL_SHARE_BYTES)) for share in (second, third)]
    await asyncio.sleep(0)
    grow_tasks[0].cancel()
    await asyncio.wait([grow_tasks[0]])
    first.close()
    await grow_tasks[1]
    assert memory.used == 2 * SMALL_SHARE_BYTES


async def test_memory_is_not_granted_to_a_cancelled_wait() -> None:
    """If the wait of a share is cancelled, and memory becomes free before the waiting task runs again, the memory goes
    to the next share."""
    memory = MemoryBudget(4 * SMALL_SHARE_BYTES, "bodies", wait_seconds=30)
    first, second, third = memory.new_share(), memory.new_share(), memory.new_share()
    await first.grow(3 * SMALL_SHARE_BYTES)
    grow_tasks = [asyncio.create_task(share.grow(2 * SMALL_SHARE_BYTES)) for share in (second, third)]
    await asyncio.sleep(0)
    grow_tasks[0].cancel()
    first.close()
    await grow_tasks[1]
    assert grow_tasks[0].cancelled()
    assert (second.size, third.size, memory.used) == (0, 2 * SMALL_SHARE_BYTES, 2 * SMALL_SHARE_BYTES)


async def test_small_shares_do_not_starve_a_large_one() -> None:
    """While a large share waits, small shares may use only the last quarter of the budget, so that the large share gets
    the memory that others release."""
    memory = MemoryBudget(16 * SMALL_SHARE_BYTES, "bodies", wait_seconds=30, slow_seconds=60)
    small = [memory.new_share() for _ in range(16)]
    for share in small:
        await share.grow(SMALL_SHARE_BYTES)
    large = memory.new_share()
    waiting = asyncio.create_task(large.grow(8 * SMALL_SHARE_BYTES))
    await asyncio.sleep(0)
    for share in small:  # each share is released and requested again at once
        share.close()
        share.try_grow(SMALL_SHARE_BYTES)
        await asyncio.sleep(0)
    assert waiting.done()
    assert large.size == 8 * SMALL_SHARE_BYTES
    assert memory.used <= memory.size


async def test_several_slow_requests_are_cut_off_at_once() -> None:
    """If a share waits, as many slow requests are cut off at the same time as the share needs. The requests that have
    held memory for the longest time are cut off first."""
    # If only one request was cut off at a time, the share would have to wait two seconds.
    memory = MemoryBudget(16 * SMALL_SHARE_BYTES, "bodies", wait_seconds=1, slow_seconds=0.0)
    small = [memory.new_share() for _ in range(16)]
    cut_off: list[Share] = []

    def cut_off_request(share: Share) -> None:
        cut_off.append(share)
        share.close()

    for share in small:
        await share.grow(SMALL_SHARE_BYTES)
        share.on_cut = partial(cut_off_request, share)
        await asyncio.sleep(0.001)  # each share gets a different age
    async with asyncio.timeout(10):
        await memory.new_share().grow(4 * SMALL_SHARE_BYTES)
    # Four for the share, and four because the last quarter of the budget is kept for small shares.
    assert cut_off == small[:8]


async def test_a_limited_number_of_requests_is_cut_off_in_one_step() -> None:
    """If many slow requests have to be cut off, only `MAX_CUT_AT_ONCE` of them are cut off in one step, so that the
    event loop can handle other events in between."""
    count = MAX_CUT_AT_ONCE + 20
    memory = MemoryBudget(count * SMALL_SHARE_BYTES, "bodies", wait_seconds=30, slow_seconds=0.0)
    cut_off: list[Share] = []

    def cut_off_request(share: Share) -> None:
        cut_off.append(share)
        share.close()

    for _ in range(count):
        share = memory.new_share()
        await share.grow(SMALL_SHARE_BYTES)
        share.on_cut = partial(cut_off_request, share)
    await asyncio.sleep(0.001)  # the requests are older than 0 seconds
    async with asyncio.timeout(10):
        waiting = asyncio.create_task(memory.new_share().grow(count * SMALL_SHARE_BYTES))
        await asyncio.sleep(0)
        assert len(cut_off) == MAX_CUT_AT_ONCE
        await waiting
    assert len(cut_off) == count


@pytest.mark.slow
async def test_many_waiting_shares_do_not_block_the_event_loop() -> None:
    """A limited number of shares may wait; further shares are refused at once. The cost of a request for a share does
    not grow with the number of waiting shares."""
    memory = MemoryBudget(16 * SMALL_SHARE_BYTES, "bodies", wait_seconds=1, slow_seconds=60)
    full_shares = [memory.new_share() for _ in range(16)]
    for share in full_shares:
        await share.grow(SMALL_SHARE_BYTES)
        share.on_cut = share.close

    async def request_share() -> bool:
        try:
            await memory.new_share().grow(SMALL_SHARE_BYTES)
        except TooManyRequests:
            return False
        return True

    with count_instructions() as count:
        tasks = [asyncio.create_task(request_share()) for _ in range(2000)]
        await wait_until(lambda: sum(task.done() for task in tasks) >= 2000 - MAX_WAITING)
        assert sum(task.done() for task in tasks) == 2000 - MAX_WAITING
        assert not any(await asyncio.gather(*tasks))
    assert count.total < 10_000_000  # a loop over all waiting shares for each new one would take four times as many
    assert memory.used == 16 * SMALL_SHARE_BYTES


async def test_one_client_gets_a_quarter_of_the_budget() -> None:
    """The shares of one client get at most a quarter of the budget together. A further one is refused at once, even if
    memory is free, and can grow when another share of the client is closed. Other clients are not affected."""
    memory = MemoryBudget(16 * SMALL_SHARE_BYTES, "bodies", wait_seconds=30)
    own = [memory.new_share(client="a") for _ in range(5)]
    for share in own[:4]:
        await share.grow(SMALL_SHARE_BYTES)
    with pytest.raises(TooManyRequests, match=r"the memory for bodies of this client is in use"):
        await own[4].grow(1)
    await memory.new_share(client="b").grow(SMALL_SHARE_BYTES)
    await memory.new_share().grow(SMALL_SHARE_BYTES)
    own[0].close()
    await own[4].grow(SMALL_SHARE_BYTES)
    assert memory.used == 6 * SMALL_SHARE_BYTES


async def test_a_share_of_a_client_may_be_large_if_it_is_the_only_one() -> None:
    """A share may be larger than a quarter of the budget if its client has no other one."""
    memory = MemoryBudget(16 * SMALL_SHARE_BYTES, "bodies", wait_seconds=30)
    large = memory.new_share(client="a")
    await large.grow(8 * SMALL_SHARE_BYTES)
    await large.grow(SMALL_SHARE_BYTES)
    second = memory.new_share(client="a")
    assert not second.try_grow(1)
    large.close()
    assert second.try_grow(1)


async def test_one_client_gets_a_part_of_the_queue() -> None:
    """Shares of a few bytes that wait count as 16 KiB for the limit of their client. So one client cannot fill the
    queue, and shares of others can wait in it. A share that stops waiting no longer counts."""
    memory = MemoryBudget(16 * SMALL_SHARE_BYTES, "bodies", wait_seconds=30, slow_seconds=60)
    for _ in range(16):
        await memory.new_share().grow(SMALL_SHARE_BYTES)
    own = [memory.new_share(client="a") for _ in range(17)]
    waiting = [asyncio.create_task(share.grow(2)) for share in own]
    await asyncio.wait([waiting[16]])
    assert isinstance(waiting[16].exception(), TooManyRequests)
    assert not any(task.done() for task in waiting[:16])
    waiting[0].cancel()
    await asyncio.wait([waiting[0]])
    late = asyncio.create_task(memory.new_share(client="a").grow(2))
    await asyncio.sleep(0)
    assert not late.done()
    for task in (*waiting[1:16], late):
        task.cancel()
