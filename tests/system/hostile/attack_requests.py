"""Sends HTTP requests as raw bytes, because HTTP libraries would refuse to send most of them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TIMEOUT = 90.0
"""Time limit of each socket operation, in seconds."""
PIECE = 1 << 20
"""Bytes that one call reads at most."""
MAX_KEPT = 1 << 20
"""Bytes of a response that are kept."""


@dataclass(frozen=True)
class AttackAnswer:
    """What was received until the server closed the connection. `status`: of the first response; 0: none. `data`: the
    first bytes. `size`: number of all bytes."""

    status: int
    data: bytes
    size: int

    @property
    def count(self) -> int:
        """The approximate number of responses."""
        return self.data.count(b"HTTP/1.1 ")

    def header(self, name: bytes) -> str:
        """Returns a header of the first response, or an empty text."""
        head = self.data.partition(b"\r\n\r\n")[0]
        for header_line in head.split(b"\r\n")[1:]:
            key, _, value = header_line.partition(b":")
            if key.strip().lower() == name:
                return value.strip().decode("latin-1")
        return ""


def head(
    method: str, target: str, headers: Mapping[str, str] | None = None, *, length: int | None = None, keep: bool = False
) -> bytes:
    """Returns the request line and headers of a request. `keep`: whether the connection stays open after the
    response."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += [] if length is None else [f"Content-Length: {length}"]
    lines += [] if keep else ["Connection: close"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def connect(port: int) -> socket.socket:
    """Opens a connection to the server on this port."""
    sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def talk(port: int, pieces: bytes | Iterable[bytes]) -> AttackAnswer:
    """Sends all pieces over a new connection. At the same time, reads until the server closes the connection."""
    with connect(port) as sock:
        sending = threading.Thread(target=send, args=(sock, [pieces] if isinstance(pieces, bytes) else pieces))
        sending.start()
        answer = read(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # stops the sending thread if the server no longer reads
        sending.join()
    return answer


def ask(
    port: int, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> AttackAnswer:
    """Sends one request and returns the response."""
    request_head = head(method, target, headers, length=None if body is None else len(body))
    return talk(port, request_head + (body or b""))


def send(sock: socket.socket, pieces: Iterable[bytes]) -> None:
    """Sends the pieces, until the server closes the connection."""
    with contextlib.suppress(OSError):  # a server may answer before it has read everything
        for piece in pieces:
            sock.sendall(piece)


def read(sock: socket.socket, max_kept: int = MAX_KEPT, most: int | None = None) -> AttackAnswer:
    """Reads until the connection ends, or `most` bytes have been read. Keeps the first `max_kept` bytes."""
    data_kept, size = bytearray(), 0
    with contextlib.suppress(OSError):
        while (most is None or size < most) and (data := sock.recv(PIECE)):
            size += len(data)
            data_kept += data[: max_kept - len(data_kept)]
    status_line = bytes(data_kept[:13])
    status = int(status_line[9:12]) if status_line.startswith(b"HTTP/1.1 ") and status_line[9:12].isdigit() else 0
    return AttackAnswer(status, bytes(data_kept), size)


def chunks(body: bytes, size: int, extension: bytes = b"") -> bytes:
    """Returns the body in chunked transfer coding, with `size` bytes and `extension` in each chunk."""
    parts = bytearray()
    for start in range(0, len(body), size):
        part = body[start : start + size]
        parts += b"%x%b\r\n%b\r\n" % (len(part), extension, part)
    return bytes(parts) + b"0\r\n\r\n"
