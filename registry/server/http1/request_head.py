"""Finds the end of a request's head (request line and headers), checks the head, and parses its target (RFC 9112, 3.2).

Before the checks, the parser httptools splits the head into method, target, version and headers.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Final, NamedTuple
from urllib.parse import unquote

from registry.asgi import Scope
from registry.server.http1.error_responses import RefusedRequest
from registry.server.http1.response_head import Headers

HEAD_END = b"\r\n\r\n"
MAX_BODY_BYTES: Final = 2**63 - 1
"""Largest length of a request's body, in bytes. It is also the largest integer that the database can store."""


def find_head_end(tail: bytes, data: bytes, start: int) -> int:
    """Searches `data` for the CRLFCRLF that ends a head, beginning at the offset `start`. Returns the offset in `data`
    after the CRLFCRLF; the length of `data` if the head does not end in `data`.

    `tail`: empty if the head begins in `data`. If a part of the head was received before `data`: the last bytes of this
    part, at most three. The CRLFCRLF may begin in these bytes.
    """
    if start == 0 and tail:
        position = (tail + data[:3]).find(HEAD_END)
        if position >= 0:
            return position + len(HEAD_END) - len(tail)
    position = data.find(HEAD_END, start)
    return len(data) if position < 0 else position + len(HEAD_END)


def fill_scope(scope: Scope, headers: Headers, target: bytes, version: str, method: str) -> None:
    """Checks a head, and adds its method, version, path and query to the ASGI `scope`. If `target` contains a host,
    this host replaces the Host header in `headers`. Raises RefusedRequest with 400 if the head is not valid or not
    supported."""
    check_is_supported(headers, version, method)
    parsed = parse_target(target, method)
    check_host(headers, version)
    if parsed.host is not None:
        headers[:] = [header for header in headers if header[0] != b"host"] + [(b"host", parsed.host)]
    scope["method"] = method
    scope["http_version"] = version
    scope["path"] = decode_path(parsed.path)
    scope["raw_path"] = parsed.path
    scope["query_string"] = parsed.query


def check_is_supported(headers: Headers, version: str, method: str) -> None:
    """Raises RefusedRequest with 400 if the server does not support the HTTP version, the method or the transfer coding
    of a request (RFC 9112, 6.1 and 7)."""
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if version not in ("1.1", "1.0"):
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, f"HTTP/{version} is not supported: use HTTP/1.1")
    if method == "CONNECT":
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the method CONNECT is not supported: this server is not a proxy")
    if codings and (version != "1.1" or [coding.lower() for coding in codings] != [b"chunked"]):
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the only supported transfer coding is chunked, in HTTP/1.1")


def body_length(headers: Headers) -> int | None:
    """Returns the length of the request's body in bytes; 0 if the request has no body; None if the body is chunked.
    Raises RefusedRequest with 413 if the length is more than `MAX_BODY_BYTES`.

    `headers` must come from httptools. It refuses a head with both Content-Length and Transfer-Encoding, with two
    lengths, or with a length that is not a number."""
    for name, value in headers:
        if name == b"content-length":
            length = int(value)
            if length > MAX_BODY_BYTES:
                raise RefusedRequest(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"Content-Length is {length}; a body has at most {MAX_BODY_BYTES} bytes",
                )
            return length
        if name == b"transfer-encoding":
            return None
    return 0


_VISIBLE_ASCII = re.compile(rb"[!-~]+")
"""Visible ASCII characters, the only characters that are allowed in a request target."""
_ABSOLUTE_FORM = re.compile(rb"https?://([^/?@]+)([/?].*)?", re.IGNORECASE)
"""A URL of HTTP or HTTPS. The first group is the host and port, the second group is the path and query."""
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")
"""The characters that are allowed in a host and port. The host can be a name, an IPv4 address, or an IPv6 address in
brackets."""


class ParsedTarget(NamedTuple):
    """The parts of a request target, exactly as the client sent them: neither decoded nor normalized."""

    path: bytes
    query: bytes
    """The part after the first question mark; empty if there is none."""
    host: bytes | None = None
    """The host and port of a target in absolute form (`http://host/path`); None for a target in another form."""


def parse_target(target: bytes, method: str) -> ParsedTarget:
    """Parses a request target in origin form (`/path`), absolute form (`http://host/path`) or, for OPTIONS, asterisk
    form (`*`). Raises RefusedRequest with 400 for any other target."""
    if _VISIBLE_ASCII.fullmatch(target) is None or b"#" in target:
        raise RefusedRequest(
            HTTPStatus.BAD_REQUEST, "the request target contains characters that must be percent-encoded"
        )
    if target.startswith(b"/"):
        return _split_query(target)
    if target == b"*" and method == "OPTIONS":
        return ParsedTarget(b"*", b"")
    absolute = _ABSOLUTE_FORM.fullmatch(target)
    if absolute is None or _HOST.fullmatch(absolute[1]) is None:
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the request target is not a path")
    path_and_query = absolute[2] or b"/"
    return _split_query(path_and_query if path_and_query.startswith(b"/") else b"/" + path_and_query)._replace(
        host=absolute[1]
    )


def decode_path(path: bytes) -> str:
    """Returns the path without percent-encoding, as ASGI requires for `scope["path"]`."""
    text = path.decode("ascii")
    return unquote(text) if "%" in text else text


def has_only_host_characters(value: bytes) -> bool:
    """Returns whether `value` contains only characters that are allowed in a Host header."""
    return _HOST.fullmatch(value) is not None


def check_host(headers: list[tuple[bytes, bytes]], version: str) -> None:
    """Checks the Host header (RFC 9112, 3.2). Raises RefusedRequest with 400 if the header is not valid, if the request
    has several Host headers, or if the header is missing in HTTP/1.1."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the request must have one Host header")
    if hosts and not has_only_host_characters(hosts[0]):
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the Host header is not valid")


def _split_query(target: bytes) -> ParsedTarget:
    path, _, query = target.partition(b"?")
    return ParsedTarget(path, query)
