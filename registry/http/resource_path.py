"""Parses the path of a request below `/v2` into the resource that it names.

A part of a repository name may be any word, even a word of the API such as `blobs`. So a path is parsed from its end. A
path with an escaped '/' (`%2F`) is refused, because another parser could take this '/' for the end of a segment.
"""

from __future__ import annotations

from typing import NamedTuple

from registry.http.error_statuses import PathUnknown
from registry.http.query import percent_decode
from registry.request import RequestInvalid
from storage.errors import NameInvalid


class Resource(NamedTuple):
    """A resource of the distribution API.

    - `kind`: `ping` (`/v2/`), `catalog`, `tags`, `manifests`, `blobs`, `referrers`, `uploads` (where a POST starts
      upload sessions), `session` (one upload session), `extensions` or `history` (of a tag).
    - `name`: the repository's name as the client wrote it, not yet checked; empty: the path names no repository.
    - `resource_id`: a tag, a digest or the id of an upload session, not yet checked; empty: the path has none
      of these."""

    kind: str
    name: str = ""
    resource_id: str = ""


_PING = Resource("ping")
_CATALOG = Resource("catalog")
_EXTENSIONS = Resource("extensions")
_HISTORY_PATH = ["_entrepot", "history"]
"""In the path of a tag's history, the segments between the name of the repository and the tag."""
_KINDS_WITH_ID = frozenset({"manifests", "blobs", "referrers"})
"""The kinds of resources whose path ends with the kind and a `resource_id`, as in `/manifests/TAG`."""


def parse_path(path: bytes) -> Resource:
    """Returns the resource that `path` names. `path` is `/v2` or a path below it, not yet percent-decoded.

    Raises PathUnknown if the path names no resource. Raises NameInvalid if the path cannot be decoded or has an escaped
    '/'."""
    if path in (b"/v2/", b"/v2"):
        return _PING
    segments = _decode_segments(path[4:])
    if segments == ["_catalog"]:
        return _CATALOG
    if segments == ["_oci", "ext", "discover"]:
        return _EXTENSIONS
    resource = _parse_segments(segments)
    # The spec reserves segments that begin with '_' for extensions.
    if resource is None or resource.name.startswith("_") or "/_" in resource.name:
        raise PathUnknown
    return resource


def _decode_segments(path: bytes) -> list[str]:
    """Returns the percent-decoded segments of `path`, the part after `/v2/`. Raises NameInvalid if `path` cannot be
    decoded or has an escaped '/'."""
    if b"%" not in path and path.isascii() and b"\0" not in path:
        return path.decode("ascii").split("/")
    try:
        segments = [percent_decode(part, "the path") for part in path.split(b"/")]
    except RequestInvalid as error:
        raise NameInvalid(error.message) from None
    if any("/" in segment for segment in segments):
        raise NameInvalid("the path contains an escaped '/'")
    return segments


def _parse_segments(segments: list[str]) -> Resource | None:
    """Returns the resource that the segments name, or None if there is no such resource."""
    if len(segments) < 2:
        segments = ["", *segments]  # the assignment needs at least two segments
    *name, kind, resource_id = segments
    if [*name[-1:], kind] == _HISTORY_PATH:
        return Resource("history", "/".join(name[:-1]), resource_id)
    if kind == "uploads" and name and name[-1] == "blobs":
        return Resource("session" if resource_id else "uploads", "/".join(name[:-1]), resource_id)
    if kind == "blobs" and resource_id == "uploads":
        return Resource("uploads", "/".join(name))
    if kind == "tags" and resource_id == "list":
        return Resource("tags", "/".join(name))
    if kind in _KINDS_WITH_ID:
        return Resource(kind, "/".join(name), resource_id)
    return None
