"""Builds headers of responses. Headers with a fixed value are constants."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from registry.asgi import Header
from storage.content import BLOB_TYPE
from storage.names import Digest

API_VERSION: Final[Header] = (b"docker-distribution-api-version", b"registry/2.0")
NO_SNIFF: Final[Header] = (b"x-content-type-options", b"nosniff")
ACCEPT_RANGES: Final[Header] = (b"accept-ranges", b"bytes")
REQUEST_ID_NAME: Final = b"x-request-id"
"""Name of the header whose value is the request's id."""
ZERO_LENGTH: Final[Header] = (b"content-length", b"0")
JSON: Final[Header] = (b"content-type", b"application/json")
OCTET_STREAM: Final[Header] = (b"content-type", BLOB_TYPE.encode())
IMMUTABLE: Final[Header] = (b"cache-control", b"max-age=31536000, immutable")
"""The Cache-Control header for content that was requested by its digest. Must not contain `public`: a shared cache
could then store the response to a request with Authorization (RFC 9111, 3.5), and send the response to clients that
have no right to read the content."""
REVALIDATE: Final[Header] = (b"cache-control", b"no-cache")
"""The Cache-Control header for content that was requested by a tag, and for lists. A cache may store the response, but
has to revalidate it before each use."""
NEVER_STORE: Final[Header] = (b"cache-control", b"no-store")
_MAX_WARNING_CHARACTERS: Final = 1024
"""Largest number of characters in the text of a warning. A longer text is cut. The spec allows 4096 bytes for all
warnings of a response."""


def content_headers(digest: Digest) -> list[Header]:
    """Returns the headers that identify content: Docker-Content-Digest and ETag."""
    encoded = digest.encode("ascii")
    return [(b"docker-content-digest", encoded), (b"etag", b'"%b"' % encoded)]


def blob_headers(digest: Digest, *, verified: bool) -> list[Header]:
    """Returns the headers that identify a blob and say whether a cache may store it.

    `verified`: whether the registry has the whole blob and has checked its digest. If `verified` is False, the bytes
    may be wrong, so the response has no ETag, and no cache may store the response."""
    if verified:
        return [*content_headers(digest), IMMUTABLE, ACCEPT_RANGES]
    return [(b"docker-content-digest", digest.encode("ascii")), NEVER_STORE, ACCEPT_RANGES]


def upload_headers(location: bytes, upload_id: str, offset: int) -> list[Header]:
    """Returns the headers that describe an upload session.

    - `location`: the URL at which the client continues the session.
    - `offset`: the number of bytes that the session has received.

    The Range header states the offset of the last received byte. A session without bytes gets `0-0`, because clients
    expect the header."""
    return [
        (b"location", location),
        (b"range", b"0-%d" % max(offset - 1, 0)),
        (b"docker-upload-uuid", upload_id.encode("ascii")),
        NEVER_STORE,
    ]


def allow_header(methods: Iterable[str]) -> Header:
    """Returns the Allow header, which lists the methods of a resource (RFC 9110, 10.2.1)."""
    return b"allow", ", ".join(methods).encode("ascii")


def warning_headers(notice: str | None) -> list[Header]:
    """Returns the Warning header with the text `notice` ("Warnings" in the spec). Clients show the text to their users.
    Returns an empty list if `notice` is None."""
    if notice is None:
        return []
    plain = "".join(char if char.isprintable() else " " for char in notice[:_MAX_WARNING_CHARACTERS])
    # Escapes quotes and backslashes (RFC 9110, 5.6.4).
    return [(b"warning", b'299 - "%b"' % re.sub(rb'(["\\])', rb"\\\1", plain.encode("ascii", "replace")))]
