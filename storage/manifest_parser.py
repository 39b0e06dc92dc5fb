"""Parses the JSON of a manifest strictly: refuses documents that two parsers could understand differently.

Sources: OCI image spec (manifest, image-index, descriptor); RFC 8259, section 4, for duplicate names.

In all functions, `where` is the place of a value in the document, such as `layers[3]`, for error texts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NotRequired, TypedDict, cast

from storage.errors import DigestInvalid, ManifestInvalid
from storage.json_bounds import OutOfBounds, check_bounds, parse_bounded_float, parse_bounded_int
from storage.names import Digest, shown

MAX_DEPTH = 64
"""Largest number of levels of nested objects and arrays. Real manifests have five or six levels."""
MAX_REFERENCES = 10_000
"""Largest number of layers, or of entries of an index, in a new manifest. The store writes one or two database rows for
each of them."""
MAX_TYPE_LENGTH = 255
"""Longest media type or artifact type in a new manifest, in characters: two names of 127 characters, and a '/' between
them (RFC 6838, 4.2)."""


class DescriptorFields(TypedDict):
    """The checked fields of a descriptor in a manifest, under their names in JSON."""

    mediaType: str
    digest: str
    size: int
    artifactType: NotRequired[str]
    annotations: NotRequired[dict[str, str]]
    platform: NotRequired[dict[str, object]]


_FIELD_NAMES: Final = frozenset(DescriptorFields.__annotations__)


@dataclass(frozen=True, slots=True)
class ManifestParts:
    """The parts of a manifest or index that the registry uses. `layers`: the layers of an image, or the blobs of an
    artifact manifest; empty for an index. `manifests`: the entries of an index; empty for other manifests."""

    config: DescriptorFields | None
    layers: tuple[DescriptorFields, ...]
    manifests: tuple[DescriptorFields, ...]
    subject: DescriptorFields | None
    artifact_type: str | None
    annotations: Mapping[str, str]


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Returns a JSON object as a dict. `pairs`: the names and values of its members. The JSON decoder calls this
    function for each object. Raises ManifestInvalid if two members have the same name."""
    document = dict(pairs)
    if len(document) != len(pairs):
        seen_names: set[str] = set()
        for name, _ in pairs:
            if name in seen_names:
                raise ManifestInvalid(f"the manifest names {shown(name)} twice in one object")
            seen_names.add(name)
    return document


def _refuse_constant(name: str) -> object:
    """Raises ManifestInvalid for `NaN` and `Infinity`, which Python's decoder would accept."""
    raise ManifestInvalid(f"the manifest contains {name}, which is not JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_without_duplicates,
    parse_constant=_refuse_constant,
    parse_int=parse_bounded_int,
    parse_float=parse_bounded_float,
)


_quote: Final[Callable[[str], str]] = json.encoder.encode_basestring
"""A function that returns a text as a JSON string, with quotes."""
_SLICE_CHARACTERS: Final = 64 * 1024
"""Largest number of characters that one call of `_quote` encodes. Other threads can run between two calls."""


def _is_too_deep(document: object) -> bool:
    """Returns whether objects and arrays are nested more than `MAX_DEPTH` levels deep."""
    level, depth = [document], 0
    while level:  # each iteration replaces the objects and arrays of one level by those of the next level
        depth += 1
        if depth > MAX_DEPTH:
            return True
        # `inner` yields, for each object or array of this level, the collection of its values.
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [node for nodes in inner for node in nodes if isinstance(node, dict | list)]
    return False


def _strings_in(document: object) -> Iterator[str]:
    """Yields all strings in the document, including the names of members."""
    pending = [document]
    while pending:
        node = pending.pop()
        if isinstance(node, str):
            yield node
        elif isinstance(node, dict):
            yield from node
            pending += node.values()
        elif isinstance(node, list):
            pending += node


def _has_lone_surrogate(document: object) -> bool:
    """Returns whether a string in the document contains a lone surrogate (half of a surrogate pair). UTF-8, which the
    database needs, cannot encode a lone surrogate."""
    try:
        for text in _strings_in(document):
            if not text.isascii():
                text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def load_object(body: bytes) -> dict[str, object]:
    """Parses the JSON object in `body`. Raises ManifestInvalid if `body` is not UTF-8, not JSON or not an object, has a
    duplicate name in an object, is nested too deeply, or exceeds a limit of `storage.json_bounds`."""
    try:
        check_bounds(body)
        document = _DECODER.decode(body.decode("utf-8"))
    except RecursionError:
        raise ManifestInvalid(f"the manifest is nested more than {MAX_DEPTH} levels deep") from None
    except OutOfBounds as error:
        raise ManifestInvalid(f"the manifest is too large: {error}") from None
    except ValueError as error:
        raise ManifestInvalid(f"the manifest is not JSON: {error}") from None
    if _is_too_deep(document):
        raise ManifestInvalid(f"the manifest is nested more than {MAX_DEPTH} levels deep")
    if not isinstance(document, dict):
        raise ManifestInvalid("the manifest is not a JSON object")
    if b"\\u" in body and _has_lone_surrogate(document):
        raise ManifestInvalid("the manifest contains half of a surrogate pair, which is not a character")
    return cast("dict[str, object]", document)


def media_type(document: dict[str, object], declared: str | None) -> str:
    """Returns the media type of the manifest. Takes it from the first of these that gives one: `declared` (the
    Content-Type; may be empty), the `mediaType` of the document, the other members of the document. Raises
    ManifestInvalid if `declared` and `mediaType` differ, if no type is found, or for a schema 1 manifest."""
    own_type = document.get("mediaType")
    if own_type is not None and not isinstance(own_type, str):
        raise ManifestInvalid("the manifest's mediaType is not a string")
    if document.get("schemaVersion") == 1:
        raise ManifestInvalid("schema 1 manifests are not accepted here; push with Docker 1.10 or newer")
    if declared and own_type and declared != own_type:
        raise ManifestInvalid(f"Content-Type says {shown(declared)}, the manifest's mediaType says {shown(own_type)}")
    if declared or own_type:
        return declared or own_type or ""
    if "manifests" in document:
        return "application/vnd.oci.image.index.v1+json"
    if "config" in document or "layers" in document:
        return "application/vnd.oci.image.manifest.v1+json"
    raise ManifestInvalid("the manifest has no type: send Content-Type, or set mediaType")


def _string_map(value: object, where: str) -> dict[str, str]:
    """Returns `value` if it is an object whose values are strings; returns an empty object if it is None. Raises
    ManifestInvalid for any other value."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise ManifestInvalid(f"{where} is not an object of strings")
    return cast("dict[str, str]", value)


def _optional_string(value: object, where: str) -> str | None:
    """Returns `value` if it is a string; returns None if it is None or empty. Raises ManifestInvalid for any other
    value."""
    if value is not None and not isinstance(value, str):
        raise ManifestInvalid(f"{where} is not a string")
    return value or None


def check_limits(parts: ManifestParts) -> None:
    """Raises ManifestInvalid if a new manifest (from a client or an upstream registry) exceeds `MAX_REFERENCES` or
    `MAX_TYPE_LENGTH`. Must not be called for stored manifests, because earlier versions of this program accepted larger
    ones."""
    count = len(parts.layers) + len(parts.manifests)
    if count > MAX_REFERENCES:
        raise ManifestInvalid(
            f"the manifest refers to {count} blobs and manifests; at most {MAX_REFERENCES} are accepted"
        )
    _check_type_length(parts.artifact_type, "artifactType")
    for where, descriptor in (("config", parts.config), ("subject", parts.subject)):
        if descriptor is not None:
            _check_descriptor_types(descriptor, where)
    for where, descriptors in (("layers", parts.layers), ("manifests", parts.manifests)):
        for descriptor in descriptors:
            _check_descriptor_types(descriptor, where)


def _check_descriptor_types(descriptor: DescriptorFields, where: str) -> None:
    """Raises ManifestInvalid if the media type or artifact type in the descriptor is too long."""
    _check_type_length(descriptor["mediaType"], f"a mediaType in {where}")
    _check_type_length(descriptor.get("artifactType"), f"an artifactType in {where}")


def _check_type_length(type_name: str | None, what: str) -> None:
    """Raises ManifestInvalid if a media type or artifact type is too long. `what`: the subject of the error text."""
    if type_name is not None and len(type_name) > MAX_TYPE_LENGTH:
        raise ManifestInvalid(
            f"{what} has {len(type_name)} characters; at most {MAX_TYPE_LENGTH} are accepted (RFC 6838)"
        )


def annotations_json(annotations: Mapping[str, str]) -> bytes:
    """Returns annotations as JSON text in UTF-8. Encodes them in slices, because `json.dumps` would hold the global
    interpreter lock for the whole time. Collects `bytes` to save memory: in a `str` with one non-Latin character, every
    character takes two or four bytes."""
    parts = [b"{"]
    for name, text in annotations.items():
        parts += (*_quoted_slices(name), b":", *_quoted_slices(text), b",")
    return b"".join(parts[:-1] if annotations else parts) + b"}"


def _quoted_slices(text: str) -> Iterator[bytes]:
    """Yields `text` as a JSON string in UTF-8, in slices."""
    yield b'"'
    for start in range(0, len(text), _SLICE_CHARACTERS):
        yield _quote(text[start : start + _SLICE_CHARACTERS])[1:-1].encode("utf-8")  # without the quotes
    yield b'"'


def _read_descriptor(value: object, where: str) -> DescriptorFields:
    """Checks a descriptor and returns the fields in `DescriptorFields`. Raises ManifestInvalid."""
    if not isinstance(value, dict):
        raise ManifestInvalid(f"{where} is not a descriptor")
    digest, size, descriptor_type = value.get("digest"), value.get("size"), value.get("mediaType")
    if not isinstance(digest, str) or not isinstance(descriptor_type, str) or not descriptor_type:
        raise ManifestInvalid(f"{where} lacks a mediaType or a digest")
    try:
        Digest(digest)
    except DigestInvalid as error:
        raise ManifestInvalid(f"{where}: {error.message}") from None
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 63:
        raise ManifestInvalid(f"{where}: size is not a count of bytes")
    _string_map(value.get("annotations"), f"{where}.annotations")
    _optional_string(value.get("artifactType"), f"{where}.artifactType")
    if not isinstance(value.get("platform") or {}, dict):
        raise ManifestInvalid(f"{where}.platform is not an object")
    if not value.keys() <= _FIELD_NAMES:  # drops other members to save memory
        value = {name: value[name] for name in _FIELD_NAMES if name in value}
    return cast("DescriptorFields", value)


def _read_descriptors(document: dict[str, object], name: str) -> tuple[DescriptorFields, ...]:
    """Returns the checked descriptors in the list `name` of the document. Raises ManifestInvalid."""
    values = document.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise ManifestInvalid(f"{name} is not a list")
    return tuple(_read_descriptor(value, f"{name}[{index}]") for index, value in enumerate(values))


def read_parts(document: dict[str, object], *, is_index: bool) -> ManifestParts:
    """Checks the structure of a manifest and each descriptor in it, and returns its parts. `is_index`: whether the
    manifest has the media type of an index. Raises ManifestInvalid."""
    version = document.get("schemaVersion")
    is_artifact = document.get("mediaType") == "application/vnd.oci.artifact.manifest.v1+json"
    if not (version == 2 and type(version) is int) and not is_artifact:  # in Python, 2.0 == 2
        raise ManifestInvalid("the manifest's schemaVersion is not 2")
    if is_index and ("layers" in document or "config" in document):
        raise ManifestInvalid("an index must not have a config or layers; is this a manifest of another type?")
    if not is_index and "manifests" in document:
        raise ManifestInvalid("an image manifest must not have manifests; is this an index?")
    config, subject = document.get("config"), document.get("subject")
    if not is_index and not is_artifact and config is None:
        raise ManifestInvalid("the manifest has no config")
    if is_index and "manifests" not in document:
        raise ManifestInvalid("the index has no manifests")
    return ManifestParts(
        config=None if config is None else _read_descriptor(config, "config"),
        layers=_read_descriptors(document, "blobs" if is_artifact else "layers"),
        manifests=_read_descriptors(document, "manifests"),
        subject=None if subject is None else _read_descriptor(subject, "subject"),
        artifact_type=_optional_string(document.get("artifactType"), "artifactType"),
        annotations=_string_map(document.get("annotations"), "annotations"),
    )
