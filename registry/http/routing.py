"""Parses the path of a request below `/v2`.

Repository names may hold any word, so a path is parsed from its end. Each segment is percent-decoded by itself: an
escaped '/' never separates segments.
"""

from __future__ import annotations

from typing import NamedTuple

from registry.http.errors import PathUnknown
from registry.http.query import percent_decode
from registry.request import RequestInvalid
from storage.errors import NameInvalid


class Resource(NamedTuple):
    """The resource that a path names: its kind, the repository's name, and the last segment."""

    kind: str
    name: str = ""
    item: str = ""


_PING = Resource("ping")
_CATALOG = Resource("catalog")
_ITEMS = frozenset({"manifests", "blobs", "referrers"})


def _segments(path: bytes) -> list[str]:
    if b"%" not in path and path.isascii() and b"\0" not in path:
        return path.decode("ascii").split("/")
    try:
        segments = [percent_decode(part, "the path") for part in path.split(b"/")]
    except RequestInvalid as error:
        raise NameInvalid(error.message) from None
    if any("/" in segment for segment in segments):
        raise NameInvalid("the path holds an escaped '/'")
    return segments


def parse_path(path: bytes) -> Resource:
    """Returns the resource of a raw path: `/v2` or a path below it. Raises PathUnknown, NameInvalid."""
    if path in (b"/v2/", b"/v2"):
        return _PING
    segments = _segments(path[4:])
    if segments == ["_catalog"]:
        return _CATALOG
    resource = _parse_segments(segments)
    if resource is None or resource.name.startswith("_") or "/_" in resource.name:
        raise PathUnknown
    return resource


def _parse_segments(segments: list[str]) -> Resource | None:
    *name, kind, item = segments if len(segments) > 1 else ["", *segments]
    if kind == "uploads" and name and name[-1] == "blobs":
        return Resource("session" if item else "uploads", "/".join(name[:-1]), item)
    if kind == "blobs" and item == "uploads":
        return Resource("uploads", "/".join(name))
    if kind == "tags" and item == "list":
        return Resource("tags", "/".join(name))
    if kind in _ITEMS:
        return Resource(kind, "/".join(name), item)
    return None
