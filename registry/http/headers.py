"""Headers of answers. Those that never change are encoded once, here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from registry.http.asgi import Header
from storage.content import BLOB_TYPE
from storage.names import Digest

API_VERSION: Final[Header] = (b"docker-distribution-api-version", b"registry/2.0")
NO_SNIFF: Final[Header] = (b"x-content-type-options", b"nosniff")
ACCEPT_RANGES: Final[Header] = (b"accept-ranges", b"bytes")
REQUEST_ID: Final = b"x-request-id"
EMPTY: Final[Header] = (b"content-length", b"0")
JSON: Final[Header] = (b"content-type", b"application/json")
OCTET_STREAM: Final[Header] = (b"content-type", BLOB_TYPE.encode())
IMMUTABLE: Final[Header] = (b"cache-control", b"max-age=31536000, immutable")
"""For content named by a digest. Not `public`: a shared cache must not keep what was fetched with Authorization (RFC
9111, 3.5)."""
REVALIDATE: Final[Header] = (b"cache-control", b"no-cache")
"""For content named by a tag, and for lists: a cache asks each time, with If-None-Match."""
NEVER_STORE: Final[Header] = (b"cache-control", b"no-store")
_WARNING_CHARACTERS: Final = 1024
"""Characters of a warning that are sent. The spec allows 4096 bytes of warnings in all."""


def content_headers(digest: Digest) -> list[Header]:
    """Returns the headers that identify content, for clients and for caches."""
    encoded = digest.encode("ascii")
    return [(b"docker-content-digest", encoded), (b"etag", b'"%b"' % encoded)]


def blob_headers(digest: Digest, *, verified: bool) -> list[Header]:
    """Returns the headers that identify a blob and say whether a cache may keep it. Until the blob's digest has been
    verified, the digest only repeats what the client requested: there is no validator then, and no cache may store
    the answer, not even a range that is complete long before the blob is."""
    if verified:
        return [*content_headers(digest), IMMUTABLE, ACCEPT_RANGES]
    return [(b"docker-content-digest", digest.encode("ascii")), NEVER_STORE, ACCEPT_RANGES]


def upload_headers(location: bytes, upload: str, offset: int) -> list[Header]:
    """Returns the headers of an upload session and its progress. An empty session says `0-0`: clients read a range
    there, and the spec has no form for an empty one."""
    return [
        (b"location", location),
        (b"range", b"0-%d" % max(offset - 1, 0)),
        (b"docker-upload-uuid", upload.encode("ascii")),
        NEVER_STORE,
    ]


def allow_header(methods: Iterable[str]) -> Header:
    return b"allow", ", ".join(methods).encode("ascii")


def warning_headers(notice: str | None) -> list[Header]:
    """Returns the header for a notice to the client, in the form of the spec ("Warnings"); none without a notice."""
    if notice is None:
        return []
    plain = "".join(letter if letter.isprintable() else " " for letter in notice[:_WARNING_CHARACTERS])
    return [(b"warning", b'299 - "%b"' % re.sub(rb'(["\\])', rb"\\\1", plain.encode("ascii", "replace")))]
