"""`AnswerMemoryLimit`: limits the memory of a process for answers that send a manifest or config byte for byte.

Each of these answers stays in memory until its client has received it. A *visitor* is an account or, for clients
without a login, the network of the client's IP address. Two rules keep one visitor, or a few slow clients, from using
up the memory:

- The answers of one visitor together get at most a quarter of the memory. A visitor's only answer may be larger.
- When an answer is refused, slow answers are ended: those whose sending began more than `SLOW_SECONDS` ago.
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
"""When another answer is refused, an answer whose sending began this many seconds ago may be ended. The largest config
has 4 MiB, so the answer to a client that receives at least 140 KB in a second is never ended."""
_RETRY_SECONDS: Final = 2
"""The value of Retry-After in a refusal, if no slow answer is ended."""


@dataclass(frozen=True, slots=True, eq=False)
class _HeldAnswer:
    """An answer that is being sent. `visitor`: a text that identifies the account or network to which the answer is
    sent. `size`: in bytes. `started`: the event loop's time when the sending began. `end`: a function that ends it."""

    visitor: str
    size: int
    started: float
    end: Callable[[], None]


class AnswerMemoryLimit:
    """Limits the memory for the answers of one process.

    - All answers together have at most `size` bytes. But if no other answer is being sent, an answer may have any size.
    - A quarter of `size` is reserved for small answers, as in every `MemoryBudget`: an answer of more than 64 KiB is
      refused if all answers together, including this one, would have more than three quarters of `size`."""

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
        """A context manager that counts an answer of `size` bytes until its block ends. `visitor`: identifies the
        client (`registry.browse.repository_browser.visitor_of`). Raises TooManyRequests if the answers of the visitor,
        or all answers, would take too much memory. If the client is too slow, the refusal of another answer may cancel
        the block. The `async with` statement then ends without an error."""
        own_answers = [answer for answer in self._answers if answer.visitor == visitor]
        own_bytes = sum([answer.size for answer in own_answers])
        if own_answers and own_bytes + size > self._max_bytes_per_visitor:
            self._refuse(own_answers, own_bytes + size - self._max_bytes_per_visitor)
        loop, timeout = asyncio.get_running_loop(), asyncio.timeout(None)
        with closing(self._budget.new_share()) as share:
            if not share.try_grow(size):
                self._refuse(tuple(self._answers), size)
            # To end the answer, let the timeout expire now, which cancels the block.
            answer = _HeldAnswer(visitor, size, loop.time(), lambda: timeout.reschedule(loop.time()))
            self._answers[answer] = None
            try:
                async with timeout:
                    yield
            except TimeoutError:
                if not timeout.expired():
                    raise
                log.info(
                    "stopped sending a manifest or config to %s: the client receives it too slowly, and others wait",
                    visitor,
                )
            finally:
                self._answers.pop(answer, None)

    def _refuse(self, answers: Iterable[_HeldAnswer], missing_bytes: int) -> NoReturn:
        """Ends those of the answers whose sending began more than `SLOW_SECONDS` ago, the oldest first, until the ended
        answers together have `missing_bytes`. Then raises TooManyRequests."""
        slow_before = asyncio.get_running_loop().time() - SLOW_SECONDS
        has_ended = False
        for answer in answers:
            if answer.started > slow_before or missing_bytes <= 0:
                break
            missing_bytes -= answer.size
            has_ended = True
            del self._answers[answer]
            answer.end()
        raise TooManyRequests(
            "too many manifests and configs are being sent; try again",
            retry_after=1 if has_ended else _RETRY_SECONDS,
        )
