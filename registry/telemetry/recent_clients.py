"""`RecentClients`: records when container clients have last sent a request, by program and by the client's network.
With these times, the page *Set-up* shows a visitor whether the container daemon on their own machine uses this
registry.

All workers of a server share the times, in memory that is mapped before the fork. The memory has two rows of cells. A
hash of the program and the network chooses one cell in each row. Each recorded request writes its time into both cells.
Networks are not stored, so nobody can list them, and the memory does not grow. In rare cases other clients have
written to both cells. The page then shows the time of their requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from mmap import mmap
from typing import Final

from registry.asgi import Scope
from registry.client_addresses import network_of

RECENT_SECONDS: Final = 3600.0
"""Time for which a request counts as recent."""
PROGRAMS: Final = {
    b"docker": "docker",
    b"containerd": "containerd",
    b"containers": "podman",
    b"libpod": "podman",
    b"podman": "podman",
    b"buildah": "podman",
    b"buildkit": "buildkit",
}
"""The programs, by the first word of their User-Agent. podman sends the User-Agent of the library containers/image."""
_ROW_CELLS: Final = 8192
"""Cells in each of the two rows; a power of two."""
_SECOND_ROW_SHIFT: Final = 24
"""The hash is shifted right by this number of bits before it chooses the cell in the second row."""
_PAUSE_SECONDS: Final = 10.0
"""After `record` has handled a request of a connection, it ignores all requests of this connection for this time."""
_MAX_CONNECTIONS: Final = 4096
"""Largest number of connections in `RecentClients._next_record_times`."""


class RecentClients:
    """The times of the last requests. Create it before the fork. All methods return immediately and raise nothing."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """`clock` returns seconds since 1970."""
        self._clock = clock
        self._cells = memoryview(mmap(-1, 2 * 8 * _ROW_CELLS)).cast("d")
        self._next_record_times: dict[object, float] = {}
        """By connection (address and port): until when `record` ignores its requests, in seconds since 1970."""

    def record(self, scope: Scope) -> None:
        """Records the time of a request if a program in `PROGRAMS` sent it. Handles at most one request of each
        connection in `_PAUSE_SECONDS`, and ignores the others, because every request calls this method."""
        connection, now = scope["client"], self._clock()
        if self._next_record_times.get(connection, 0.0) > now:
            return
        if len(self._next_record_times) >= _MAX_CONNECTIONS:
            self._next_record_times.clear()
        self._next_record_times[connection] = now + _PAUSE_SECONDS
        agent = next((value for name, value in scope["headers"] if name == b"user-agent"), b"")
        program = PROGRAMS.get(agent.partition(b"/")[0].lower())
        if connection and program is not None:
            for cell in _cells_of(connection[0], program):
                self._cells[cell] = now

    def last_seen(self, address: str, program: str) -> float | None:
        """Returns when a program (a value of `PROGRAMS`) has last sent a request from the network of this address, in
        seconds since 1970; None if it has sent none in the last `RECENT_SECONDS`."""
        # Another client may have overwritten one of the cells with a later time. So take the older time.
        seen_at = min(self._cells[cell] for cell in _cells_of(address, program))
        return seen_at if seen_at > self._clock() - RECENT_SECONDS else None


def _cells_of(address: str, program: str) -> tuple[int, int]:
    number = hash((program, network_of(address)))  # the same in all workers: a fork keeps the seed of `hash`
    mask = _ROW_CELLS - 1
    return number & mask, _ROW_CELLS + ((number >> _SECOND_ROW_SHIFT) & mask)
