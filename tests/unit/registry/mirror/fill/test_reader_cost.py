"""How much work the readers of a blob cause while the blob is downloaded. The tests count operations instead of
measuring time."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack

import pytest

from registry.mirror.fill.demand import Demand
from registry.mirror.fill.pieces import MIB, PiecePlan
from storage.blobs.files.partial_waiters import PartialWaiters
from tests.fakes.counted_int import CountedInt


@pytest.mark.parametrize("readers", [20, 2000])
@pytest.mark.parametrize("gaps", [1, 2000])
def test_choice_of_the_next_piece_takes_few_steps(readers: int, gaps: int) -> None:
    """However many readers wait and however many ranges are missing, the choice of the next piece takes fewer than 300
    comparisons, and so does the registration of another reader."""
    gap_bytes = 4000 * MIB // gaps
    plan = PiecePlan(
        (CountedInt(number * 2 * gap_bytes), CountedInt(number * 2 * gap_bytes + gap_bytes)) for number in range(gaps)
    )
    demand = Demand()
    with ExitStack() as waiting:
        for number in range(readers):
            waiting.enter_context(demand.waiting(CountedInt(number * 8000 * MIB // readers)))
        for _ in range(20):
            CountedInt.operations = 0
            piece = plan.take(MIB, demand.reader_offsets)
            assert CountedInt.operations < 300
            assert piece is not None
            plan.give_back(piece)
            with demand.waiting(CountedInt(piece.start + 5)):
                assert CountedInt.operations < 300
    assert not demand.reader_offsets


class CountedFile:
    """A file that grows while tasks wait for its bytes. `stored`: how many bytes are stored. `calls` counts the calls
    of `stored_until`. `is_notified` and `checked_at` are for `PartialWaiters` alone."""

    is_owned_here = True  # this process writes the file

    def __init__(self) -> None:
        self.is_notified = False
        self.checked_at = 0.0
        self.stored = 0
        self.calls = 0

    def refresh(self) -> None:
        pass

    def stored_until(self, offset: int) -> int | None:
        self.calls += 1
        return self.stored if offset < self.stored else None


async def test_new_waiter_does_not_check_the_others() -> None:
    """Each of 500 tasks waits for a byte and then for another one. `PartialWaiters` checks each task a few times in
    all. If each new waiter made it check all others, there would be hundreds of checks for each task."""
    waiters, file, tasks = PartialWaiters(), CountedFile(), 500

    async def read() -> None:
        assert await waiters.wait(file, 0) > 0
        await waiters.wait(file, 10)

    reading = [asyncio.create_task(read()) for _ in range(tasks)]
    for stored in (5, 20):
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        file.stored = stored
        waiters.notify(file)
        while file.is_notified:  # noqa: ASYNC110  the file has no event to wait for
            await asyncio.sleep(0.001)
    await asyncio.gather(*reading)
    assert file.calls <= 6 * tasks
    waiters.close()
