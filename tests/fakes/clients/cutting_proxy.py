"""A TCP proxy that imitates a bad network: after a given number of bytes, it resets or slows down a connection."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Iterator

RESET = struct.pack("ii", 1, 0)  # SO_LINGER with no wait: close sends RST
REQUEST = re.compile(rb"([A-Z]+ [^ ]+) HTTP/1\.[01]\r\n")


class CuttingProxy:
    """Passes bytes between clients and the server, and counts them. A test can make it reset or slow down one
    connection: the one on which the bytes of all connections together reach a number."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._remaining: dict[str, int] = {}
        """How many bytes are still passed, by what happens then: the connection on which they end is reset ("up" for
        uploaded bytes, "down" for downloaded ones), or its upload is slowed down ("crawl")."""
        self.sent = 0  # bytes from clients to the server
        self.received = 0  # bytes from the server to clients
        self.cuts = 0  # connections that were reset
        self.request_lines: list[str] = []
        """The method and path of each recorded request, such as `GET /v2/`. The proxy looks for a request only at the
        start of each piece that it receives (the bytes of one `recv`), so a request in the middle of a piece is not
        recorded."""
        self.slow = threading.Event()  # set once an upload is slowed down
        self._full_speed = threading.Event()
        self._start(threading.Thread(target=self._accept, daemon=True))

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()
        return f"{host}:{port}"

    def cut_upload_after(self, size: int) -> None:
        """Makes the proxy count the bytes that all connections upload from now on. The proxy resets the connection on
        which the count reaches `size`, and does not pass on its last piece (the bytes of one `recv`). Only this one
        connection is reset."""
        with self._lock:
            self._remaining["up"] = size

    def cut_download_after(self, size: int) -> None:
        """Does the same as `cut_upload_after` for the bytes that all connections download."""
        with self._lock:
            self._remaining["down"] = size

    def slow_upload_after(self, size: int) -> None:
        """Makes the proxy count the bytes that all connections upload from now on. It slows down the connection on
        which the count reaches `size`: it passes on the piece (the bytes of one `recv`) that has just arrived there at
        one byte per second, until `speed_up` is called or only the last byte of the piece is left. Then the connection
        has its full speed again."""
        with self._lock:
            self._remaining["crawl"] = size

    def speed_up(self) -> None:
        """Gives the slow connection its full speed again. From then on, no upload is slowed down."""
        self._full_speed.set()

    def close(self) -> None:
        """Closes all connections and waits for the end of the threads."""
        self.speed_up()
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

    def _pass(self, direction: str, source: socket.socket, target: socket.socket) -> None:
        """Passes the bytes of one direction, "up" (to the server) or "down", until the connection ends or is cut."""
        try:
            while piece := source.recv(1 << 16):
                if direction == "up":
                    self._record_request(piece)
                    if self._count_down("crawl", len(piece)):
                        piece = self._crawl(piece, target)
                if self._count_and_check_cut(direction, len(piece)):
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

    def _record_request(self, piece: bytes) -> None:
        if found := REQUEST.match(piece):
            self.request_lines.append(found[1].decode())

    def _crawl(self, piece: bytes, target: socket.socket) -> bytes:
        """Sends a piece at one byte per second, until `speed_up` is called or only its last byte is left. Returns the
        rest of the piece, which is still to be sent."""
        self.slow.set()
        while len(piece) > 1 and not self._full_speed.wait(1.0):
            target.sendall(piece[:1])
            piece = piece[1:]
        return piece

    def _count_and_check_cut(self, direction: str, size: int) -> bool:
        """Counts `size` received bytes. Returns whether the connection must be cut before they are passed on."""
        with self._lock:
            if direction == "up":
                self.sent += size
            else:
                self.received += size
        cut = self._count_down(direction, size)
        self.cuts += cut
        return cut

    def _count_down(self, key: str, size: int) -> bool:
        """Subtracts `size` from the number with this key in `_remaining`, if there is one. Returns whether no bytes
        remain, and then deletes the number, so that this happens to one connection only."""
        with self._lock:
            if key not in self._remaining:
                return False
            self._remaining[key] -= size
            if self._remaining[key] > 0:
                return False
            del self._remaining[key]
            return True


class Tunnel(CuttingProxy):
    """A proxy for clients that request a tunnel (CONNECT). It connects every tunnel to the server, whichever host the
    client names."""

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n") and (letter := client.recv(1)):
            head += letter
        self._record_request(head)
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        super()._serve(client, server)


@contextlib.contextmanager
def cutting_proxy(target: str, *, tunnel: bool = False) -> Iterator[CuttingProxy]:
    """Runs a proxy in front of the server `target` (`host:port`) until the block ends."""
    proxy = (Tunnel if tunnel else CuttingProxy)(target)
    try:
        yield proxy
    finally:
        proxy.close()
