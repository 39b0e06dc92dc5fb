"""A TCP relay that limits the rate of each connection: `python -m bench.mirror.paced_relay PORT TARGET RATE`.

nginx's `limit_rate` is no replacement. It limits each response separately, and it measures time in whole seconds: as
soon as a response begins, nginx sends as many bytes as the rate allows for one second, without a pause. So it hardly
slows down a client that requests a large blob in many small ranges. In this relay, the kernel limits the rate of each
connection (SO_MAX_PACING_RATE, socket(7)), no matter which requests the connection carries.
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
"""The number of the socket option in asm-generic/socket.h. Python's `socket` has no constant for it."""
SEND_BUFFER_BYTES = 256 << 10
"""Number of bytes that the kernel buffers for a paced connection. With a larger buffer, the relay would read bytes from
the upstream long before it can send them."""


@contextlib.contextmanager
def running_relay(target: int, folder: Path, rate: int) -> Iterator[int]:
    """Runs the relay in front of the server on port `target` until the block ends. Yields the port of the relay.
    `rate`: bytes per second. Raises BenchFailed."""
    folder.mkdir(parents=True)
    port = free_port()
    command = [sys.executable, "-m", "bench.mirror.paced_relay", str(port), str(target), str(rate)]
    with running_program(command, folder / "log", ready=partial(is_serving, port)):
        yield port


def relay_connections(port: int, target: int, rate: int) -> None:
    """Accepts connections until the process is stopped."""
    with socket.create_server((HOST, port), backlog=256) as listener:
        while True:
            client, _ = listener.accept()
            client.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            server = socket.create_connection((HOST, target))
            for connection in (client, server):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Forwards all bytes from one socket to the other inside the kernel (splice), and then the end of the stream."""
    outlet, inlet = os.pipe()
    try:
        while count := os.splice(source.fileno(), inlet, SEND_BUFFER_BYTES):
            while count:
                count -= os.splice(outlet, sink.fileno(), count)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        for connection in (source, sink):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
    finally:
        os.close(outlet)
        os.close(inlet)


if __name__ == "__main__":
    relay_connections(*map(int, sys.argv[1:]))
