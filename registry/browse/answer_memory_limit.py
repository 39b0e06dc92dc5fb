"""`AnswerMemoryLimit`: limits the memory of a process for answers that send a manifest or config byte for byte.

Each of these answers stays in memory until its client has received it. A *visitor* is an account or, for clients
without a login, the network of the client's IP address. Two rules keep one visitor, or a few slow clients, from using
up the memory:

- The answers of one visitor together get at most a quarter of the memory. If a visitor gets only one answer at a time,
  this answer may be larger.
- When an answer is refused, answers whose sending began more than `SLOW_SECONDS` ago can be ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from typing import Final, NoReturn

from registry.memory_budget import MemoryBudget
from storage.errors import TooManyRequests

log = logging.getLogger("registry.management")

SLOW_SECONDS: Final = 30.0
"""An answer whose sending takes longer than this may be ended. A client that receives 140 KB per second gets the
largest config (4 MiB) in this time."""
_RETRY_SECONDS: Final = 2
"""The value of the header Retry-After if an answer is refused and no slow answer can be ended. If a slow answer is
ended, the value is 1."""


@dataclass(frozen=True, slots=True, eq=False)
class _HeldAnswer:
    """An answer that is being sent. `visitor`: a text that identifies the account or network to which the answer is
    sent. `size`: in bytes. `started_at`: the event loop's time when the sending began. `end`: stops the sending."""

    visitor: str
    size: int
    started_at: float
    end: Callable[[], None]


class AnswerMemoryLimit:
    """Limits the memory for the answers of one process.

    - All answers together have at most `size` bytes. But an answer may have any size while no other answer is being
      sent.
    - An answer of more than 64 KiB is refused if all answers together, including this one, would have more than three
      quarters of `size`. The last quarter is reserved for smaller answers (`MemoryBudget`)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._budget = MemoryBudget(size, "manifests and configs")
        self._max_bytes_per_visitor = size // 4
        self._answers: dict[_HeldAnswer, None] = {}
        """The answers that are being sent and not ended, the oldest first."""

    @property
    def used(self) -> int:
        """How many bytes the answers have together."""
        return self._budget.used

    @asynccontextmanager
    async def hold(self, visitor: str, size: int) -> AsyncIterator[None]:
        """Counts an answer of `size` bytes inside the `async with` block, which sends the answer. `visitor`: identifies
        the client (`registry.browse.repository_browser.visitor_of`). Raises TooManyRequests if the answers of the
        visitor, or all answers, would take too much memory.

        If the client receives the answer too slowly, the block may be cancelled. The `async with` statement then ends
        without an error."""
        own_answers = [answer for answer in self._answers if answer.visitor == visitor]
        own_bytes = sum([answer.size for answer in own_answers])
        if own_answers and own_bytes + size > self._max_bytes_per_visitor:
            self._refuse(own_answers, own_bytes + size - self._max_bytes_per_visitor)
        loop, timeout = asyncio.get_running_loop(), asyncio.timeout(None)
        with closing(self._budget.new_share()) as share:
            if not share.try_grow(size):
                self._refuse(tuple(self._answers), size)
            # An answer is ended by its timeout: when the timeout expires, it cancels the block.
            answer = _HeldAnswer(visitor, size, loop.time(), lambda: timeout.reschedule(loop.time()))
            self._answers[answer] = None
            try:
                async with timeout:
                    yield
            except TimeoutError:
                if not timeout.expired():
                    raise
                log.info(
                    "stopped sending a manifest or config to %s: the client is too slow, and other answers need memory",
                    visitor,
                )
            finally:
                self._answers.pop(answer, None)

    def _refuse(self, answers: Iterable[_HeldAnswer], missing_bytes: int) -> NoReturn:
        """Raises TooManyRequests. First ends slow answers among `answers`, the oldest first, until the ended answers
        together have `missing_bytes` bytes. Answers are slow if their sending began more than `SLOW_SECONDS` ago."""
        slow_before = asyncio.get_running_loop().time() - SLOW_SECONDS
        has_ended = False
        for answer in answers:
            if answer.started_at > slow_before or missing_bytes <= 0:
                break
            missing_bytes -= answer.size
            has_ended = True
            del self._answers[answer]
            answer.end()
        raise TooManyRequests(
            "too many manifests and configs are being sent; try again",
            retry_after=1 if has_ended else _RETRY_SECONDS,
        )
