"""A process that sends a ping (`GET /v2/`) to each worker of a server again and again, and measures how long each
worker takes to respond.

    with PingWatcher(server) as watcher:
        watcher.begin()
        ...
        for stall in watcher.end():     # the slowest ping of each worker

The watcher keeps one connection to each worker open. It finds out from `/proc` which worker has accepted a connection.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.fakes.connection_owner import accepting_process
from tests.fakes.server_process import ROOT, RegistryServer

PAUSE_SECONDS = 0.002
"""Time between a response and the next ping."""
SLOW_SECONDS = 0.005
"""For a ping that takes longer, the CPU times of the threads are examined."""
THREAD_SEARCH_SECONDS = 0.5
"""Time between two searches for new threads of a worker."""
MAX_CONNECTIONS = 400
"""How many connections are opened at most until each worker has accepted one."""
PING = b"GET /v2/ HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclass(frozen=True)
class Stall:
    """The slowest ping of a worker: the one with the largest `blocked_ms`. Times are in milliseconds.

    `elapsed_ms`: the response time that the watcher has measured. `blocked_ms`: estimate of the delay that the worker
    itself caused: the response time without the time for which the worker's threads waited for a CPU. `main_cpu_ms`:
    the CPU time of the worker's main thread during the ping. `other_cpu_ms`: the CPU time of the busiest other thread.
    The CPU times show whether the event loop itself was busy, or another thread held the interpreter lock. `pings`:
    number of all pings of the worker.

    If the slowest ping took at most `SLOW_SECONDS`, the CPU times are 0 and `blocked_ms` is the whole response time.
    """

    pid: int
    blocked_ms: float = 0.0
    elapsed_ms: float = 0.0
    main_cpu_ms: float = 0.0
    other_cpu_ms: float = 0.0
    pings: int = 0


class WatchFailed(AssertionError):
    """The watcher has ended, or could not reach every worker."""


class PingWatcher:
    """A context manager that runs the watcher process."""

    def __init__(self, server: RegistryServer) -> None:
        workers = [str(pid) for pid in server.worker_pids()]
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(server.port), *workers],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.stdout.close()

    def begin(self) -> None:
        """Forgets all earlier pings."""
        self._write("begin")
        self._read()

    def end(self) -> list[Stall]:
        """Returns the slowest ping of each worker since `begin`. Waits for the responses to running pings."""
        self._write("end")
        return [Stall(**each) for each in self._read()]

    def _write(self, word: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()
        except OSError:
            raise WatchFailed("the watcher has ended; its error is above") from None

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WatchFailed("the watcher has ended; its error is above")
        return json.loads(line)


# -- The rest runs in the process of the watcher.


class _ThreadTimes:
    """The CPU times of one thread, in milliseconds."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)

    def read(self) -> tuple[float, float]:
        """Returns the CPU time, and the time for which the thread was ready but had no CPU. Raises OSError if the
        thread has ended."""
        ran, waited, *_ = os.pread(self._file, 100, 0).split()
        return int(ran) / 1e6, int(waited) / 1e6

    def close(self) -> None:
        os.close(self._file)


class _Worker:
    """The connection to one worker, and its slowest ping."""

    def __init__(self, pid: int, sock: socket.socket) -> None:
        self.pid = pid
        self.sock = sock
        self.due = 0.0  # the time of the next ping
        self.worst = Stall(pid)
        self.sent: float | None = None
        self._threads: dict[int, _ThreadTimes] = {}
        self._before: dict[int, tuple[float, float]] = {}  # the times of each thread before the ping, by its id
        self._searched_at = 0.0  # the time of the last search for new threads

    def ping(self) -> None:
        """Sends a ping, and records the CPU times of the threads before it."""
        now = time.monotonic()
        if now - self._searched_at > THREAD_SEARCH_SECONDS:
            self._searched_at = now
            self._find_threads()
        self._before = self._times()
        self.sent = time.monotonic()
        self.sock.sendall(PING)

    def answered(self, late_ms: float) -> None:
        """Records a response. `late_ms`: milliseconds for which the watcher itself was ready but had no CPU before it
        received the response."""
        if not self.sock.recv(65536):
            raise WatchFailed(f"worker {self.pid} has closed the connection of the pings")
        assert self.sent is not None
        now = time.monotonic()
        took = 1000 * (now - self.sent)
        self.sent, self.due = None, now + PAUSE_SECONDS
        pings = self.worst.pings + 1
        stall = (
            self._judge(took - late_ms, pings)
            if took > 1000 * SLOW_SECONDS
            else Stall(self.pid, took, took, pings=pings)
        )
        worse = stall if stall.blocked_ms > self.worst.blocked_ms else self.worst
        self.worst = Stall(**{**asdict(worse), "pings": pings})

    def _judge(self, took: float, pings: int) -> Stall:
        """Computes the result of a slow ping from the CPU times of the threads. `took`: the milliseconds that the ping
        took, without the time for which the watcher waited for a CPU."""
        self._find_threads()
        times = self._times()
        spent = {
            tid: (ran - self._before.get(tid, (0.0, 0.0))[0], waited - self._before.get(tid, (0.0, 0.0))[1])
            for tid, (ran, waited) in times.items()
        }
        ran, waited = spent.pop(self.pid, (0.0, 0.0))
        other_ran = max((milliseconds for milliseconds, _ in spent.values()), default=0.0)
        other_waited = max((milliseconds for _, milliseconds in spent.values()), default=0.0)
        with_cpu = took - waited
        # Another thread may have waited for a CPU while it held the interpreter lock, so its wait is subtracted too.
        # Both waits may fall into the same time; then too much is subtracted. But the main thread has surely blocked
        # the event loop while it ran.
        blocked = max(with_cpu - other_waited, min(took, ran))
        return Stall(self.pid, blocked, took, ran, other_ran, pings)

    def _times(self) -> dict[int, tuple[float, float]]:
        """Returns the times of each thread by its id (see `_ThreadTimes.read`)."""
        times = {}
        for tid, thread in list(self._threads.items()):
            try:
                times[tid] = thread.read()
            except (OSError, ValueError):
                self._threads.pop(tid).close()
        return times

    def _find_threads(self) -> None:
        """Opens the CPU times of the threads that are new."""
        for tid in map(int, os.listdir(f"/proc/{self.pid}/task")):
            if tid not in self._threads:
                with contextlib.suppress(OSError):
                    self._threads[tid] = _ThreadTimes(Path(f"/proc/{self.pid}/task/{tid}/schedstat"))


def connect_to_each(port: int, pids: list[int]) -> dict[int, socket.socket]:
    """Returns one connection to each worker of the server at this port, on which the worker has answered a ping. Raises
    WatchFailed if a worker accepts no connection."""
    connections: dict[int, socket.socket] = {}
    unused = []
    for _ in range(MAX_CONNECTIONS):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(PING)
        sock.recv(65536)
        owner = accepting_process(port, sock.getsockname()[1], pids)
        if owner is None or owner in connections:
            unused.append(sock)
        else:
            connections[owner] = sock
        if len(connections) == len(pids):
            break
    for sock in unused:
        sock.close()
    if len(connections) < len(pids):
        raise WatchFailed(f"no connection reached {sorted(set(pids) - set(connections))}")
    return connections


def _watch(workers: list[_Worker]) -> None:
    """Pings the workers, and follows the commands `begin` and `end` on stdin, until stdin is closed."""
    selector = selectors.DefaultSelector()
    for worker in workers:
        selector.register(worker.sock, selectors.EVENT_READ, worker)
    selector.register(sys.stdin, selectors.EVENT_READ)
    own_times = _ThreadTimes(Path("/proc/self/schedstat"))
    ending = False
    _say(True)  # the watcher is ready
    while True:
        now = time.monotonic()
        for worker in workers:
            if worker.sent is None and worker.due <= now and not (ending and worker.worst.pings):
                worker.ping()
        if ending and all(worker.sent is None for worker in workers):
            ending = False
            _say([asdict(worker.worst) for worker in workers])
        waited = own_times.read()[1]
        for key, _ in selector.select(PAUSE_SECONDS / 2):
            if key.data is not None:
                key.data.answered(own_times.read()[1] - waited)
                continue
            word = os.read(sys.stdin.fileno(), 100).strip()
            if not word:
                return
            if word == b"end":
                ending = True
            else:
                for worker in workers:
                    worker.worst = Stall(worker.pid)
                _say(True)


def _say(message: object) -> None:
    """Sends the message to the test."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Runs the watcher with the arguments `PORT PID...`."""
    port, *pids = map(int, sys.argv[1:])
    connections = connect_to_each(port, pids)
    _watch([_Worker(pid, sock) for pid, sock in connections.items()])


if __name__ == "__main__":
    main()
