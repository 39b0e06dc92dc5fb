"""A relay that is slow by the connection, run as a program: `python -m bench.mirror.paced_relay PORT TARGET RATE`.

nginx's `limit_rate` counts whole seconds, for each request anew: a request gets its first second's worth at once, so
that a client that asks for a large blob in many small ranges hardly feels it. Here the kernel paces each connection
(SO_MAX_PACING_RATE, socket(7)), whatever is asked for on it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.errors import BenchFailed
from bench.loaders.http_client import HOST
from bench.system.process_tree import clean_environment, log_tail, running_program
from bench.system.servers import REPOSITORY_ROOT, START_TIMEOUT, free_port, is_serving

SO_MAX_PACING_RATE = 47
"""asm-generic/socket.h; Python has no name for it."""
SEND_BUFFER_BYTES = 256 << 10
"""Bytes the kernel holds for a paced connection: more would count as sent long before they are."""
POLL_SECONDS = 0.005


@contextlib.contextmanager
def running_relay(target: int, folder: Path, rate: int) -> Iterator[int]:
    """Runs it before the server on port `target` until the block ends; its port. Raises BenchFailed."""
    folder.mkdir(parents=True)
    port, log = free_port(), folder / "log"
    command = [sys.executable, "-m", "bench.mirror.paced_relay", str(port), str(target), str(rate)]
    with running_program(command, clean_environment(folder, PYTHONPATH=str(REPOSITORY_ROOT)), log, folder) as process:
        _wait(process, port, log)
        yield port


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while not is_serving(port):
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchFailed(f"the relay did not start: {log_tail(log)}")
        time.sleep(POLL_SECONDS)


def relay_connections(port: int, target: int, rate: int) -> None:
    """Takes connections for ever."""
    with socket.create_server((HOST, port), backlog=256) as listener:
        while True:
            near, _ = listener.accept()
            near.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            far = socket.create_connection((HOST, target))
            for one in (near, far):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Moves bytes one way, inside the kernel, and hands the end on."""
    outlet, inlet = os.pipe()
    try:
        while count := os.splice(source.fileno(), inlet, SEND_BUFFER_BYTES):
            while count:
                count -= os.splice(outlet, sink.fileno(), count)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(outlet)
        os.close(inlet)


if __name__ == "__main__":
    relay_connections(*map(int, sys.argv[1:]))
