"""Measures how much memory the workers use while two hundred clients send the same kind of request at the same time."""

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
MAX_GROWTH_BYTES = 300 << 20
"""The maximum growth of all workers together, as docs/en/security.md states it."""
MAX_KEPT_BYTES = 100 << 20
"""The maximum growth that may remain after all clients have disconnected: caches, and memory that the allocator has not
released."""
KILL_ABOVE_BYTES = 2 * MAX_GROWTH_BYTES
"""The growth above which the measurement stops and the server is killed."""
INTERVAL_SECONDS = 0.1
"""Time between two measurements."""
STEADY_MEASUREMENTS = 6
"""After this number of measurements without a new peak, the memory counts as steady."""
LONG_STEADY_MEASUREMENTS = 30
"""After this number of measurements without a new peak, clients that wait for responses leave as well. The workers then
answer a few requests at a time, and the memory does not grow any more."""
MAX_SECONDS = 40.0
"""The maximum time for which the clients stay connected, and for which the release of the memory may last."""


@dataclass(frozen=True)
class Growth:
    """The growth of the memory in bytes: at its peak, and after the clients have disconnected."""

    peak: int
    kept: int

    def __str__(self) -> str:
        return f"{self.peak / (1 << 20):.0f} MiB at the most, {self.kept / (1 << 20):.0f} MiB in the end"


@dataclass(frozen=True)
class ClientLoad:
    """What each of the clients does. It sends `request(number)`, and reads the response if `reads` is set. `holds`: the
    request is incomplete, so the client gets no response, and keeps its connection until the memory no longer grows."""

    request: Callable[[int], Sequence[bytes]]
    reads: bool = True
    holds: bool = False


class _Client:
    """One connection, in a thread of its own."""

    def __init__(self, port: int, pieces: Sequence[bytes], load: ClientLoad, start: threading.Barrier) -> None:
        self._load = load
        self._pieces = pieces
        self._start = start
        self._sock = socket.socket()
        if not load.reads:  # the kernel then buffers only a small part of the response
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
            if self._load.reads and not self._load.holds:
                self.status = attack_requests.read(self._sock, max_kept=64).status

    def done(self, measurements_since_peak: int) -> bool:
        """Returns whether the client has its response, or waits for it in vain: the memory has been steady for a long
        time. A client that gets or reads no response is done when the memory is steady."""
        if self._load.holds or not self._load.reads:
            return measurements_since_peak >= STEADY_MEASUREMENTS
        return measurements_since_peak >= LONG_STEADY_MEASUREMENTS or not self.thread.is_alive()

    def leave(self) -> None:
        """Disconnects."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self._sock.close()


def grow(server: RegistryServer, load: ClientLoad, bytes_before: int, clients: int = CLIENTS) -> Growth:
    """Runs all clients at the same time, and measures the memory of the workers until the clients have disconnected and
    the memory is released, or until `MAX_SECONDS` have passed. `bytes_before`: the memory at the start. Kills a
    server that uses far too much memory, so that the machine keeps working."""
    pids = server.worker_pids()
    start = threading.Barrier(clients + 1)
    running = [_Client(server.port, load.request(number), load, start) for number in range(clients)]
    start.wait()
    try:
        peak = _watch(pids, bytes_before, running)
    finally:
        if pss_of(pids) - bytes_before > KILL_ABOVE_BYTES:
            server.kill()
        for client in running:
            client.leave()
    if server.ended:
        return Growth(peak - bytes_before, peak - bytes_before)
    deadline = time.monotonic() + MAX_SECONDS
    bytes_now = pss_of(pids)
    while bytes_now - bytes_before > MAX_KEPT_BYTES and time.monotonic() < deadline:
        peak = max(peak, bytes_now)
        threading.Event().wait(INTERVAL_SECONDS)
        bytes_now = pss_of(pids)
    return Growth(max(peak, bytes_now) - bytes_before, bytes_now - bytes_before)


def _watch(pids: Sequence[int], bytes_before: int, running: Sequence[_Client]) -> int:
    """Measures the memory of the processes until all clients are done. Returns its peak in bytes. `bytes_before`: the
    memory at the start."""
    peak, measurements_since_peak, deadline = 0, 0, time.monotonic() + MAX_SECONDS
    while time.monotonic() < deadline:
        now = pss_of(pids)
        measurements_since_peak = 0 if now > peak else measurements_since_peak + 1
        peak = max(peak, now)
        if peak - bytes_before > KILL_ABOVE_BYTES or all(client.done(measurements_since_peak) for client in running):
            break
        threading.Event().wait(INTERVAL_SECONDS)
    return peak
