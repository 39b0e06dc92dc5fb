"""Says who needs the blob of a running fill (`Demand`), and whether a client still pulls the image for which a blob is
prefetched (`ImagePull`).

A *fill* is the work of one process to get one blob. A *prefetched* blob is downloaded because a client will probably
request it soon.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

PULL_IDLE_SECONDS: Final = 60.0
"""A pull is no longer active when its last request was this long ago."""


class ImagePull:
    """A client's pull of one image. It is *active* while the client requests parts of the image."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: returns seconds of a monotonic clock."""
        self._clock = clock
        self._readers = 0
        """Number of open readers of the image's blobs."""
        self._last_request = clock()
        """Time of the last request that belongs to the pull."""

    def enter(self) -> None:
        """Records that a reader of one of the image's blobs was opened."""
        self._readers += 1

    def leave(self) -> None:
        """Records that a reader of one of the image's blobs was closed."""
        self._readers -= 1
        self._last_request = self._clock()

    def touch(self) -> None:
        """Records a request that belongs to the pull."""
        self._last_request = self._clock()

    def is_active(self) -> bool:
        """Returns whether a reader is open, or the last request was made less than `PULL_IDLE_SECONDS` ago."""
        return self._readers > 0 or self._clock() - self._last_request < PULL_IDLE_SECONDS


class Demand:
    """Says which clients and pulls need the blob of a running fill."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        """Set when a client of any process has requested the blob. The blob is then downloaded completely, even if the
        client disconnects."""
        self.pulls: set[ImagePull] = set()
        """The pulls for which the blob is prefetched. If no client has requested the blob, it is downloaded only while
        one of these pulls is active."""
        self._waiting_readers: Counter[int] = Counter()
        """Number of waiting readers, by the offset of the byte that they wait for."""
        self._offsets: list[int] = []
        """The keys of `_waiting_readers`, in ascending order."""

    def request(self) -> None:
        """Records that a client has requested the blob."""
        self.requested.set()

    def is_alive(self) -> bool:
        """Returns whether a client or an active pull needs the blob, so that its download should continue."""
        return self.requested.is_set() or any(pull.is_active() for pull in self.pulls)

    @property
    def offsets(self) -> Sequence[int]:
        """The offsets of the bytes that readers wait for, in ascending order. The sequence changes when a reader begins
        or stops waiting."""
        return self._offsets

    @contextmanager
    def waiting(self, offset: int) -> Iterator[None]:
        """Registers, inside the `with` block, a reader that waits for the byte at `offset`."""
        self._waiting_readers[offset] += 1
        if self._waiting_readers[offset] == 1:
            insort(self._offsets, offset)
        try:
            yield
        finally:
            self._waiting_readers[offset] -= 1
            if not self._waiting_readers[offset]:
                del self._waiting_readers[offset]
                del self._offsets[bisect_left(self._offsets, offset)]
