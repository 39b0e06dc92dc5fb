"""The head of a request: where it ends, whether it is valid, its target (RFC 9112, 3.2), and its body's length."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import unquote

from registry.asgi import Scope
from registry.server.http1.error_responses import RefusedRequest
from registry.server.http1.response_head import Headers

_END = b"\r\n\r\n"


def find_head_end(tail: bytes, data: bytes, at: int) -> int:
    """Returns where the head that begins or continues at `at` ends in `data`: after its last byte, or with the data.
    `tail` are the last three bytes of the head before `data`, since its end may be cut in two."""
    if at == 0 and tail:
        found = (tail + data[:3]).find(_END)
        if found >= 0:
            return found + len(_END) - len(tail)
    found = data.find(_END, at)
    return len(data) if found < 0 else found + len(_END)


def fill_scope(scope: Scope, headers: Headers, url: bytes, version: str, method: str) -> None:
    """Adds method, version, path and query to `scope`. A host in the target replaces the one in `headers`. Raises
    RefusedRequest with 400."""
    check_head(headers, version, method)
    target = parse_target(url, method)
    check_host(headers, version)
    if target.host is not None:
        headers[:] = [header for header in headers if header[0] != b"host"] + [(b"host", target.host)]
    scope["method"] = method
    scope["http_version"] = version
    scope["path"] = unquoted(target.path)
    scope["raw_path"] = target.path
    scope["query_string"] = target.query


def check_head(headers: Headers, version: str, method: str) -> None:
    """Raises RefusedRequest with 400 for versions, methods and transfer codings that are not supported (RFC 9112, 6.1
    and 7)."""
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if version not in ("1.1", "1.0"):
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, f"HTTP/{version} is not spoken here")
    if method == "CONNECT":
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "this is no proxy to connect through")
    if codings and (version != "1.1" or [coding.lower() for coding in codings] != [b"chunked"]):
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the only transfer coding is chunked, in HTTP/1.1")


def body_length(headers: Headers) -> int | None:
    """Returns the body's length in bytes; None if it comes in chunks."""
    for name, value in headers:
        if name == b"content-length":
            return int(value)
        if name == b"transfer-encoding":
            return None
    return 0


_VISIBLE = re.compile(rb"[!-~]+")
_ABSOLUTE = re.compile(rb"https?://([^/?@]+)([/?].*)?", re.IGNORECASE)
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")


class ParsedTarget(NamedTuple):
    """A request target, with percent-encoding and doubled slashes as sent."""

    path: bytes
    query: bytes
    host: bytes | None = None
    """Of a target in absolute form; it replaces the Host header."""


def parse_target(target: bytes, method: str) -> ParsedTarget:
    """Parses a request target in any form that is served. Raises RefusedRequest with 400."""
    if _VISIBLE.fullmatch(target) is None or b"#" in target:
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the request target holds characters that must be percent-encoded")
    if target.startswith(b"/"):
        return _split(target)
    if target == b"*" and method == "OPTIONS":
        return ParsedTarget(b"*", b"")
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or _HOST.fullmatch(absolute[1]) is None:
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the request target is not a path")
    rest = absolute[2] or b"/"
    return _split(rest if rest.startswith(b"/") else b"/" + rest)._replace(host=absolute[1])


def unquoted(path: bytes) -> str:
    """Returns the decoded path: what ASGI calls `path`."""
    text = path.decode("ascii")
    return unquote(text) if "%" in text else text


def is_host(value: bytes) -> bool:
    """Returns whether `value` has the form of a Host header's value."""
    return _HOST.fullmatch(value) is not None


def check_host(headers: list[tuple[bytes, bytes]], version: str) -> None:
    """Raises RefusedRequest with 400 unless there is one valid Host, or at most one in HTTP/1.0 (RFC 9112, 3.2)."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the request must have one Host header")
    if hosts and not is_host(hosts[0]):
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "the Host header is not valid")


def _split(target: bytes) -> ParsedTarget:
    path, _, query = target.partition(b"?")
    return ParsedTarget(path, query)
