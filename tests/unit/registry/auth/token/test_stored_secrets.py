"""Tasks that record when an API token or a login session was last used."""

from __future__ import annotations

import asyncio
from functools import partial

from registry.auth.token.stored_secrets import LastUseWrites


async def test_one_write_runs_for_each_id() -> None:
    """While a write runs for an id, no second one starts for it. Writes for other ids start. After the end of a write,
    even with an error, the next one for its id can start."""
    started: list[str] = []
    may_end = asyncio.Event()

    async def write(used_id: str) -> None:
        started.append(used_id)
        await may_end.wait()
        raise OSError("the disk failed")

    writes = LastUseWrites()
    for used_id in ("one", "one", "two"):
        writes.start(used_id, partial(write, used_id))
    await asyncio.sleep(0)
    assert started == ["one", "two"]
    may_end.set()
    await writes.wait_until_idle()
    writes.start("one", partial(write, "one"))
    await writes.wait_until_idle()
    assert started == ["one", "two", "one"]


async def test_the_next_write_can_start_as_soon_as_one_has_ended() -> None:
    """A write that starts at once after the end of the one before is not left out, even if the event loop has not run
    the callbacks of the ended task yet."""
    started: list[int] = []

    async def write(number: int) -> None:
        started.append(number)

    writes = LastUseWrites()
    for number in range(3):
        writes.start("one", partial(write, number))
        await asyncio.sleep(0)  # runs the write to its end, but not yet the callbacks of its task
    await writes.wait_until_idle()
    assert started == [0, 1, 2]
