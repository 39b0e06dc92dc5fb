"""How the body of one HTTP/1.1 response is framed: with a declared length, chunked, or by the end of the connection."""

from __future__ import annotations


class ResponseFraming:
    """The framing of a response's body. `start` chooses it. If `start` is not called, the response has no body.

    `has_body`: whether the response has a body. `is_chunked`: whether the body is chunked. `body_bytes`: how many bytes
    of the body were counted so far."""

    __slots__ = ("_remaining_bytes", "body_bytes", "has_body", "is_chunked")

    def __init__(self) -> None:
        self.has_body = False
        self.is_chunked = False
        self.body_bytes = 0
        # Bytes of the declared Content-Length that the application has not sent yet; -1 if there is none.
        self._remaining_bytes = -1

    def start(self, content_length: int | None, *, may_be_chunked: bool) -> None:
        """Chooses the framing. `content_length`: the declared length in bytes; None: none is declared.
        `may_be_chunked`: whether the client understands a chunked body. If it does not, a body without a declared
        length ends with the connection."""
        self.has_body = True
        self.is_chunked = content_length is None and may_be_chunked
        self._remaining_bytes = -1 if content_length is None else content_length

    def count(self, size: int) -> None:
        """Counts `size` bytes of the body that are about to be written. Raises RuntimeError if the body gets longer
        than the declared length."""
        self.body_bytes += size
        if self._remaining_bytes >= 0:
            self._remaining_bytes -= size
            if self._remaining_bytes < 0:
                raise RuntimeError("the response is longer than its content-length")

    def frame(self, head: bytes, size: int, *, more: bool) -> tuple[bytes, bytes]:
        """Returns the bytes to write before `size` bytes of the body, and the bytes to write after them.

        - Before: `head`, the part of the response's head that is not written yet. If the response is chunked, also the
          size line of the chunk that has the `size` bytes.
        - After: nothing, unless the response is chunked. Then the end of the chunk and, if the body is complete, the
          chunk of length zero, which ends the body.

        If `size` is 0, there is no chunk, so its size line and its end are left out.

        `more`: whether more of the body follows."""
        if not self.is_chunked:
            return head, b""
        before, after = (head + b"%x\r\n" % size, b"\r\n") if size else (head, b"")
        return before, after if more else after + b"0\r\n\r\n"

    def check_complete(self) -> None:
        """Raises RuntimeError if the body is shorter than the declared length."""
        if self._remaining_bytes > 0:
            raise RuntimeError("the response is shorter than its content-length")
