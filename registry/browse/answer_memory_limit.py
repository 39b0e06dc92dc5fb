"""`AnswerMemoryLimit`: limits the memory of a process for answers that send a manifest or config byte for byte.

Such an answer stays in memory until its client has received it. A *visitor* is an account or, for clients without a
login, the network of the client's IP address. Two rules keep one visitor, or a few slow clients, from using up the
memory:

- The answers of one visitor together get at most a quarter of the memory. An answer may be larger if its visitor
  gets no other at the same time.
- When an answer is refused, answers whose sending began more than `SLOW_SECONDS` ago are ended.
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
"""When another answer is refused, an answer whose sending began this many seconds ago is ended. The largest config has
4 MiB, so a client that receives at least 140 KB in a second is never too slow."""
_RETRY_SECONDS: Final = 2
"""The value of Retry-After in a refusal, if no slow answer is ended."""


@dataclass(frozen=True, slots=True, eq=False)
class _HeldAnswer:
    """An answer that is being sent. `visitor`: a text that identifies the account or network to which it is sent.
    `size`: its bytes. `since`: the event loop's time when it began. `end`: ends it."""

    visitor: str
    size: int
    since: float
    end: Callable[[], None]


class AnswerMemoryLimit:
    """Limits the memory for the answers of one process: all answers together have at most `size` bytes, except that a
    single answer may have any size if there are no others. As in every `MemoryBudget`, a quarter of `size` is reserved
    for small answers: an answer of more than 64 KiB is refused if all answers together would then have more than three
    quarters of `size`."""

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
        client (`registry.browse.repository_browser.visitor_of`). Raises TooManyRequests if there is too little memory,
        for the visitor or for all. If the client is too slow, the refusal of another answer may cancel the block. The
        `async with` statement then ends without an error."""
        own_answers = [answer for answer in self._answers if answer.visitor == visitor]
        own_bytes = sum([answer.size for answer in own_answers])
        if own_answers and own_bytes + size > self._max_bytes_per_visitor:
            self._refuse(own_answers, own_bytes + size - self._max_bytes_per_visitor)
        loop, cancellation = asyncio.get_running_loop(), asyncio.timeout(None)
        with closing(self._budget.new_share()) as share:
            if not share.try_grow(size):
                self._refuse(tuple(self._answers), size)
            # To end the answer, let the timeout expire now, which cancels the block.
            answer = _HeldAnswer(visitor, size, loop.time(), lambda: cancellation.reschedule(loop.time()))
            self._answers[answer] = None
            try:
                async with cancellation:
                    yield
            except TimeoutError:
                if not cancellation.expired():
                    raise
                log.info(
                    "stopped sending a manifest or config to %s: the client receives it too slowly, and others wait",
                    visitor,
                )
            finally:
                self._answers.pop(answer, None)

    def _refuse(self, answers: Iterable[_HeldAnswer], missing_bytes: int) -> NoReturn:
        """Ends those of the answers whose sending began more than `SLOW_SECONDS` ago, the oldest first, until the ended
        answers have `missing_bytes` together. Raises TooManyRequests."""
        slow_before = asyncio.get_running_loop().time() - SLOW_SECONDS
        has_ended = False
        for answer in answers:
            if answer.since > slow_before or missing_bytes <= 0:
                break
            missing_bytes -= answer.size
            has_ended = True
            del self._answers[answer]
            answer.end()
        raise TooManyRequests(
            "too many manifests and configs are being sent; try again",
            retry_after=1 if has_ended else _RETRY_SECONDS,
        )
