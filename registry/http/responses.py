"""Answers, written as ASGI messages. What never changes is encoded once, here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from registry.http.errors import error_json, status_of
from registry.http.exchange import Exchange, Header
from registry.request import NOTICE
from storage.content import BLOB_TYPE
from storage.errors import RangeInvalid, RegistryError, TooManyOpenFiles, TooManyRequests, UpstreamUnavailable
from storage.names import Digest

API_VERSION: Header = (b"docker-distribution-api-version", b"registry/2.0")
NO_SNIFF: Header = (b"x-content-type-options", b"nosniff")
ACCEPT_RANGES: Header = (b"accept-ranges", b"bytes")
REQUEST_ID = b"x-request-id"
EMPTY: Header = (b"content-length", b"0")
JSON: Header = (b"content-type", b"application/json")
OCTET_STREAM: Header = (b"content-type", BLOB_TYPE.encode())
IMMUTABLE: Header = (b"cache-control", b"max-age=31536000, immutable")
"""For what a digest names. Not `public`: a shared cache may keep what anybody could fetch, and must not keep what was
fetched with Authorization (RFC 9111, 3.5)."""
REVALIDATE: Header = (b"cache-control", b"no-cache")
"""For what a tag names, and for lists: a cache asks each time, with If-None-Match."""
NEVER_STORE: Header = (b"cache-control", b"no-store")
_WARNING = 1024
"""Characters of a warning at the most; the spec allows 4096 bytes of them in all."""


async def send_head(exchange: Exchange, status: int, headers: Iterable[Header]) -> None:
    """Status and headers; a body has to follow."""
    if exchange.namespace is not None:
        headers = (*headers, (b"oci-namespace", exchange.namespace.encode("ascii")))
    await exchange.send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [API_VERSION, NO_SNIFF, (REQUEST_ID, exchange.request_id.encode()), *headers],
        }
    )


async def send_part(exchange: Exchange, body: bytes, *, more: bool = False) -> None:
    await exchange.send({"type": "http.response.body", "body": body, "more_body": more})


async def send_empty(exchange: Exchange, status: int, *headers: Header) -> None:
    """An answer without a body. A 204 or 304 has no Content-Length of its own (RFC 9110, 8.6)."""
    await send_head(exchange, status, headers if status in (204, 304) else (*headers, EMPTY))
    await send_part(exchange, b"")


async def send_whole(exchange: Exchange, status: int, body: bytes, *headers: Header) -> None:
    """An answer with all of its body at once; to HEAD, the same without the body."""
    await send_head(exchange, status, (*headers, (b"content-length", b"%d" % len(body))))
    await send_part(exchange, b"" if exchange.method == "HEAD" else body)


def json_of(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode("ascii")


async def send_error(exchange: Exchange, error: RegistryError, *more: Header) -> None:
    """`more` are further headers."""
    status = status_of(error)
    body = error_json(error.code, error.message, error.detail)
    await send_whole(exchange, status, body, JSON, NEVER_STORE, *_error_headers(exchange, error, status), *more)


async def send_failure(exchange: Exchange) -> None:
    """The answer when nobody knows what went wrong but the log."""
    message = f"the registry failed; its log says more under request {exchange.request_id}"
    await send_whole(exchange, 500, error_json("UNKNOWN", message), JSON, NEVER_STORE)


def _error_headers(exchange: Exchange, error: RegistryError, status: int) -> list[Header]:
    if status == 405:
        return [allow_header(method for method in exchange.allowed if method != exchange.method)]
    if isinstance(error, TooManyRequests | TooManyOpenFiles | UpstreamUnavailable) and error.retry_after is not None:
        return [(b"retry-after", b"%d" % error.retry_after)]
    if isinstance(error, RangeInvalid) and error.size is not None:
        return [(b"content-range", b"bytes */%d" % error.size), ACCEPT_RANGES]
    if isinstance(error, RangeInvalid) and error.offset is not None:
        return upload_headers(exchange, exchange.item, error.offset)
    return []


def allow_header(methods: Iterable[str]) -> Header:
    return b"allow", ", ".join(methods).encode("ascii")


def content_headers(digest: Digest) -> list[Header]:
    """What says which content this is, for clients and for caches."""
    encoded = digest.encode("ascii")
    return [(b"docker-content-digest", encoded), (b"etag", b'"%b"' % encoded)]


def blob_headers(digest: Digest, *, verified: bool) -> list[Header]:
    """The same of a blob, and whether a cache may keep it. While its digest has not been checked, the digest only says
    which content was asked for: there is no validator then, and nothing of the answer may be stored. A range can be
    complete long before the blob is."""
    if verified:
        return [*content_headers(digest), IMMUTABLE, ACCEPT_RANGES]
    return [(b"docker-content-digest", digest.encode("ascii")), NEVER_STORE, ACCEPT_RANGES]


def warning_headers() -> list[Header]:
    """What the client should be told about this answer: a Warning, as the spec has it ("Warnings")."""
    text = NOTICE.get()
    if text is None:
        return []
    plain = "".join(letter if letter.isprintable() else " " for letter in text[:_WARNING])
    return [(b"warning", b'299 - "%b"' % re.sub(rb'(["\\])', rb"\\\1", plain.encode("ascii", "replace")))]


def upload_headers(exchange: Exchange, upload: str, offset: int) -> list[Header]:
    """Where an upload session is and how far it came. An empty one says `0-0`: clients want to read a range there, and
    the spec has no form for none."""
    return [
        (b"location", exchange.locate("blobs/uploads", upload)),
        (b"range", b"0-%d" % max(offset - 1, 0)),
        (b"docker-upload-uuid", upload.encode("ascii")),
        NEVER_STORE,
    ]
