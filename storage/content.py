"""Value types of registry content: descriptors, manifests, spans (parts of a blob), pages of lists, and the actor of a
call.

A few types for the mirror stand here too. The mirror is a cache of other registries, its *upstreams*. A *partial blob*
is a blob that is still being downloaded from an upstream.
"""

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
"""Media types of indexes, which list other manifests."""
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST, OCI_ARTIFACT})
"""Media types of manifests that are not indexes."""

CHECK_CACHE_BYTES: Final = 8 * 1024
"""Largest manifest, in bytes, that `Manifest.parse` caches after checking it. The cache helps because clients push the
same manifest once for each of its tags."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Media type, digest and size in bytes of a blob or manifest (OCI image spec, "Content Descriptors"). `verified`:
    True if the content is stored here and has this digest and size; False if an upstream registry stated them and the
    content was not checked."""

    media_type: str
    digest: Digest
    size: int
    artifact_type: str | None = None
    annotations: Mapping[str, str] | None = None
    platform: Mapping[str, object] | None = None
    verified: bool = field(default=True, compare=False)

    def as_json(self) -> dict[str, object]:
        """Returns the descriptor as a JSON object (a dict), in the form of an entry of an index."""
        document: dict[str, object] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            document["artifactType"] = self.artifact_type
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.platform:
            document["platform"] = dict(self.platform)
        return document

    def as_json_text(self) -> bytes:
        """Returns the JSON object of `as_json` as text in UTF-8. Copies `StoredAnnotations` without parsing them."""
        if not isinstance(self.annotations, StoredAnnotations):
            return json.dumps(self.as_json(), separators=(",", ":")).encode("ascii")
        return b'%b,"annotations":%b}' % (replace(self, annotations=None).as_json_text()[:-1], self.annotations.json)


class StoredAnnotations(Mapping[str, str]):
    """Annotations that the store holds as JSON text (`json`). They are parsed only when one of them is read. A list of
    referrers copies the text and never parses it."""

    def __init__(self, json_text: bytes) -> None:
        self.json = json_text

    @cached_property
    def _parsed(self) -> dict[str, str]:
        parsed: dict[str, str] = json.loads(self.json)
        return parsed

    def __getitem__(self, name: str) -> str:
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parsed)

    def __len__(self) -> int:
        return len(self._parsed)

    def __bool__(self) -> bool:
        """Returns True without parsing, because the store keeps no empty annotations."""
        return True


def json_of_annotations(annotations: Mapping[str, str]) -> bytes:
    """Returns annotations as JSON text in UTF-8."""
    if isinstance(annotations, StoredAnnotations):
        return annotations.json
    return manifest_parser.annotations_json(annotations)


BLOB_TYPE = "application/octet-stream"
"""Media type of every blob, because the store does not know the type that a manifest gives it."""


@dataclass(frozen=True, slots=True)
class Span:
    """A requested part of a blob: the bytes from offset `start` up to, but without, offset `stop` (None: to the end). A
    negative `start` asks for the last bytes, -5 for the last five; `stop` is then None."""

    start: int
    stop: int | None = None

    def to_offsets(self, size: int) -> tuple[int, int]:
        """Returns the offsets of the first byte and of the byte after the last one, for a blob of `size` bytes. A span
        that ends beyond the blob is cut (RFC 9110, 14.1.2). Raises RangeInvalid if no byte of the blob lies in it."""
        if self.start < 0:
            start, stop = max(size + self.start, 0), size
        else:
            start, stop = self.start, size if self.stop is None else min(self.stop, size)
        if start >= stop:
            raise RangeInvalid(f"the blob has {size} bytes; no byte of it lies in that range", size=size)
        return start, stop


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file that holds content. `fd`: the file descriptor; whoever opened it closes it. `offset`: where in the
    file the content begins, in bytes."""

    fd: int
    offset: int = 0

    def fileno(self) -> int:
        """Returns the file descriptor, so that the object can be passed to functions such as `os.fstat`."""
        return self.fd


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list. `more`: whether items may follow. `next_after`: the value to pass as `after` to get the next
    page; None: pass the last item. If the list leaves out items that the client may not see, `next_after` may name such
    an item."""

    items: Sequence[T]
    more: bool = False
    next_after: str | None = None


@dataclass(frozen=True, slots=True)
class Actor:
    """The client on whose behalf a call is made, as the audit log and logs name it. `name`: its account. `address`: its
    IP address."""

    name: str = "anonymous"
    address: str = ""
    request_id: str = ""
    user_agent: str = ""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on the current target of a tag, from the headers of a PUT (RFC 9110, 13.1.1 and 13.1.2).

    `If-Match: "<digest>"` gives `digests`: the tag must point at one of them. `If-Match: *` gives no digests: the tag
    must exist. `If-None-Match` sets `absent` and reverses both: the tag must not point at one of `digests`, or, without
    digests, must not exist."""

    digests: frozenset[str] = frozenset()
    absent: bool = False

    def holds(self, current: Digest | None) -> bool:
        """Returns whether the condition holds for a tag that points at `current` (None: the tag does not exist)."""
        if self.absent:
            return current is None if not self.digests else current not in self.digests
        return current is not None and (not self.digests or current in self.digests)


@dataclass(frozen=True, slots=True)
class UpstreamCheck:
    """The last answer of an upstream about a manifest or blob. `at`: time of the request in seconds since 1970.
    `found`: whether the upstream had the manifest or blob."""

    at: float
    found: bool


@dataclass(frozen=True, slots=True)
class PartialFailures:
    """Failed attempts to download a partial blob. `times`: number of failures. `reason`: error text of the latest."""

    times: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PartialSummary:
    """A partial blob in a listing: `received` of its `size` bytes have been stored. `is_owned`: a process is
    downloading the missing bytes now."""

    digest: Digest
    size: int
    received: int
    is_owned: bool


@dataclass(frozen=True, slots=True)
class BadSender:
    """An endpoint of an upstream that sent corrupt bytes for a blob: bytes with another digest. `times`: how often.
    `at`: when it last did so, in seconds since 1970."""

    times: int
    at: float


@dataclass(frozen=True, slots=True)
class Allowance:
    """The state of an upstream's rate limit. `at`: when the upstream reported it. `remaining` of `limit` requests were
    left then (None: not reported). `until`: no request may be sent before this time (0.0: requests may be sent now).
    Times are seconds since 1970."""

    at: float
    remaining: int | None = None
    limit: int | None = None
    until: float = 0.0


def digest_of(body: bytes, algorithm: str = "sha256") -> Digest:
    """Returns the digest of `body`. `algorithm`: `sha256` or `sha512`."""
    return Digest(f"{algorithm}:{hashlib.new(algorithm, body).hexdigest()}")


@dataclass(frozen=True)
class Manifest:
    """A manifest or index: its exact bytes (`body`) and, as properties, the parsed content.

    `Manifest.parse` checks bytes that come from outside. The plain constructor does not check; it is for bytes from the
    store, which were checked when they were pushed. Properties raise ManifestInvalid if the bytes cannot be parsed (see
    `is_readable`)."""

    body: bytes = field(repr=False)
    media_type: str
    digest: Digest

    @classmethod
    def parse(cls, body: bytes, media_type: str | None, expected: Digest | None = None) -> Manifest:
        """Checks the bytes of a manifest and returns it. `media_type`: the Content-Type without parameters; if None or
        empty, the type that the body states counts. `expected`: the digest that the body must have; None: any. Raises
        ManifestInvalid, DigestInvalid (the body has another digest). Does not check that the blobs exist."""
        digest = digest_of(body, expected.algorithm if expected else "sha256")
        if expected and digest != expected:
            raise DigestInvalid("the manifest has another digest", {"expected": expected, "actual": digest})
        return (_check_cached if len(body) <= CHECK_CACHE_BYTES else _check)(body, media_type, digest)

    @cached_property
    def _parts(self) -> manifest_parser.ManifestParts:
        """Parsed content. Raises ManifestInvalid for a manifest that an earlier version stored and that exceeds the
        limits of this version. The bytes of such a manifest are still served."""
        return manifest_parser.read_parts(manifest_parser.load_object(self.body), index=self.media_type in INDEXES)

    @property
    def is_readable(self) -> bool:
        """Whether the content can be parsed. False only for manifests that an earlier version stored and that exceed
        the limits of this version."""
        try:
            self._parts  # noqa: B018  parses the body and caches the result
        except ManifestInvalid:
            return False
        return True

    @property
    def descriptor(self) -> Descriptor:
        """Descriptor of the manifest itself, with the artifact type and annotations that the referrers API lists."""
        return Descriptor(self.media_type, self.digest, len(self.body), self.artifact_type, self.annotations or None)

    @cached_property
    def config(self) -> Descriptor | None:
        """Descriptor of the config blob; None for an index."""
        return self._describe(self._parts.config)

    @cached_property
    def layers(self) -> tuple[Descriptor, ...]:
        """Descriptors of the layers, in the order of the manifest."""
        return self._describe_all(self._parts.layers)

    @cached_property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Descriptors of the config and of all layers, foreign layers included."""
        return (*((self.config,) if self.config else ()), *self.layers)

    @cached_property
    def foreign(self) -> frozenset[Digest]:
        """Digests of foreign layers: non-distributable layers, which clients download elsewhere. The registry need not
        have them."""
        return frozenset(
            d.digest for d in self.blobs if "nondistributable" in d.media_type or "foreign" in d.media_type
        )

    @cached_property
    def manifests(self) -> tuple[Descriptor, ...]:
        """Descriptors of the entries of an index; empty for other manifests."""
        return self._describe_all(self._parts.manifests)

    @cached_property
    def blob_children(self) -> frozenset[Digest]:
        """Digests of entries of an index that may be blobs, because their media type is not a manifest's. The cache
        indexes of BuildKit have such entries."""
        return frozenset(d.digest for d in self.manifests if d.media_type not in MANIFESTS | INDEXES)

    @property
    def subject(self) -> Digest | None:
        """Digest of the manifest that this manifest refers to as its subject; None if it has no subject."""
        part = self._parts.subject
        return Digest(part["digest"]) if part else None

    @property
    def artifact_type(self) -> str | None:
        """The artifact type that the manifest states, or else the media type of its config (distribution spec,
        "Listing Referrers"); None if it has neither."""
        if own := self._parts.artifact_type:
            return own
        return self._parts.config["mediaType"] if self._parts.config else None

    @property
    def annotations(self) -> Mapping[str, str]:
        """Annotations of the manifest itself; empty if it has none."""
        return self._parts.annotations

    @staticmethod
    def _describe(part: manifest_parser.DescriptorFields | None) -> Descriptor | None:
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
    def _describe_all(cls, parts: Sequence[manifest_parser.DescriptorFields]) -> tuple[Descriptor, ...]:
        return tuple(d for d in map(cls._describe, parts) if d is not None)


def _check(body: bytes, media_type: str | None, digest: Digest) -> Manifest:
    """Parses and checks the body and returns the manifest. Keeps only the parts that are needed later, because the
    whole parsed document takes up to thirty times the memory of its bytes. Raises ManifestInvalid."""
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


_check_cached = lru_cache(maxsize=64)(_check)
