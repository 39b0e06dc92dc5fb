"""One malformed request, and the allowed responses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

End = Literal["answer", "all", "maybe", "leave", "reset", "hold"]

CLIENT_ERRORS = frozenset(range(400, 500))
CODES = frozenset(
    {
        "BLOB_UNKNOWN",
        "BLOB_UPLOAD_INVALID",
        "BLOB_UPLOAD_UNKNOWN",
        "DIGEST_INVALID",
        "MANIFEST_BLOB_UNKNOWN",
        "MANIFEST_INVALID",
        "MANIFEST_UNKNOWN",
        "NAME_INVALID",
        "NAME_UNKNOWN",
        "SIZE_INVALID",
        "UNAUTHORIZED",
        "DENIED",
        "UNSUPPORTED",
        "TOOMANYREQUESTS",
    }
)
"""Spec, "Error Codes"."""

SESSION = b"{session}"
"""Stands for the path of an upload session, which is opened before and cancelled after."""


@dataclass(frozen=True)
class FuzzCase:
    """`raw`: the bytes to send. Every response must have one of `statuses`, and the format of errors.

    `end`: what the client does after that:

    - answer: it reads one response, and uses the connection again if it stays open;
    - all: it closes its sending side and reads responses, at least one, until the server closes the connection;
    - maybe: the same, but no response is also allowed, because the request was not complete;
    - leave, reset: it closes the connection at once, normally or with a RST, and reads nothing;
    - hold: it keeps the connection open, sends nothing more, and closes it much later."""

    kind: str
    raw: bytes = field(repr=False)
    statuses: frozenset[int] = CLIENT_ERRORS
    end: End = "answer"

    @property
    def method(self) -> str:
        return self.raw.lstrip(b"\r\n").partition(b" ")[0].decode("latin-1")

    @property
    def needs_session(self) -> bool:
        return SESSION in self.raw

    def filled(self, session: str) -> bytes:
        """Returns the bytes to send, with the path of an upload session filled in."""
        return self.raw.replace(SESSION, session.encode())
