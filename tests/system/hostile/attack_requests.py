"""Requests that are written byte by byte, because HTTP libraries would not send most of them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

TIMEOUT = 90.0
PIECE = 1 << 20
MOST_KEPT = 1 << 20
"""Bytes of an answer that are kept; the rest is read and thrown away."""


@dataclass(frozen=True)
class AttackAnswer:
    """The bytes that were received until the server closed the connection. `status`: 0 if there was no response."""

    status: int
    data: bytes
    size: int

    @property
    def count(self) -> int:
        """The approximate number of responses, by their status lines."""
        return self.data.count(b"HTTP/1.1 ")

    def header(self, name: bytes) -> str:
        """Returns a header of the first response; empty if it does not have it."""
        head = self.data.partition(b"\r\n\r\n")[0]
        for line in head.split(b"\r\n")[1:]:
            key, _, value = line.partition(b":")
            if key.strip().lower() == name:
                return value.strip().decode("latin-1")
        return ""


def head(
    method: str, target: str, headers: Mapping[str, str] | None = None, *, length: int | None = None, keep: bool = False
) -> bytes:
    """Returns the head of a request."""
    lines = [f"{method} {target} HTTP/1.1", "Host: localhost"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += [] if length is None else [f"Content-Length: {length}"]
    lines += [] if keep else ["Connection: close"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def connect(port: int) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), TIMEOUT)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def talk(port: int, pieces: bytes | Iterable[bytes]) -> AttackAnswer:
    """Sends all pieces, reads responses meanwhile, and waits until the server closes the connection."""
    with connect(port) as sock:
        sending = threading.Thread(target=send, args=(sock, [pieces] if isinstance(pieces, bytes) else pieces))
        sending.start()
        answer = read(sock)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # ends the sending of what nobody reads
        sending.join()
    return answer


def ask(
    port: int, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> AttackAnswer:
    """Sends one request with its body, and returns the response."""
    first = head(method, target, headers, length=None if body is None else len(body))
    return talk(port, first + (body or b""))


def send(sock: socket.socket, pieces: Iterable[bytes]) -> None:
    """Sends as much as the server accepts."""
    with contextlib.suppress(OSError):  # a server may answer before it has read everything
        for piece in pieces:
            sock.sendall(piece)


def read(sock: socket.socket, keep: int = MOST_KEPT) -> AttackAnswer:
    """Reads until the end of the connection, however it ends."""
    kept, size = bytearray(), 0
    with contextlib.suppress(OSError):
        while data := sock.recv(PIECE):
            size += len(data)
            kept += data[: keep - len(kept)]
    line = bytes(kept[:13])
    status = int(line[9:12]) if line.startswith(b"HTTP/1.1 ") and line[9:12].isdigit() else 0
    return AttackAnswer(status, bytes(kept), size)


def chunks(body: bytes, size: int, extension: bytes = b"") -> bytes:
    """Returns the body in chunked transfer coding, with `size` bytes in each chunk."""
    parts = bytearray()
    for start in range(0, len(body), size):
        part = body[start : start + size]
        parts += b"%x%b\r\n%b\r\n" % (len(part), extension, part)
    return bytes(parts) + b"0\r\n\r\n"
