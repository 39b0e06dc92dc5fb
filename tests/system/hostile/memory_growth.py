"""How much memory the workers use while two hundred clients send the same kind of request at the same time."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.fakes.process_resources import pss_of
from tests.fakes.server_process import RegistryServer
from tests.system.hostile import attack_requests

CLIENTS = 200
BOUND = 300 << 20
"""Bytes that the workers may grow by together: what docs/en/security.md promises."""
KEPT = 100 << 20
"""Bytes that they may still have more once all clients have gone: caches, and what the allocator has not given back."""
KILL_ABOVE = 2 * BOUND
"""Bytes of growth from which nothing more needs to be known."""
EVERY = 0.05
STEADY = 12
"""Looks without a new peak after which no more is expected."""
MAX_SECONDS = 40.0
"""Seconds that clients stay at the most, and that shrinking may take."""


@dataclass(frozen=True)
class Growth:
    """Bytes of memory above the start: the peak, and the rest at the end."""

    peak: int
    kept: int

    def __str__(self) -> str:
        return f"{self.peak / (1 << 20):.0f} MiB at the most, {self.kept / (1 << 20):.0f} MiB in the end"


@dataclass(frozen=True)
class ClientLoad:
    """What each client does: it sends `request(number)`, and then reads the response or not. `holds`: after it has sent
    everything, it keeps the connection until the memory no longer grows."""

    request: Callable[[int], Sequence[bytes]]
    reads: bool = True
    holds: bool = False


class _Client:
    """One connection, in a thread of its own."""

    def __init__(self, port: int, pieces: Sequence[bytes], crowd: ClientLoad, start: threading.Barrier) -> None:
        self._crowd = crowd
        self._pieces = pieces
        self._start = start
        self._sock = socket.socket()
        if not crowd.reads:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._sock.settimeout(attack_requests.TIMEOUT)
        self._sock.connect(("127.0.0.1", port))
        self.status = 0
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self._start.wait()
        with contextlib.suppress(OSError):
            attack_requests.send(self._sock, self._pieces)
            if self._crowd.reads and not self._crowd.holds:
                self.status = attack_requests.read(self._sock, keep=64).status

    def done(self, steady: bool) -> bool:
        """Returns whether the client has its response. A client that waits for none is done when the memory is
        `steady`."""
        waits = self._crowd.holds or not self._crowd.reads
        return steady if waits else not self.thread.is_alive()

    def leave(self) -> None:
        """Disconnects."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self._sock.close()


def grow(server: RegistryServer, crowd: ClientLoad, before: int, clients: int = CLIENTS) -> Growth:
    """Runs all clients at the same time, and watches the memory of the workers until the clients have gone and the
    memory is released, or until the time is up. `before`: the bytes at the start. A server that uses far too much
    memory is killed, so that the machine keeps working."""
    pids = server.worker_pids()
    start = threading.Barrier(clients + 1)
    running = [_Client(server.port, crowd.request(number), crowd, start) for number in range(clients)]
    start.wait()
    try:
        peak = _watch(pids, before, running)
    finally:
        if pss_of(pids) - before > KILL_ABOVE:
            server.kill()
        for client in running:
            client.leave()
    if server.ended:
        return Growth(peak - before, peak - before)
    until = time.monotonic() + MAX_SECONDS
    kept = pss_of(pids)
    while kept - before > KEPT and time.monotonic() < until:
        peak = max(peak, kept)
        threading.Event().wait(EVERY)
        kept = pss_of(pids)
    return Growth(max(peak, kept) - before, kept - before)


def _watch(pids: Sequence[int], before: int, running: Sequence[_Client]) -> int:
    """Returns the peak of the processes' memory, until all clients have their responses, or, if they wait for none,
    until the memory no longer grows."""
    peak, since, until = 0, 0, time.monotonic() + MAX_SECONDS
    while time.monotonic() < until:
        now = pss_of(pids)
        since = 0 if now > peak else since + 1
        peak = max(peak, now)
        if peak - before > KILL_ABOVE or all(client.done(since >= STEADY) for client in running):
            break
        threading.Event().wait(EVERY)
    return peak
