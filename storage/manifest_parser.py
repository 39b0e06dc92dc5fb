"""Parses a manifest's JSON strictly: refuses what two parsers could understand differently.

Sources: OCI image spec (manifest, image-index, descriptor); RFC 8259, section 4 for duplicate names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NotRequired, TypedDict, cast

from storage.errors import DigestInvalid, ManifestInvalid
from storage.json_bounds import OutOfBounds, check_bounds, fraction, whole_number
from storage.names import Digest, shown

DEPTH = 64
"""Deepest nesting of objects and arrays. Real manifests have five or six levels."""
REFERENCES = 10_000
"""Most blobs and manifests that a pushed manifest may refer to. Each takes the writer thread a row or two."""
TYPE_LENGTH = 255
"""Most characters of a pushed media type or artifact type: 127, a '/', and 127 (RFC 6838, 4.2)."""


class Part(TypedDict):
    """The checked JSON of a descriptor."""

    mediaType: str
    digest: str
    size: int
    artifactType: NotRequired[str]
    annotations: NotRequired[dict[str, str]]
    platform: NotRequired[dict[str, object]]


_FIELDS: Final = frozenset(Part.__annotations__)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parsed parts of a manifest."""

    config: Part | None
    layers: tuple[Part, ...]
    manifests: tuple[Part, ...]
    subject: Part | None
    artifact_type: str | None
    annotations: Mapping[str, str]


def _object_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ManifestInvalid(f"the manifest names {shown(name)} twice in one object")
            seen.add(name)
    return document


def _no_constant(name: str) -> object:
    raise ManifestInvalid(f"the manifest holds {name}, which is not JSON")


_JSON = json.JSONDecoder(
    object_pairs_hook=_object_once, parse_constant=_no_constant, parse_int=whole_number, parse_float=fraction
)


_escaped: Final[Callable[[str], str]] = json.encoder.encode_basestring
_SLICE: Final = 64 * 1024


def _too_deep(document: object) -> bool:
    level, depth = [document], 0
    while level:
        depth += 1
        if depth > DEPTH:
            return True
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [node for nodes in inner for node in nodes if isinstance(node, dict | list)]
    return False


def _texts_in(document: object) -> Iterator[str]:
    """Yields all strings in the document, names of members included."""
    waiting = [document]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            yield from node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


def _has_half_characters(document: object) -> bool:
    """Returns whether a string has a lone surrogate: JSON escapes can write one, but UTF-8 and the database cannot."""
    try:
        for text in _texts_in(document):
            if not text.isascii():
                text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def load_object(body: bytes) -> dict[str, object]:
    """Parses the JSON object in `body`. Raises ManifestInvalid: not UTF-8, not JSON, not an object, a duplicate name,
    too deep, too many values."""
    try:
        check_bounds(body)
        document = _JSON.decode(body.decode("utf-8"))
    except RecursionError:
        raise ManifestInvalid(f"the manifest is nested more than {DEPTH} levels deep") from None
    except OutOfBounds as error:
        raise ManifestInvalid(f"the manifest is too large: {error}") from None
    except ValueError as error:
        raise ManifestInvalid(f"the manifest is not JSON: {error}") from None
    if _too_deep(document):
        raise ManifestInvalid(f"the manifest is nested more than {DEPTH} levels deep")
    if not isinstance(document, dict):
        raise ManifestInvalid("the manifest is not a JSON object")
    if b"\\u" in body and _has_half_characters(document):
        raise ManifestInvalid("the manifest holds half of a surrogate pair, which is not a character")
    return cast("dict[str, object]", document)


def media_type(document: dict[str, object], declared: str | None) -> str:
    """Returns the manifest's type: `declared` (the Content-Type), which the body must not contradict; or the body's
    own; or the one that its members imply. Raises ManifestInvalid."""
    own = document.get("mediaType")
    if own is not None and not isinstance(own, str):
        raise ManifestInvalid("the manifest's mediaType is not text")
    if document.get("schemaVersion") == 1:
        raise ManifestInvalid("schema 1 manifests are not taken here; push with Docker 1.10 or newer")
    if declared and own and declared != own:
        raise ManifestInvalid(f"Content-Type says {shown(declared)}, the manifest's mediaType says {shown(own)}")
    if declared or own:
        return declared or own or ""
    if "manifests" in document:
        return "application/vnd.oci.image.index.v1+json"
    if "config" in document or "layers" in document:
        return "application/vnd.oci.image.manifest.v1+json"
    raise ManifestInvalid("the manifest has no type: send Content-Type, or set mediaType")


def _texts(value: object, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ManifestInvalid(f"{where} is not an object of texts")
    return cast("dict[str, str]", value)


def _text(value: object, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ManifestInvalid(f"{where} is not text")
    return value or None


def check_pushed(parts: Parts) -> None:
    """Checks the limits that apply to pushed manifests, but not to those that earlier versions stored. Raises
    ManifestInvalid."""
    count = len(parts.layers) + len(parts.manifests)
    if count > REFERENCES:
        raise ManifestInvalid(f"the manifest refers to {count} blobs and manifests; at most {REFERENCES} are taken")
    _check_length(parts.artifact_type, "artifactType")
    for where, part in (("config", parts.config), ("subject", parts.subject)):
        if part is not None:
            _check_lengths(part, where)
    for name, listed in (("layers", parts.layers), ("manifests", parts.manifests)):
        for part in listed:
            _check_lengths(part, name)


def _check_lengths(part: Part, where: str) -> None:
    _check_length(part["mediaType"], f"a mediaType in {where}")
    _check_length(part.get("artifactType"), f"an artifactType in {where}")


def _check_length(kind: str | None, what: str) -> None:
    if kind is not None and len(kind) > TYPE_LENGTH:
        raise ManifestInvalid(f"{what} has {len(kind)} characters; at most {TYPE_LENGTH} are taken (RFC 6838)")


def annotations_json(annotations: Mapping[str, str]) -> bytes:
    """Returns annotations as JSON in UTF-8. Writes member by member, since `json.dumps` holds the interpreter's lock to
    its end; in bytes, since one non-Latin character makes a string up to four times as large in memory."""
    parts = [b"{"]
    for name, text in annotations.items():
        parts += (*_quoted(name), b":", *_quoted(text), b",")
    return b"".join(parts[:-1] if annotations else parts) + b"}"


def _quoted(text: str) -> Iterator[bytes]:
    """Yields the text as JSON in UTF-8, in slices."""
    yield b'"'
    for at in range(0, len(text), _SLICE):
        yield _escaped(text[at : at + _SLICE])[1:-1].encode("utf-8")
    yield b'"'


def _part(value: object, where: str) -> Part:
    if not isinstance(value, dict):
        raise ManifestInvalid(f"{where} is not a descriptor")
    digest, size, kind = value.get("digest"), value.get("size"), value.get("mediaType")
    if not isinstance(digest, str) or not isinstance(kind, str) or not kind:
        raise ManifestInvalid(f"{where} lacks a mediaType or a digest")
    try:
        Digest(digest)
    except DigestInvalid as error:
        raise ManifestInvalid(f"{where}: {error.message}") from None
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
        raise ManifestInvalid(f"{where}: size is not a count of bytes")
    _texts(value.get("annotations"), f"{where}.annotations")
    _text(value.get("artifactType"), f"{where}.artifactType")
    if not isinstance(value.get("platform") or {}, dict):
        raise ManifestInvalid(f"{where}.platform is not an object")
    if not value.keys() <= _FIELDS:  # other members are not kept in memory
        value = {name: value[name] for name in _FIELDS if name in value}
    return cast("Part", value)


def _part_list(document: dict[str, object], name: str) -> tuple[Part, ...]:
    values = document.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise ManifestInvalid(f"{name} is not a list")
    return tuple(_part(value, f"{name}[{place}]") for place, value in enumerate(values))


def read_parts(document: dict[str, object], *, index: bool) -> Parts:
    """Returns the parts of the manifest, with each descriptor checked. Raises ManifestInvalid."""
    version = document.get("schemaVersion")
    artifact = document.get("mediaType") == "application/vnd.oci.artifact.manifest.v1+json"
    if not (version == 2 and type(version) is int) and not artifact:
        raise ManifestInvalid("the manifest's schemaVersion is not 2")
    if index and ("layers" in document or "config" in document):
        raise ManifestInvalid("an index has no config and no layers; is this a manifest of another type?")
    if not index and "manifests" in document:
        raise ManifestInvalid("an image manifest has no manifests; is this an index?")
    config, subject = document.get("config"), document.get("subject")
    if not index and not artifact and config is None:
        raise ManifestInvalid("the manifest has no config")
    if index and "manifests" not in document:
        raise ManifestInvalid("the index has no manifests")
    return Parts(
        config=None if config is None else _part(config, "config"),
        layers=_part_list(document, "blobs" if artifact else "layers"),
        manifests=_part_list(document, "manifests"),
        subject=None if subject is None else _part(subject, "subject"),
        artifact_type=_text(document.get("artifactType"), "artifactType"),
        annotations=_texts(document.get("annotations"), "annotations"),
    )
