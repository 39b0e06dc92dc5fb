"""Limits the rate at which bytes are read (`ReadRate`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

BURST_SECONDS: Final = 1.0
"""If a reader was slower than the rate, it may catch up without a wait. It may catch up by at most the bytes that the
rate allows in `BURST_SECONDS`."""

PAUSE_SECONDS: Final = 1.0
"""Longest sleep. `ReadRate.wait` divides a longer wait into several sleeps."""
MIN_PAUSE_SECONDS: Final = 0.001
"""`ReadRate.wait` sleeps again only if at least this time remains, because a shorter sleep usually overshoots. The next
call of `wait` adds the rest to its own wait."""


class ReadRate:
    """Makes a reader wait so that it reads at most `bytes_per_second` on average. `monotonic` returns the seconds of a
    monotonic clock, `sleep` waits for a number of seconds."""

    def __init__(
        self,
        bytes_per_second: float,
        monotonic: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bytes_per_second = bytes_per_second
        self._monotonic = monotonic or asyncio.get_running_loop().time
        self._sleep = sleep
        self._free_at = self._monotonic()
        """When the rate allows the next bytes. Each call of `wait` adds `count / bytes_per_second` seconds."""

    async def wait(self, count: int, meanwhile: Callable[[], Awaitable[None]] | None = None) -> None:
        """Waits until the rate allows the `count` bytes that the caller has just read. Lets other tasks run even if the
        rate already allows the bytes. Calls `meanwhile` after each sleep. If `meanwhile` raises an error, ends the wait
        with this error."""
        now = self._monotonic()
        self._free_at = max(self._free_at, now - BURST_SECONDS) + count / self._bytes_per_second
        while True:
            await self._sleep(min(max(self._free_at - now, 0.0), PAUSE_SECONDS))
            if meanwhile is not None:
                await meanwhile()
            now = self._monotonic()
            if self._free_at - now < MIN_PAUSE_SECONDS:
                return
