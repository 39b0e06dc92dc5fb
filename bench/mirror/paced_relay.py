"""A relay that limits the rate of each connection: `python -m bench.mirror.paced_relay PORT TARGET RATE`.

nginx's `limit_rate` counts whole seconds, for each request anew: a request gets its first second's bytes at once, so a
client that requests a large blob in many small ranges is hardly slowed down. Here the kernel paces each connection
(SO_MAX_PACING_RATE, socket(7)), whatever is requested on it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.system.programs import running_program
from bench.system.servers import HOST, free_port, is_serving

SO_MAX_PACING_RATE = 47
"""From asm-generic/socket.h; Python has no name for it."""
SEND_BUFFER_BYTES = 256 << 10
"""Bytes that the kernel buffers for a paced connection. A larger buffer would take bytes long before they are sent."""


@contextlib.contextmanager
def running_relay(target: int, folder: Path, rate: int) -> Iterator[int]:
    """Runs the relay in front of the server on port `target` until the block ends, and gives its port. `rate`: bytes a
    second. Raises BenchFailed."""
    folder.mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-m", "bench.mirror.paced_relay", str(port), str(target), str(rate)]
    with running_program(command, folder / "log", ready=partial(is_serving, port)):
        yield port


def relay_connections(port: int, target: int, rate: int) -> None:
    """Accepts connections until the process is stopped."""
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
    """Moves bytes in one direction inside the kernel, and forwards the end of the stream."""
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
