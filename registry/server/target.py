"""The request target (RFC 9112, section 3.2): which path and query a client means, in each of the four forms."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import NamedTuple
from urllib.parse import unquote

from registry.server.refusal import Refused

_VISIBLE = re.compile(rb"[!-~]+")
_ABSOLUTE = re.compile(rb"https?://([^/?@]+)([/?].*)?", re.IGNORECASE)
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")


class Target(NamedTuple):
    path: bytes  # as sent, percent-encoding and doubled slashes included
    query: bytes
    host: bytes | None = None  # of an absolute form; it replaces the Host header


def parse_target(target: bytes, method: str) -> Target:
    """Raises Refused with 400."""
    if _VISIBLE.fullmatch(target) is None or b"#" in target:
        raise Refused(HTTPStatus.BAD_REQUEST, "the request target holds characters that must be percent-encoded")
    if target.startswith(b"/"):
        return _split(target)
    if target == b"*" and method == "OPTIONS":
        return Target(b"*", b"")
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None or _HOST.fullmatch(absolute[1]) is None:
        raise Refused(HTTPStatus.BAD_REQUEST, "the request target is not a path")
    rest = absolute[2] or b"/"
    return _split(rest if rest.startswith(b"/") else b"/" + rest)._replace(host=absolute[1])


def unquoted(path: bytes) -> str:
    """A path's text: what ASGI calls its `path`."""
    text = path.decode("ascii")
    return unquote(text) if "%" in text else text


def is_host(value: bytes) -> bool:
    """Whether it has the form of a Host header's value."""
    return _HOST.fullmatch(value) is not None


def check_host(headers: list[tuple[bytes, bytes]], version: str) -> None:
    """Exactly one valid Host in HTTP/1.1, at most one before (RFC 9112, section 3.2). Raises Refused with 400."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version == "1.1"):
        raise Refused(HTTPStatus.BAD_REQUEST, "the request must have one Host header")
    if hosts and not is_host(hosts[0]):
        raise Refused(HTTPStatus.BAD_REQUEST, "the Host header is not valid")


def _split(target: bytes) -> Target:
    path, _, query = target.partition(b"?")
    return Target(path, query)
