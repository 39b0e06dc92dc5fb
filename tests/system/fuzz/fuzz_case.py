"""One malformed request, and what may come of it."""

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
    """`raw` is sent as it is. Every answer must be one of `statuses`, in the shape of errors.

    `end` is what the client does then:
    - answer: it reads one answer, and uses the connection again if that is kept;
    - all: it ends its sending side and reads answers, at least one, until the server closes;
    - maybe: the same, but no answer is fine as well (the request was not whole);
    - leave, reset: it closes at once, in order or with a RST, and reads nothing;
    - hold: it keeps the connection open, says no more, and closes much later.
    """

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
        """The bytes to send."""
        return self.raw.replace(SESSION, session.encode())
