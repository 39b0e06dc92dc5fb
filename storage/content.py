"""Value types of registry content: descriptors, manifests, spans (parts of a blob), pages (parts of a list), and actors
(the clients that make calls).

Some types are for the mirror, a cache of other registries (its *upstreams*). A *partial blob* is a blob whose download
from an upstream is not complete.
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
"""Size of the largest manifest that `Manifest.parse` caches. Clients push a manifest once for each of its tags; the
cache saves the repeated checks."""
MAX_IMAGE_CONFIG_BYTES: Final = 4 * 1024 * 1024
"""Size of the largest image config that is read into memory. A real config has a few KiB."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """Describes a blob or manifest: media type, digest, size in bytes, and optional fields (OCI image spec, "Content
    Descriptors"). `verified`: whether this registry stores the content and has checked its digest and size. If not, an
    upstream has stated the digest and size."""

    media_type: str
    digest: Digest
    size: int
    artifact_type: str | None = None
    annotations: Mapping[str, str] | None = None
    platform: Mapping[str, object] | None = None
    verified: bool = field(default=True, compare=False)

    def as_json(self) -> dict[str, object]:
        """Returns the descriptor as a dict, in the JSON form of an entry of an index."""
        document: dict[str, object] = {"mediaType": self.media_type, "digest": self.digest, "size": self.size}
        if self.artifact_type:
            document["artifactType"] = self.artifact_type
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        if self.platform:
            document["platform"] = dict(self.platform)
        return document

    def as_json_bytes(self) -> bytes:
        """Returns the dict of `as_json` as JSON text in UTF-8. Copies `JsonAnnotations` without parsing them."""
        if not isinstance(self.annotations, JsonAnnotations):
            return json.dumps(self.as_json(), separators=(",", ":")).encode("ascii")
        # Inserts the annotations before the closing brace of the other fields.
        return b'%b,"annotations":%b}' % (
            replace(self, annotations=None).as_json_bytes()[:-1],
            self.annotations.json_bytes,
        )


class JsonAnnotations(Mapping[str, str]):
    """Annotations of a manifest or descriptor, kept as JSON text, which takes less memory than a dict. The text is
    parsed when an annotation is read for the first time. The referrers API copies the text without parsing it."""

    def __init__(self, json_bytes: bytes) -> None:
        """`json_bytes`: a JSON object in UTF-8 with at least one annotation."""
        self.json_bytes = json_bytes

    @cached_property
    def _parsed(self) -> dict[str, str]:
        parsed: dict[str, str] = json.loads(self.json_bytes)
        return parsed

    def __getitem__(self, name: str) -> str:
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parsed)

    def __len__(self) -> int:
        return len(self._parsed)

    def __bool__(self) -> bool:
        """Returns True without parsing, because the object has at least one annotation."""
        return True


def json_of_annotations(annotations: Mapping[str, str]) -> bytes:
    """Returns annotations as JSON text in UTF-8."""
    if isinstance(annotations, JsonAnnotations):
        return annotations.json_bytes
    return manifest_parser.annotations_json(annotations)


BLOB_TYPE = "application/octet-stream"
"""Media type in the descriptors of stored blobs. A blob's real type is known only from the manifests that refer to the
blob."""


@dataclass(frozen=True, slots=True)
class Span:
    """A requested part of a blob.

    - `start`: offset of the first byte. A negative value selects the last bytes, and `stop` must be None: -5 selects
      the last five bytes.
    - `stop`: offset after the last byte; None: the span ends at the end of the blob."""

    start: int
    stop: int | None = None

    def to_offsets(self, size: int) -> tuple[int, int]:
        """Returns the offset of the span's first byte and the offset after its last byte, for a blob of `size` bytes. A
        span that goes beyond the end of the blob ends at `size` (RFC 9110, 14.1.2). Raises RangeInvalid if the span
        contains no byte of the blob."""
        if self.start < 0:
            start, stop = max(size + self.start, 0), size
        else:
            start, stop = self.start, size if self.stop is None else min(self.stop, size)
        if start >= stop:
            raise RangeInvalid(f"the blob has {size} bytes; the requested range contains none of them", size=size)
        return start, stop


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open file that contains a blob. `fd`: the file descriptor; only the object that opened the file closes it.
    `offset`: where the blob begins in the file, in bytes."""

    fd: int
    offset: int = 0

    def fileno(self) -> int:
        """Returns the file descriptor, so that functions such as `os.fstat` accept an `OpenFile`."""
        return self.fd


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a list. `more`: whether more items may follow this page. `next_after`: the item after which the next
    page begins, which may be an item that the client is not allowed to see. If `next_after` is None, the next page
    begins after the last item of this page."""

    items: Sequence[T]
    more: bool = False
    next_after: str | None = None


@dataclass(frozen=True, slots=True)
class Actor:
    """The client that makes a call, as the logs show it. `name`: name of the client's account; for a call without a
    client, a name for the command or the part of the server that makes the call. `address`: the client's IP address."""

    name: str = "anonymous"
    address: str = ""
    request_id: str = ""
    user_agent: str = ""


MIRROR_ACTOR: Final = Actor(name="mirror")
"""The actor of the changes that the mirror makes to its cached content."""

Pull = tuple[RepositoryName, Digest]
"""A pull of a manifest by a client: the repository's name as the client wrote it, and the manifest's digest."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition on a tag: the tag is changed only if the condition holds. A PUT request states a condition in a
    header (RFC 9110, 13.1.1 and 13.1.2):

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
    """The latest check whether an upstream has a manifest or blob. `at`: time of the check in seconds since 1970.
    `found`: whether the upstream had the manifest or blob."""

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
    `is_downloading`: whether a process is downloading the missing bytes now."""

    digest: Digest
    size: int
    received: int
    is_downloading: bool


@dataclass(frozen=True, slots=True)
class CorruptionRecord:
    """How often one endpoint (server) of an upstream sent *corrupt* bytes for one blob: bytes that do not have the
    blob's digest. `count`: number of downloads of the blob with corrupt bytes from the endpoint. `at`: time of the
    latest of these downloads, in seconds since 1970."""

    count: int
    at: float


@dataclass(frozen=True, slots=True)
class Allowance:
    """The state of an upstream's rate limit. Times are seconds since 1970.

    - `at`: when the upstream reported the state.
    - `remaining`: number of requests that the upstream still accepted at the time `at`; None: not reported.
    - `limit`: number of requests that the upstream accepts in each period; None: not reported.
    - `until`: the mirror must send no request before this time; 0.0: the mirror may send requests."""

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

    Use `Manifest.parse` for bytes that a client or an upstream sent: it checks them. Use the constructor only for
    stored bytes: it checks nothing. If `is_readable` is False, the properties with parsed content raise
    ManifestInvalid."""

    body: bytes = field(repr=False)
    media_type: str
    digest: Digest

    @classmethod
    def parse(cls, body: bytes, media_type: str | None, expected: Digest | None = None) -> Manifest:
        """Checks the bytes of a manifest and returns the manifest. `media_type`: value of Content-Type without
        parameters; None or empty: uses the `mediaType` in the body. `expected`: digest that the body must have; None:
        any digest. Raises DigestInvalid if the body does not have the digest `expected`, and ManifestInvalid if the
        body is not valid. Does not check whether the content that the manifest refers to exists."""
        digest = digest_of(body, expected.algorithm if expected else "sha256")
        if expected and digest != expected:
            raise DigestInvalid(
                "the manifest does not have the expected digest", {"expected": expected, "actual": digest}
            )
        return (_parse_body_cached if len(body) <= MAX_CACHED_MANIFEST_BYTES else _parse_body)(body, media_type, digest)

    @cached_property
    def _parts(self) -> manifest_parser.ManifestParts:
        """The parsed content. Raises ManifestInvalid if `is_readable` is False."""
        return manifest_parser.read_parts(manifest_parser.load_object(self.body), is_index=self.media_type in INDEXES)

    @property
    def is_readable(self) -> bool:
        """Whether the bytes can be parsed. False only for a manifest that an earlier version of this program stored, if
        it exceeds the present limits on JSON (its depth, and the limits of `storage.json_bounds`). Clients can still
        download its bytes."""
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
        """Descriptor of the config blob; None for an index, and for an artifact manifest that has no config."""
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
        """Digests of foreign (non-distributable) layers. The registry need not store these layers: clients download
        them from other servers."""
        return frozenset(
            blob.digest for blob in self.blobs if "nondistributable" in blob.media_type or "foreign" in blob.media_type
        )

    @cached_property
    def manifests(self) -> tuple[Descriptor, ...]:
        """Descriptors that an index lists; empty for other manifests."""
        return self._describe_all(self._parts.manifests)

    @cached_property
    def blob_children(self) -> frozenset[Digest]:
        """Digests of the entries of an index that may be blobs: their media type is neither that of a manifest nor that
        of an index. The indexes of BuildKit's build cache list blobs."""
        return frozenset(entry.digest for entry in self.manifests if entry.media_type not in MANIFESTS | INDEXES)

    @property
    def subject(self) -> Digest | None:
        """Digest of the manifest in the field `subject`; None if the field is missing."""
        part = self._parts.subject
        return Digest(part["digest"]) if part else None

    @property
    def artifact_type(self) -> str | None:
        """The artifact type in the manifest. If the manifest has no artifact type, the media type of its config (OCI
        distribution spec, "Listing Referrers"); None if the manifest has neither."""
        if own := self._parts.artifact_type:
            return own
        return self._parts.config["mediaType"] if self._parts.config else None

    @property
    def annotations(self) -> Mapping[str, str]:
        """Annotations of the manifest itself, not of its descriptors; empty if the manifest has no annotations."""
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
    """Parses and checks the body and returns the manifest. `digest`: the digest of the body. Raises ManifestInvalid. To
    save memory, the manifest keeps only the parsed parts that `ManifestParts` names."""
    document = manifest_parser.load_object(body)
    manifest = Manifest(body, manifest_parser.media_type(document, media_type), digest)
    if manifest.media_type not in MANIFESTS | INDEXES:
        raise ManifestInvalid(f"manifests of type {shown(manifest.media_type)} are not accepted here")
    parts = manifest_parser.read_parts(document, is_index=manifest.media_type in INDEXES)
    # `read_parts` does not check these limits, because it also reads stored manifests (`Manifest._parts`). Manifests
    # that earlier versions stored may exceed the limits.
    manifest_parser.check_limits(parts)
    if len(body) > MAX_CACHED_MANIFEST_BYTES and parts.annotations:
        # Large annotations take less memory as JSON text.
        parts = replace(parts, annotations=JsonAnnotations(manifest_parser.annotations_json(parts.annotations)))
    manifest.__dict__["_parts"] = parts  # sets the value of the cached property `_parts`
    return manifest


_parse_body_cached = lru_cache(maxsize=64)(_parse_body)
"""`_parse_body` with a cache of the most recently used manifests."""
