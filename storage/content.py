"""Value types of registry content: descriptors, manifests, spans (parts of a blob), pages of lists, and the actor of a
call (the client that makes it).

The module also has a few types for the mirror, which is a cache of other registries, its *upstreams*. A *partial blob*
is a blob whose download from an upstream is not complete.
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
from storage.names import Digest, RepositoryName, shown

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
INDEXES = frozenset({OCI_INDEX, DOCKER_LIST})
"""Media types of indexes, which list other manifests."""
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST, OCI_ARTIFACT})
"""Media types of manifests that are not indexes."""

MAX_CACHED_MANIFEST_BYTES: Final = 8 * 1024
"""`Manifest.parse` caches manifests of at most this size. Clients push the same manifest once for each of its tags, and
the cache saves the repeated checks."""
MAX_IMAGE_CONFIG_BYTES: Final = 4 * 1024 * 1024
"""Size of the largest image config that is read into memory. A real config has a few KiB."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Describes a blob or manifest: media type, digest, size in bytes, and optional fields (OCI image spec, "Content
    Descriptors"). `verified`: True if this registry stores the content and has checked its digest and size; False if an
    upstream stated the digest and size and this registry has not checked the content."""

    media_type: str
    digest: Digest
    size: int
    artifact_type: str | None = None
    annotations: Mapping[str, str] | None = None
    platform: Mapping[str, object] | None = None
    verified: bool = field(default=True, compare=False)

    def as_json(self) -> dict[str, object]:
        """Returns the descriptor as a JSON object (a dict), in the form in which an index lists it."""
        document: dict[str, object] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            document["artifactType"] = self.artifact_type
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.platform:
            document["platform"] = dict(self.platform)
        return document

    def as_json_bytes(self) -> bytes:
        """Returns the object of `as_json` as JSON text in UTF-8. Copies `JsonAnnotations` without parsing them."""
        if not isinstance(self.annotations, JsonAnnotations):
            return json.dumps(self.as_json(), separators=(",", ":")).encode("ascii")
        # Replaces the closing brace of the other fields by the annotations and a brace.
        return b'%b,"annotations":%b}' % (replace(self, annotations=None).as_json_bytes()[:-1], self.annotations.json)


class JsonAnnotations(Mapping[str, str]):
    """Annotations of a manifest or descriptor, kept as JSON text in UTF-8 (`json`), which takes less memory than a
    dict. The text is parsed when an annotation is read for the first time. The referrers API copies the text without
    parsing it. There is always at least one annotation."""

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
        """Returns True without parsing, because there is always at least one annotation."""
        return True


def json_of_annotations(annotations: Mapping[str, str]) -> bytes:
    """Returns annotations as JSON text in UTF-8."""
    if isinstance(annotations, JsonAnnotations):
        return annotations.json
    return manifest_parser.annotations_json(annotations)


BLOB_TYPE = "application/octet-stream"
"""Media type in the descriptors of stored blobs. Only the manifests that refer to a blob state its real type."""


@dataclass(frozen=True, slots=True)
class Span:
    """A requested part of a blob: the bytes from offset `start` up to, but without, offset `stop` (None: up to the end
    of the blob). A negative `start` selects the last bytes: -5 selects the last five. `stop` is then None."""

    start: int
    stop: int | None = None

    def to_offsets(self, size: int) -> tuple[int, int]:
        """Returns the offset of the first byte and the offset after the last byte of the span, for a blob of `size`
        bytes. The offset after the last byte is at most `size` (RFC 9110, 14.1.2). Raises RangeInvalid if no byte of
        the blob lies in the span."""
        if self.start < 0:
            start, stop = max(size + self.start, 0), size
        else:
            start, stop = self.start, size if self.stop is None else min(self.stop, size)
        if start >= stop:
            raise RangeInvalid(f"the blob has {size} bytes; no byte of it lies in that range", size=size)
        return start, stop


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file that contains a blob. `fd`: the file descriptor; the object that opened the file closes it.
    `offset`: offset in the file at which the blob begins, in bytes."""

    fd: int
    offset: int = 0

    def fileno(self) -> int:
        """Returns the file descriptor, so that functions such as `os.fstat` accept an `OpenFile`."""
        return self.fd


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list. `more`: whether more items may follow this page. The caller gets the next page by passing
    `next_after` as the argument `after`, or the last item of this page if `next_after` is None. `next_after` can be an
    item that the list leaves out because the client is not allowed to see it."""

    items: Sequence[T]
    more: bool = False
    next_after: str | None = None


@dataclass(frozen=True, slots=True)
class Actor:
    """The client on whose behalf a call is made, as the logs name it. `name`: name of the client's account. For a call
    that a command or the server makes without a client, `name` stands for the command or the server. `address`: the
    client's IP address."""

    name: str = "anonymous"
    address: str = ""
    request_id: str = ""
    user_agent: str = ""


MIRROR_ACTOR: Final = Actor(name="mirror")
"""The actor of downloads and of changes to cached content, which the mirror makes for all clients."""

Pull = tuple[RepositoryName, Digest]
"""A pull of a manifest by a client: the repository's name as the client wrote it, and the manifest's digest."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on a tag. A change of the tag is made only if the condition holds before the change. A PUT request
    states a condition in a header (RFC 9110, 13.1.1 and 13.1.2):

    - `If-Match` (`negated` is False): the tag must point at one of `digests`.
    - `If-Match: *` (`negated` is False, no digests): the tag must exist.
    - `If-None-Match` (`negated` is True): the tag must not point at any of `digests`.
    - `If-None-Match: *` (`negated` is True, no digests): the tag must not exist."""

    digests: frozenset[str] = frozenset()
    negated: bool = False

    def holds(self, current: Digest | None) -> bool:
        """Returns whether the condition holds for a tag that points at `current` (None: the tag does not exist)."""
        if self.negated:
            return current is None if not self.digests else current not in self.digests
        return current is not None and (not self.digests or current in self.digests)


@dataclass(frozen=True, slots=True)
class UpstreamCheck:
    """The latest request that asked an upstream whether it has a manifest or blob. `at`: time of the request in seconds
    since 1970. `found`: whether the upstream had the manifest or blob."""

    at: float
    found: bool


@dataclass(frozen=True, slots=True)
class PartialFailures:
    """Failed attempts to download a partial blob. `count`: number of failures. `reason`: error text of the latest
    failure."""

    count: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class PartialSummary:
    """State of a partial blob. `size`: size of the complete blob in bytes. `received`: number of bytes stored so far.
    `is_owned`: whether a process is downloading the missing bytes now."""

    digest: Digest
    size: int
    received: int
    is_owned: bool


@dataclass(frozen=True, slots=True)
class CorruptionRecord:
    """How often one endpoint (server) of an upstream sent *corrupt* bytes for one blob: bytes that do not have the
    blob's digest. `count`: number of downloads with corrupt bytes. `at`: time of the latest of these downloads, in
    seconds since 1970."""

    count: int
    at: float


@dataclass(frozen=True, slots=True)
class Allowance:
    """The state of an upstream's rate limit. `at`: when the upstream reported the state. `remaining`: number of
    requests that the upstream would still accept then (None: not reported). `limit`: number of requests that it accepts
    in each period (None: not reported). `until`: the mirror must not send a request before this time (0.0: it may send
    requests now). Times are seconds since 1970."""

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

    `Manifest.parse` is for bytes that a client or an upstream sent, and checks them. The constructor checks nothing; it
    is for stored bytes, which were checked before they were stored. The properties with parsed content raise
    ManifestInvalid if `is_readable` is False."""

    body: bytes = field(repr=False)
    media_type: str
    digest: Digest

    @classmethod
    def parse(cls, body: bytes, media_type: str | None, expected: Digest | None = None) -> Manifest:
        """Checks the bytes of a manifest and returns the manifest. `media_type`: value of Content-Type without
        parameters; None or empty: uses the `mediaType` in the body. `expected`: digest that the body must have; None:
        any digest. Raises ManifestInvalid, or DigestInvalid if the body has another digest. Does not check whether the
        content that the manifest refers to exists."""
        digest = digest_of(body, expected.algorithm if expected else "sha256")
        if expected and digest != expected:
            raise DigestInvalid("the manifest has another digest", {"expected": expected, "actual": digest})
        return (_parse_body_cached if len(body) <= MAX_CACHED_MANIFEST_BYTES else _parse_body)(body, media_type, digest)

    @cached_property
    def _parts(self) -> manifest_parser.ManifestParts:
        """The parsed content. Raises ManifestInvalid if the manifest exceeds this version's limits on JSON (the limits
        of `storage.json_bounds`, and the largest depth). Only a manifest that an earlier version of this program stored
        can exceed them. Clients can still download the bytes of such a manifest."""
        return manifest_parser.read_parts(manifest_parser.load_object(self.body), is_index=self.media_type in INDEXES)

    @property
    def is_readable(self) -> bool:
        """Whether the bytes can be parsed. False only for manifests that an earlier version of this program stored and
        that exceed this version's limits on JSON (see `_parts`)."""
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
        """Descriptor of the config blob; None for an index or an artifact manifest without config."""
        return self._describe(self._parts.config)

    @cached_property
    def layers(self) -> tuple[Descriptor, ...]:
        """Descriptors of the layers, in the order of the manifest."""
        return self._describe_all(self._parts.layers)

    @cached_property
    def blobs(self) -> tuple[Descriptor, ...]:
        """Descriptors of the config and of all layers, including the layers in `foreign`."""
        return (*((self.config,) if self.config else ()), *self.layers)

    @cached_property
    def foreign(self) -> frozenset[Digest]:
        """Digests of foreign (non-distributable) layers. The registry need not have them, because clients download them
        from other servers."""
        return frozenset(
            blob.digest for blob in self.blobs if "nondistributable" in blob.media_type or "foreign" in blob.media_type
        )

    @cached_property
    def manifests(self) -> tuple[Descriptor, ...]:
        """Descriptors that an index lists; empty for other manifests."""
        return self._describe_all(self._parts.manifests)

    @cached_property
    def blob_children(self) -> frozenset[Digest]:
        """Digests of the entries of an index that may be blobs, because they do not have the media type of a manifest
        or index. The indexes of BuildKit's build cache list blobs."""
        return frozenset(entry.digest for entry in self.manifests if entry.media_type not in MANIFESTS | INDEXES)

    @property
    def subject(self) -> Digest | None:
        """Digest of the manifest that this manifest refers to as its subject; None if it has no subject."""
        part = self._parts.subject
        return Digest(part["digest"]) if part else None

    @property
    def artifact_type(self) -> str | None:
        """The artifact type that the manifest states. If it states none, the media type of its config (OCI distribution
        spec, "Listing Referrers"); None if it has no config either."""
        if own := self._parts.artifact_type:
            return own
        return self._parts.config["mediaType"] if self._parts.config else None

    @property
    def annotations(self) -> Mapping[str, str]:
        """Annotations of the manifest itself, not of the descriptors in it; empty if it has none."""
        return self._parts.annotations

    @staticmethod
    def _describe(part: manifest_parser.DescriptorFields | None) -> Descriptor | None:
        """Returns the descriptor with the fields of `part`; None if `part` is None."""
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
        return tuple(descriptor for descriptor in map(cls._describe, parts) if descriptor is not None)


def _parse_body(body: bytes, media_type: str | None, digest: Digest) -> Manifest:
    """Parses and checks the body and returns the manifest. `digest`: the digest of the body. The manifest keeps only
    the parts that `ManifestParts` names, because the whole parsed document takes up to thirty times the memory of
    its bytes. Raises ManifestInvalid."""
    document = manifest_parser.load_object(body)
    manifest = Manifest(body, manifest_parser.media_type(document, media_type), digest)
    if manifest.media_type not in MANIFESTS | INDEXES:
        raise ManifestInvalid(f"manifests of type {shown(manifest.media_type)} are not accepted here")
    parts = manifest_parser.read_parts(document, is_index=manifest.media_type in INDEXES)
    # Limits the number of references and the length of media types. These limits do not apply to manifests that earlier
    # versions stored; the limits on JSON do.
    manifest_parser.check_limits(parts)
    if len(body) > MAX_CACHED_MANIFEST_BYTES and parts.annotations:
        # Large annotations take less memory as JSON text.
        parts = replace(parts, annotations=JsonAnnotations(manifest_parser.annotations_json(parts.annotations)))
    manifest.__dict__["_parts"] = parts  # sets the value of the cached property `_parts`
    return manifest


_parse_body_cached = lru_cache(maxsize=64)(_parse_body)
"""`_parse_body` with a cache of the most recently used manifests."""
