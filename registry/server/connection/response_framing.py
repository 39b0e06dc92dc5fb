"""How the body of one HTTP/1.1 response is framed: with a declared length, chunked, or by the end of the connection."""

from __future__ import annotations


class ResponseFraming:
    """The framing of a response's body, which `start` chooses. If `start` is not called, the response has no body.

    `has_body`: whether the response has a body. `is_chunked`: whether the body is chunked. `body_bytes`: number of
    bytes that `count` has counted so far."""

    __slots__ = ("_remaining_bytes", "body_bytes", "has_body", "is_chunked")

    def __init__(self) -> None:
        self.has_body = False
        self.is_chunked = False
        self.body_bytes = 0
        # Number of bytes of the declared Content-Length that are not counted yet; -1 if no length is declared.
        self._remaining_bytes = -1

    def start(self, content_length: int | None, *, may_be_chunked: bool) -> None:
        """Chooses the framing. `content_length`: the declared length in bytes; None if no length is declared.
        `may_be_chunked`: whether the client understands a chunked body. A body without a declared length is chunked if
        `may_be_chunked` is true; if not, the end of the connection marks the end of the body."""
        self.has_body = True
        self.is_chunked = content_length is None and may_be_chunked
        self._remaining_bytes = -1 if content_length is None else content_length

    def count(self, size: int) -> None:
        """Counts the next `size` bytes of the body. Must be called before they are written. Raises RuntimeError if the
        body gets longer than the declared length."""
        self.body_bytes += size
        if self._remaining_bytes >= 0:
            self._remaining_bytes -= size
            if self._remaining_bytes < 0:
                raise RuntimeError("the response is longer than its content-length")

    def frame(self, head: bytes, size: int, *, more: bool) -> tuple[bytes, bytes]:
        """Returns the bytes to write before the next `size` bytes of the body, and the bytes to write after them.
        `head`: the part of the response's head that is not written yet. `more`: whether more of the body follows.

        For a body that is not chunked, the result is `head` and no bytes. A chunked body adds these bytes:

        - If `size` is above 0: the size line of a chunk is written before the `size` bytes, and the end of the chunk
          after them.
        - If `more` is False: the chunk of length zero, which ends the body, is written after all other bytes."""
        if not self.is_chunked:
            return head, b""
        before, after = (head + b"%x\r\n" % size, b"\r\n") if size else (head, b"")
        return before, after if more else after + b"0\r\n\r\n"

    def check_complete(self) -> None:
        """Raises RuntimeError if the body is shorter than the declared length."""
        if self._remaining_bytes > 0:
            raise RuntimeError("the response is shorter than its content-length")
