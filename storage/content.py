"""Registry content: descriptors, manifests with their exact bytes, spans, pages, and the actor of a request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Final, Generic, TypeVar

from storage import manifest_parser
from storage.errors import DigestInvalid, ManifestInvalid, RangeInvalid
from storage.names import Digest, shown

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST, OCI_ARTIFACT})

CHECK_CACHE_BYTES: Final = 8 * 1024
"""Size up to which a checked manifest is cached: an image with several tags is pushed once for each."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Type, digest and size in bytes of content (OCI image spec, "Content Descriptors"). `verified`: the content is
    stored here with this digest and size; otherwise another party says so."""

    media_type: str
    digest: Digest
    size: int
    artifact_type: str | None = None
    annotations: Mapping[str, str] | None = None
    platform: Mapping[str, object] | None = None
    verified: bool = field(default=True, compare=False)

    def as_json(self) -> dict[str, object]:
        """Returns the descriptor as a JSON document, as an index has it."""
        document: dict[str, object] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            document["artifactType"] = self.artifact_type
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.platform:
            document["platform"] = dict(self.platform)
        return document

    def json(self) -> bytes:
        """Returns the same as JSON text. Stored annotations are JSON already and are copied."""
        if not isinstance(self.annotations, StoredAnnotations):
            return json.dumps(self.as_json(), separators=(",", ":")).encode("ascii")
        return b'%b,"annotations":%b}' % (replace(self, annotations=None).json()[:-1], self.annotations.json)


class StoredAnnotations(Mapping[str, str]):
    """Annotations as JSON text, as the store has them. A list of referrers copies them without parsing."""

    def __init__(self, json_text: bytes) -> None:
        self.json = json_text

    @cached_property
    def _read(self) -> dict[str, str]:
        found: dict[str, str] = json.loads(self.json)
        return found

    def __getitem__(self, name: str) -> str:
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def __bool__(self) -> bool:
        """Returns True: empty annotations are not stored."""
        return True


def json_of_annotations(annotations: Mapping[str, str]) -> bytes:
    """Returns annotations as JSON text."""
    if isinstance(annotations, StoredAnnotations):
        return annotations.json
    return manifest_parser.annotations_json(annotations)


BLOB_TYPE = "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes from `start` to `stop` (exclusive; None: the end). A negative `start` counts from the end, without
    `stop`."""

    start: int
    stop: int | None = None

    def within(self, size: int) -> tuple[int, int]:
        """Returns the first byte and the one after the last, inside `size` bytes (RFC 9110, 14.1.2). Raises
        RangeInvalid."""
        if self.start < 0:
            start, stop = max(size + self.start, 0), size
        else:
            start, stop = self.start, size if self.stop is None else min(self.stop, size)
        if start >= stop:
            raise RangeInvalid(f"the blob has {size} bytes; no byte of it lies in that range", size=size)
        return start, stop


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file descriptor, which its owner closes, and the offset of the content's byte 0 in the file."""

    fd: int
    offset: int = 0

    def fileno(self) -> int:
        return self.fd


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a list. `more`: something may follow. `place`: the value of `after` for the next page; None: the last
    item. Where a list hides some items, `place` may be a hidden one."""

    items: Sequence[T]
    more: bool = False
    place: str | None = None


@dataclass(frozen=True, slots=True)
class Actor:
    """The client of a request, for tag history and logs."""

    name: str = "anonymous"
    address: str = ""
    request_id: str = ""
    user_agent: str = ""


@dataclass(frozen=True, slots=True)
class Condition:
    """What a tag must point at for a PUT to succeed: one of `digests`; with `absent`, none of them, and without any the
    tag must not exist; with neither, the tag must exist (RFC 9110, 13.1.1 and 13.1.2)."""

    digests: frozenset[str] = frozenset()
    absent: bool = False

    def holds(self, current: Digest | None) -> bool:
        """Returns whether the condition holds for a tag that points at `current` (None: there is no tag)."""
        if self.absent:
            return current is None if not self.digests else current not in self.digests
        return current is not None and (not self.digests or current in self.digests)


@dataclass(frozen=True, slots=True)
class UpstreamCheck:
    """A question to an upstream about a reference: when it was asked (seconds since 1970), and whether it had it."""

    at: float
    known: bool


@dataclass(frozen=True, slots=True)
class PartialFailures:
    """How often owners of a partial blob have stopped fetching it, and the reason that the last one gave."""

    times: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PartialSummary:
    """A partial blob as a listing shows it: `received` of `size` bytes are here; `is_owned`: a process is fetching the
    rest now."""

    digest: Digest
    size: int
    received: int
    is_owned: bool


@dataclass(frozen=True, slots=True)
class BadSender:
    """How often an endpoint sent bytes with another digest for a blob, and when it last did (seconds since 1970)."""

    times: int
    at: float


@dataclass(frozen=True, slots=True)
class Allowance:
    """Rate limit of an upstream: `remaining` requests (None: unknown) of `limit`, as of `at`, and no request before
    `until` (0.0: at any time). Times in seconds since 1970."""

    at: float
    remaining: int | None = None
    limit: int | None = None
    until: float = 0.0


def digest_of(body: bytes, algorithm: str = "sha256") -> Digest:
    """Returns the digest of `body`."""
    return Digest(f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}")


@dataclass(frozen=True)
class Manifest:
    """A manifest or index: its exact bytes, which never change, and their parsed content.

    `Manifest.parse` checks bytes of unknown origin. The plain constructor is for the store, which has checked them."""

    body: bytes = field(repr=False)
    media_type: str
    digest: Digest

    @classmethod
    def parse(cls, body: bytes, media_type: str | None, expected: Digest | None = None) -> Manifest:
        """Checks a pushed manifest and returns it. `media_type`: the Content-Type without parameters; None or empty:
        the one in the body. Raises ManifestInvalid, DigestInvalid (not the `expected` digest)."""
        digest = digest_of(body, expected.algorithm if expected else "sha256")
        if expected and digest != expected:
            raise DigestInvalid("the manifest has another digest", {"expected": expected, "actual": digest})
        return (_checked_once if len(body) <= CHECK_CACHE_BYTES else _checked)(body, media_type, digest)

    @cached_property
    def _parts(self) -> manifest_parser.Parts:
        """Parsed content. Raises ManifestInvalid for a stored manifest that exceeds the present limits; its bytes are
        served all the same."""
        return manifest_parser.read_parts(manifest_parser.load_object(self.body), index=self.media_type in INDEXES)

    @property
    def readable(self) -> bool:
        """Whether the content can be parsed. False only for some manifests that an earlier version stored."""
        try:
            self._parts  # noqa: B018  it is kept
        except ManifestInvalid:
            return False
        return True

    @property
    def descriptor(self) -> Descriptor:
        """Descriptor of the manifest itself, with artifact type and annotations as the referrers API lists them."""
        return Descriptor(self.media_type, self.digest, len(self.body), self.artifact_type, self.annotations or None)

    @cached_property
    def config(self) -> Descriptor | None:
        return self._describe(self._parts.config)

    @cached_property
    def layers(self) -> tuple[Descriptor, ...]:
        return self._describe_all(self._parts.layers)

    @cached_property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Config and layers, the foreign ones included."""
        return (*((self.config,) if self.config else ()), *self.layers)

    @cached_property
    def foreign(self) -> frozenset[Digest]:
        """Blobs that the registry need not have: non-distributable layers."""
        return frozenset(
            d.digest for d in self.blobs if "nondistributable" in d.media_type or "foreign" in d.media_type
        )

    @cached_property
    def manifests(self) -> tuple[Descriptor, ...]:
        """Children of an index."""
        return self._describe_all(self._parts.manifests)

    @cached_property
    def blob_children(self) -> frozenset[Digest]:
        """Entries of an index that have no manifest's type and may be blobs, as in BuildKit's cache indexes."""
        return frozenset(d.digest for d in self.manifests if d.media_type not in MANIFESTS | INDEXES)

    @property
    def subject(self) -> Digest | None:
        part = self._parts.subject
        return Digest(part["digest"]) if part else None

    @property
    def artifact_type(self) -> str | None:
        """The manifest's own type, or else its config's (distribution spec, "Listing Referrers")."""
        if own := self._parts.artifact_type:
            return own
        return self._parts.config["mediaType"] if self._parts.config else None

    @property
    def annotations(self) -> Mapping[str, str]:
        return self._parts.annotations

    @staticmethod
    def _describe(part: manifest_parser.Part | None) -> Descriptor | None:
        if part is None:
            return None
        return Descriptor(
            part["mediaType"],
            Digest(part["digest"]),
            part["size"],
            part.get("artifactType"),
            part.get("annotations"),
            part.get("platform"),
        )

    @classmethod
    def _describe_all(cls, parts: Sequence[manifest_parser.Part]) -> tuple[Descriptor, ...]:
        return tuple(d for d in map(cls._describe, parts) if d is not None)


def _checked(body: bytes, media_type: str | None, digest: Digest) -> Manifest:
    """Raises ManifestInvalid. Does not keep the parsed document, which takes up to thirty times the memory of its
    bytes."""
    document = manifest_parser.load_object(body)
    manifest = Manifest(body, manifest_parser.media_type(document, media_type), digest)
    if manifest.media_type not in MANIFESTS | INDEXES:
        raise ManifestInvalid(f"manifests of type {shown(manifest.media_type)} are not taken here")
    parts = manifest_parser.read_parts(document, index=manifest.media_type in INDEXES)
    manifest_parser.check_pushed(parts)
    if len(body) > CHECK_CACHE_BYTES and parts.annotations:
        parts = replace(parts, annotations=StoredAnnotations(manifest_parser.annotations_json(parts.annotations)))
    manifest.__dict__["_parts"] = parts
    return manifest


_checked_once = lru_cache(maxsize=64)(_checked)
