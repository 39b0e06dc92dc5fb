"""How much memory the workers take while two hundred clients ask for the same kind of thing at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.hostile import sending

CLIENTS = 200
BOUND = 300 << 20
"""Bytes that the workers may grow by together: what docs/security.md promises."""
KEPT = 100 << 20
"""Bytes that they may still have more once all clients have gone."""
EVERY = 0.05
STEADY = 20
"""Looks without a new peak after which no more is expected."""
LONGEST = 30.0
"""Seconds that clients who wait for nothing stay at the most, and that shrinking may take."""


def pss(pids: Sequence[int]) -> int:
    """Bytes of memory that processes take together, shared pages counted once (proc(5), smaps_rollup)."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


@dataclass(frozen=True)
class Growth:
    """Bytes above what the workers took before: at the most, and in the end."""

    peak: int
    kept: int

    def __str__(self) -> str:
        return f"{self.peak / (1 << 20):.0f} MiB at the most, {self.kept / (1 << 20):.0f} MiB in the end"


@dataclass(frozen=True)
class Crowd:
    """What each of the clients does: it sends `request(number)`, and then reads, or not; `holds`: it stays after all
    it has to say was said, until memory grows no more."""

    request: Callable[[int], Sequence[bytes]]
    reads: bool = True
    holds: bool = False


class _Client:
    """One connection, in a thread of its own."""

    def __init__(self, port: int, pieces: Sequence[bytes], crowd: Crowd, start: threading.Barrier) -> None:
        self._crowd = crowd
        self._pieces = pieces
        self._start = start
        self._sock = socket.socket()
        if not crowd.reads:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._sock.settimeout(sending.TIMEOUT)
        self._sock.connect(("127.0.0.1", port))
        self.status = 0
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        self._start.wait()
        with contextlib.suppress(OSError):
            sending.send(self._sock, self._pieces)
            if self._crowd.reads and not self._crowd.holds:
                self.status = sending.read(self._sock, keep=64).status

    def leave(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self._sock.close()


def grow(port: int, pids: Sequence[int], crowd: Crowd, before: int, clients: int = CLIENTS) -> Growth:
    """Lets all clients loose at once and watches the workers' memory until they have gone and it is given back, or time
    is up. `before`: bytes that count as none."""
    start = threading.Barrier(clients + 1)
    running = [_Client(port, crowd.request(number), crowd, start) for number in range(clients)]
    start.wait()
    peak, since, begun = 0, 0, time.monotonic()
    waits = crowd.holds or not crowd.reads
    while True:
        now = pss(pids)
        since = 0 if now > peak else since + 1
        peak = max(peak, now)
        if waits and (since >= STEADY or time.monotonic() - begun > LONGEST):
            break
        if not waits and not any(client.thread.is_alive() for client in running):
            break
        threading.Event().wait(EVERY)
    for client in running:
        client.leave()
    deadline = time.monotonic() + LONGEST
    kept = pss(pids)
    while kept - before > KEPT and time.monotonic() < deadline:
        peak = max(peak, kept)
        threading.Event().wait(EVERY)
        kept = pss(pids)
    return Growth(max(peak, kept) - before, kept - before)
