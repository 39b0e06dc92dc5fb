"""Limits the rate at which bytes are read (`ReadRate`)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

MAX_BURST_SECONDS: Final = 1.0
"""A reader that was slower than the rate may read a burst of bytes without a wait: at most as many bytes as the rate
allows in this time."""

MAX_SLEEP_SECONDS: Final = 1.0
"""Longest sleep. `ReadRate.wait` divides a longer wait into several sleeps."""
MIN_SLEEP_SECONDS: Final = 0.001
"""`ReadRate.wait` returns if less than this time remains, because a shorter sleep usually overshoots. The next call of
`wait` waits for the rest."""


class ReadRate:
    """Makes a reader wait, so that it reads at most `bytes_per_second` on average. `monotonic` returns the time of a
    monotonic clock in seconds; None: the clock of the running event loop. `sleep` waits for a number of seconds."""

    def __init__(
        self,
        bytes_per_second: float,
        monotonic: Callable[[], float] | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bytes_per_second = bytes_per_second
        self._monotonic = monotonic or asyncio.get_running_loop().time
        self._sleep = sleep
        self._allowed_at = self._monotonic()
        """The earliest time at which the rate allows all bytes that were read so far, in seconds of the clock. `wait`
        sleeps until this time. The time is in the past if the reader was slower than the rate."""

    async def wait(self, count: int, meanwhile: Callable[[], Awaitable[None]] | None = None) -> None:
        """Waits until the rate allows the `count` bytes that the caller has just read. Sleeps at least once, for 0
        seconds if no wait is necessary, so that other tasks can run. Calls `meanwhile` after each sleep. An error of
        `meanwhile` ends the wait and is raised."""
        now = self._monotonic()
        self._allowed_at = max(self._allowed_at, now - MAX_BURST_SECONDS) + count / self._bytes_per_second
        while True:
            await self._sleep(min(max(self._allowed_at - now, 0.0), MAX_SLEEP_SECONDS))
            if meanwhile is not None:
                await meanwhile()
            now = self._monotonic()
            if self._allowed_at - now < MIN_SLEEP_SECONDS:
                return
