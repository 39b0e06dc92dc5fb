"""Records who needs the blob of a running fill (`Demand`), and whether a client still pulls an image (`ImagePull`).

A *fill* is the work of one process to get one blob. A *reader* reads the blob for one client. A *prefetched* blob is
downloaded before a client requests it, because a client will probably request it soon.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

PULL_IDLE_SECONDS: Final = 60.0
"""Time for which a pull stays active after its last request, or after its last reader was closed."""


class ImagePull:
    """A client's pull of one image. It is *active* while the client requests parts of the image."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: returns seconds of a monotonic clock."""
        self._clock = clock
        self._reader_count = 0
        """Number of open readers of the image's blobs."""
        self._last_active_at = clock()
        """Time of the pull's last request, or of the last close of a reader."""

    def add_reader(self) -> None:
        """Records that a reader of one of the image's blobs was opened."""
        self._reader_count += 1

    def remove_reader(self) -> None:
        """Records that a reader of one of the image's blobs was closed."""
        self._reader_count -= 1
        self._last_active_at = self._clock()

    def touch(self) -> None:
        """Records a request that belongs to the pull."""
        self._last_active_at = self._clock()

    def is_active(self) -> bool:
        """Returns whether a reader is open, or whether a request was made or a reader was closed less than
        `PULL_IDLE_SECONDS` ago."""
        return self._reader_count > 0 or self._clock() - self._last_active_at < PULL_IDLE_SECONDS


class Demand:
    """Records which clients and pulls need the blob of a running fill. A fill is *unattended* when a client has
    requested the blob, and all clients have left."""

    def __init__(self) -> None:
        self.requested = asyncio.Event()
        """Set when a client of any process has requested the blob. The blob is then downloaded completely, even if the
        client leaves, unless `give_up` clears the event."""
        self.had_slot = False
        """Whether the fill has ever had a slot, the permit to download from the upstream."""
        self._client_count = 0
        """Number of requests and open readers of this process."""
        self._has_clients_elsewhere = False
        self._watchers: list[Callable[[], None]] = []
        """Called when `has_clients` has changed, and by `give_up`."""
        self.pulls: set[ImagePull] = set()
        """The pulls for which the blob is prefetched. Until a client has requested the blob, it is downloaded only
        while one of these pulls is active."""
        self._waiting_readers: Counter[int] = Counter()
        """Number of waiting readers, by the offset of the byte that they wait for."""
        self._reader_offsets: list[int] = []
        """The keys of `_waiting_readers`, in ascending order."""

    @property
    def has_clients(self) -> bool:
        """Whether a client of any process waits for the blob or receives it."""
        return self._client_count > 0 or self._has_clients_elsewhere

    @property
    def has_clients_here(self) -> bool:
        """Whether a client of this process waits for the blob or receives it."""
        return self._client_count > 0

    @property
    def has_clients_elsewhere(self) -> bool:
        """Whether clients of other processes waited for the blob at the last call of `set_clients_elsewhere`."""
        return self._has_clients_elsewhere

    @property
    def is_unattended(self) -> bool:
        """Whether a client has requested the blob, and all clients have left."""
        return self.requested.is_set() and not self.has_clients

    def add_client(self) -> None:
        """Records that a client of this process has requested the blob, or that a reader was opened."""
        self._set_clients(self._client_count + 1, self._has_clients_elsewhere)

    def remove_client(self) -> None:
        """Records that a request for the blob has ended, or that a reader was closed."""
        self._set_clients(self._client_count - 1, self._has_clients_elsewhere)

    @contextmanager
    def client(self) -> Iterator[None]:
        """Registers a client of this process inside the `with` block."""
        self.add_client()
        try:
            yield
        finally:
            self.remove_client()

    def set_clients_elsewhere(self, has_clients: bool) -> None:
        """Records whether clients of other processes wait for the blob."""
        self._set_clients(self._client_count, has_clients)

    def _set_clients(self, client_count: int, has_clients_elsewhere: bool) -> None:
        had_clients = self.has_clients
        self._client_count, self._has_clients_elsewhere = client_count, has_clients_elsewhere
        if self.has_clients:
            self.requested.set()
        if self.has_clients != had_clients:
            self._notify()

    def give_up(self) -> None:
        """If the fill is unattended, makes it end before the blob is downloaded completely. If a client requests the
        blob again before the fill has ended, the fill continues."""
        if self.is_unattended:
            self.requested.clear()
            self.pulls.clear()
            self._notify()

    @contextmanager
    def watching(self, on_change: Callable[[], None]) -> Iterator[None]:
        """Calls `on_change` each time that `has_clients` changes inside the `with` block, and after `give_up`."""
        self._watchers.append(on_change)
        try:
            yield
        finally:
            self._watchers.remove(on_change)

    def _notify(self) -> None:
        for watcher in list(self._watchers):
            watcher()

    def needs_blob(self) -> bool:
        """Returns whether a client has requested the blob (`requested`), or a pull in `pulls` is active. A request
        counts even if its client has left."""
        return self.requested.is_set() or any(pull.is_active() for pull in self.pulls)

    @property
    def reader_offsets(self) -> Sequence[int]:
        """The offsets of the bytes that readers wait for, in ascending order. The sequence changes when a reader begins
        or stops waiting."""
        return self._reader_offsets

    @contextmanager
    def waiting(self, offset: int) -> Iterator[None]:
        """Registers, inside the `with` block, a reader that waits for the byte at `offset`."""
        self._waiting_readers[offset] += 1
        if self._waiting_readers[offset] == 1:
            insort(self._reader_offsets, offset)
        try:
            yield
        finally:
            self._waiting_readers[offset] -= 1
            if not self._waiting_readers[offset]:
                del self._waiting_readers[offset]
                del self._reader_offsets[bisect_left(self._reader_offsets, offset)]


class ClientsChanged(Exception):
    """The first client of a fill has come, the last one has left, or the fill was given up."""


async def run_until_change(demand: Demand, work: Awaitable[object]) -> None:
    """Awaits `work`. Cancels `work` and raises ClientsChanged if, in the meantime, `demand.has_clients` changes or the
    fill is given up."""
    try:
        async with asyncio.timeout(None) as limit:

            def stop() -> None:
                if not limit.expired():
                    limit.reschedule(asyncio.get_running_loop().time())

            with demand.watching(stop):
                await work
    except TimeoutError:
        if not limit.expired():
            raise
        raise ClientsChanged from None
