"""A TCP proxy that cuts a connection after a given number of bytes, as a broken line would."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no wait: close sends RST


class CuttingProxy:
    """Passes every byte between clients and the server, counts them, and cuts once when told to."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._left: dict[str, int] = {}
        self.sent = 0  # bytes from clients to the server
        self.received = 0  # bytes from the server to clients
        self.cuts = 0
        self._start(threading.Thread(target=self._accept, daemon=True))

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def cut_upload_after(self, size: int) -> None:
        """The connection whose upload brings the total, from now on, to `size` bytes is cut; once."""
        with self._lock:
            self._left["up"] = size

    def cut_download_after(self, size: int) -> None:
        """The same for bytes that the server sends."""
        with self._lock:
            self._left["down"] = size

    def close(self) -> None:
        """Ends every connection and waits for the threads."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(30)

    def _start(self, thread: threading.Thread) -> None:
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(self._target)
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            self._start(threading.Thread(target=self._serve, args=(client, server), daemon=True))

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        back = threading.Thread(target=self._pass, args=("down", server, client), daemon=True)
        back.start()
        self._pass("up", client, server)
        back.join()
        with self._lock:
            self._open -= {client, server}
        client.close()
        server.close()

    def _pass(self, way: str, source: socket.socket, target: socket.socket) -> None:
        try:
            while piece := source.recv(1 << 16):
                if self._cut_now(way, len(piece)):
                    for each in (source, target):
                        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                        each.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            for each in (source, target):
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    def _cut_now(self, way: str, size: int) -> bool:
        with self._lock:
            if way == "up":
                self.sent += size
            else:
                self.received += size
            if way not in self._left:
                return False
            self._left[way] -= size
            if self._left[way] > 0:
                return False
            del self._left[way]
            self.cuts += 1
            return True


@contextlib.contextmanager
def cutting_proxy(target: str) -> Iterator[CuttingProxy]:
    """A proxy in front of `host:port` for the length of a block."""
    proxy = CuttingProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
