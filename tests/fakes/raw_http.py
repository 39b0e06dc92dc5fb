"""A client's end of an HTTP connection on which tests send exact bytes. It normalises, retries and hides nothing.

Responses are parsed strictly (RFC 9112): a wrong length, a missing line end or bytes between two responses fail the
test.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

BODYLESS = (204, 304)
TIMEOUT = 30.0  # seconds


class ConnectionClosed(Exception):
    """The server has closed the connection before the first byte of a response."""


class Malformed(AssertionError):
    """The received bytes are not a complete HTTP response."""


@dataclass(frozen=True)
class RawAnswer:
    """One response."""

    version: str
    status: int
    fields: tuple[tuple[str, str], ...]
    body: bytes = field(repr=False)
    interim: tuple[int, ...] = ()
    """The 1xx statuses that the server sent before this response."""

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key == name]

    def __contains__(self, name: str) -> bool:
        return bool(self.all(name))

    def __getitem__(self, name: str) -> str:
        """Returns the value of a header that occurs exactly once."""
        (value,) = self.all(name)
        return value

    @property
    def closes(self) -> bool:
        return "close" in ",".join(self.all("connection")).lower()

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def codes(self) -> list[str]:
        """The error codes in the body, which must have the format of the OCI spec."""
        return [error["code"] for error in self.json()["errors"]]


def message(
    method: str,
    target: str,
    headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    *,
    host: str = "registry.test",
    version: str = "1.1",
) -> bytes:
    """Returns the bytes of a request. Adds Host and, if the request has a body or the method is PUT, POST or PATCH,
    Content-Length, unless `headers` has them. Adds no Content-Length if `headers` has Transfer-Encoding."""
    pairs = list(headers.items() if isinstance(headers, Mapping) else headers)
    names = {name.lower() for name, _ in pairs}
    framed = names & {"content-length", "transfer-encoding"}
    if not framed and (body or method in ("PUT", "POST", "PATCH")):
        pairs.append(("Content-Length", str(len(body))))
    if "host" not in names:
        pairs.insert(0, ("Host", host))
    head = f"{method} {target} HTTP/{version}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in pairs)
    return head.encode("latin-1") + b"\r\n" + body


def chunked(*pieces: bytes) -> bytes:
    """Returns a complete body in chunked transfer coding."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces if piece) + b"0\r\n\r\n"


class RawConnection:
    """A TCP connection to the server. `receive_buffer`: the size of the socket's receive buffer in bytes; None: the
    system's default."""

    def __init__(
        self, address: tuple[str, int], *, timeout: float = TIMEOUT, receive_buffer: int | None = None
    ) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            if receive_buffer is not None:
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            self.socket.settimeout(timeout)
            self.socket.connect(address)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except BaseException:
            self.socket.close()
            raise
        self.received = bytearray()
        self.ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- sending

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def ask(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str] | Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        version: str = "1.1",
    ) -> RawAnswer:
        """Sends one request and returns its response."""
        self.send(message(method, target, headers, body, version=version))
        return self.answer(method)

    def shut(self) -> None:
        """Closes the sending side. Responses can still be received."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Resets the connection (RST), as a crash or a broken network does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()

    # -- receiving

    def _more(self) -> bool:
        """Receives the next bytes. Returns False at the end of the connection."""
        if not self.ended:
            data = self.socket.recv(262144)
            self.received += data
            self.ended = not data
        return not self.ended

    def _line(self) -> bytes:
        """Reads a line, and returns it without CR LF. Raises Malformed if the connection ends before."""
        while (end := self.received.find(b"\r\n")) < 0:
            if not self._more():
                raise Malformed(f"the connection ended within a line: {bytes(self.received)[:200]!r}")
        line = bytes(self.received[:end])
        del self.received[: end + 2]
        return line

    def read(self, count: int) -> bytes:
        """Receives exactly `count` bytes."""
        while len(self.received) < count:
            if not self._more():
                raise Malformed(f"the connection ended {count - len(self.received)} bytes early")
        data = bytes(self.received[:count])
        del self.received[:count]
        return data

    def rest(self) -> bytes:
        """Receives all bytes until the server closes the connection."""
        while self._more():
            pass
        data = bytes(self.received)
        self.received.clear()
        return data

    def head(self) -> RawAnswer:
        """Receives the status and headers of the next response, and skips 1xx responses. Raises ConnectionClosed,
        Malformed."""
        interim: list[int] = []
        while True:
            answer = self._one_head(tuple(interim))
            if answer.status >= 200:
                return answer
            interim.append(answer.status)

    def _one_head(self, interim: tuple[int, ...]) -> RawAnswer:
        if not self.received and not self._more():
            raise ConnectionClosed
        start = self._line()
        version, _, status = start.partition(b" ")  # the status and its reason phrase
        if version not in (b"HTTP/1.1", b"HTTP/1.0") or not status[:3].isdigit() or status[3:4] not in (b" ", b""):
            raise Malformed(f"not a status line: {start[:200]!r}")
        fields: list[tuple[str, str]] = []
        while line := self._line():
            name, colon, value = line.partition(b":")
            if not colon or not name or name != name.strip():
                raise Malformed(f"not a header: {line[:200]!r}")
            fields.append((name.decode("ascii").lower(), value.strip().decode("latin-1")))
        return RawAnswer(version.decode(), int(status[:3]), tuple(fields), b"", interim)

    def answer(self, method: str = "GET") -> RawAnswer:
        """Receives the next complete response. `method`: the method of the request. Raises ConnectionClosed,
        Malformed."""
        found = self.head()
        return RawAnswer(found.version, found.status, found.fields, self._body(found, method), found.interim)

    def _body(self, found: RawAnswer, method: str) -> bytes:
        if method == "HEAD" or found.status in BODYLESS:
            return b""
        if "transfer-encoding" in found:
            assert found["transfer-encoding"] == "chunked"
            assert "content-length" not in found
            pieces = []
            while size := int(self._line(), 16):
                pieces.append(self.read(size))
                assert self._line() == b""
            assert self._line() == b""
            return b"".join(pieces)
        if "content-length" in found:
            return self.read(int(found["content-length"]))
        assert found.closes or found.version == "HTTP/1.0", "an answer without framing on a kept connection"
        return self.rest()

    def at_end(self) -> bool:
        """Waits until the server closes or resets the connection. Returns whether the server sent no more bytes
        before."""
        try:
            return self.rest() == b""
        except ConnectionResetError:
            return True
