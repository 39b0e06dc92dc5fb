"""`FuzzCase`: a malformed request that the fuzz tests send, and the responses that are allowed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

End = Literal["read one", "read all", "read any", "leave", "reset", "hold"]

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
"""The error codes of the OCI distribution spec, section "Error Codes"."""

SESSION_PLACEHOLDER = b"{session}"
"""A placeholder for the path of an upload session. The session is started before the request, and cancelled after
it."""


@dataclass(frozen=True)
class FuzzCase:
    """A malformed request. `kind`: its name in reports. `raw`: the bytes to send. Every response must have one of
    `statuses`, and be an error in the format of the OCI spec. `end`: what the client does after it has sent the bytes:

    - read one: it reads one response, and uses the connection again if it stays open;
    - read all: it closes its sending side and reads responses, at least one, until the server closes the connection;
    - read any: as `read all`, but the server may also send no response, because the request is incomplete;
    - leave, reset: it closes the connection at once, normally or with a RST, and reads nothing;
    - hold: it keeps the connection open, sends nothing more, and closes the connection much later."""

    kind: str
    raw: bytes = field(repr=False)
    statuses: frozenset[int] = CLIENT_ERRORS
    end: End = "read one"

    @property
    def method(self) -> str:
        return self.raw.lstrip(b"\r\n").partition(b" ")[0].decode("latin-1")

    @property
    def needs_session(self) -> bool:
        return SESSION_PLACEHOLDER in self.raw

    def filled(self, session: str) -> bytes:
        """Returns the bytes to send, with the path of an upload session filled in."""
        return self.raw.replace(SESSION_PLACEHOLDER, session.encode())
