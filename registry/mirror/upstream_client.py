"""Protocol of the client with which the mirror sends requests to an upstream registry (`UpstreamClient`).

The mirror is a pull-through cache; an *upstream* is a registry that it caches. An upstream has one or more *endpoints*:
base URLs that serve the same content. The mirror itself contains no HTTP code; `registry.upstream` implements this
Protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from registry.memory_budget import ShareScope
from storage.content import Descriptor, Manifest, Page, Span
from storage.errors import BlobUnknown, ManifestUnknown, NameUnknown, RegistryError, UpstreamUnavailable
from storage.names import Digest, Reference, RepositoryName, Tag


class RangesUnsupported(RegistryError):
    """The upstream ignores or refuses byte ranges: it sends only whole blobs. The `BlobSink` has got no bytes."""

    default = "the upstream registry sends only whole blobs"


class UpstreamContentInvalid(UpstreamUnavailable):
    """The upstream sent a manifest that is not valid, or whose media type is not accepted. A retry does not help."""

    default = "the upstream registry sends a manifest that is not valid"


class BlobSizeWrong(UpstreamUnavailable):
    """The upstream sends a blob whose size differs from the size in the manifests of the repository. Possibly it sends
    something else than the blob, such as an error page."""


class BlobLengthWrong(BlobSizeWrong):
    """The upstream did not state the size of a blob, and its response was shorter or longer than the expected size. The
    `BlobSink` has got bytes, possibly the bytes of an error page."""


class BlobSizeUnknown(UpstreamUnavailable):
    """The upstream has the blob, because its response names the blob's digest. But the response does not state the
    size."""


class Unconfirmed:
    """Base class of the three errors for a response "not found" that may be wrong: the content may exist."""

    is_refusal = False
    """Whether the cause is a missing login, so that a retry does not help.

    - True: the upstream or its token service has refused a request without a login, or the settings require a login
      that docker's `config.json` lacks.
    - False: the response possibly comes from a proxy or firewall. A retry may get another response."""


class UnconfirmedManifestUnknown(Unconfirmed, ManifestUnknown):
    """The response says that the manifest does not exist, but a proxy or firewall in front of the upstream possibly
    sent this response. So the mirror neither deletes its cached manifest nor caches the response."""

    default = "the upstream registry does not have the manifest, or refuses to send it"


class UnconfirmedNameUnknown(Unconfirmed, NameUnknown):
    """The response to the request for a list, such as that of the tags of a repository, says that the repository does
    not exist, but a proxy or firewall in front of the upstream possibly sent this response. So the mirror responds with
    the list of its cached content."""

    default = "the upstream registry does not have the list, or refuses to send it"


class UnconfirmedBlobUnknown(Unconfirmed, BlobUnknown):
    """The response says that the blob does not exist, but a proxy or firewall in front of the upstream possibly sent
    this response. So the mirror does not cache the response."""

    default = "the upstream registry does not have the blob, or refuses to send it"


@dataclass(frozen=True, slots=True)
class EndpointHealth:
    """The state of an endpoint of an upstream, as one process has observed it.

    - `breaker`: the state of the circuit breaker. `closed`: requests are sent to the endpoint. `open`: no requests are
      sent. `half-open`: the next request is a trial.
    - `failures`: number of failures in a row.
    - `retry_in_seconds`: seconds until the open breaker becomes half-open; None if the breaker is not open.
    - `last_error`, `last_error_at`: the message and the time (seconds since 1970) of the last failure; None: there was
      none."""

    url: str
    breaker: Literal["closed", "open", "half-open"]
    failures: int
    retry_in_seconds: float | None
    last_error: str | None
    last_error_at: float | None


class BlobSink(Protocol):
    """Receives the bytes of one call of `UpstreamClient.fetch_blob`. Its methods are called in a thread, one after
    another. If a method raises an exception, `fetch_blob` raises the same exception."""

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        """Called once, before the first `take`, when the response has started. `endpoint`: base URL of the endpoint
        that sends the response. `start`, `stop`: offsets of the first byte in the response, and of the byte after the
        last one. `size`: size of the whole blob in bytes."""
        ...

    def take(self, offset: int, data: memoryview) -> None:
        """Called with the next bytes of the blob. `offset`: offset of the first of these bytes. The memory of `data` is
        reused after this call has returned, so the sink must copy the bytes that it needs later."""
        ...


class UpstreamClient(Protocol):
    """Client for one upstream registry. Repository names are those that the upstream itself uses (`library/ubuntu`).
    Manifests are verified against their digest; blobs are not. No connection is opened before the first call.

    All requests raise UpstreamUnavailable (the upstream cannot be reached, or failed), UpstreamTimeout, TooManyRequests
    (with `retry_after`), Denied (the upstream refused the configured login) and StorageFailed. If the upstream refuses
    a request without a login, they raise ManifestUnknown, BlobUnknown or NameUnknown: registries respond in the same
    way for private and for missing repositories. Instead of these three errors, they raise UnconfirmedManifestUnknown,
    UnconfirmedBlobUnknown or UnconfirmedNameUnknown in two cases:

    - A proxy or firewall in front of the upstream possibly sent the response.
    - The login that the settings require is missing, or the client got no token from the token service."""

    name: str
    """The name of the upstream in the settings, such as `docker.io`."""
    endpoints: Sequence[str]
    """The base URLs of the upstream, in the order of the settings."""
    connections: int
    """Largest number of simultaneous connections for downloads of blobs, over all processes."""

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Returns a manifest's descriptor. Sends a HEAD request, which does not use up the rate limit of Docker Hub.
        Then sends a GET request in two cases: the response to HEAD lacks the type, the size or (for a tag) the digest,
        or a proxy or firewall in front of the upstream possibly sent this response. Raises ManifestUnknown."""
        ...

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        """Returns a manifest. Raises ManifestUnknown. Raises UpstreamUnavailable also if the bytes do not match the
        digest. `memory`: a large manifest counts in this client's memory budget until the `with` block of this scope
        ends; None: only until the response is received."""
        ...

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns a blob's descriptor, with the size that the upstream states. Raises BlobUnknown, BlobSizeUnknown."""
        ...

    async def fetch_blob(
        self,
        repo: RepositoryName,
        digest: Digest,
        span: Span,
        sink: BlobSink,
        avoid: Collection[str] = (),
        untrusted: Collection[str] = (),
        expected_size: int | None = None,
    ) -> None:
        """Requests the bytes of `span`, passes them to `sink`, and returns after the last byte. If an endpoint fails or
        does not have the blob, asks the next one, but only before the first call of the sink.

        - `avoid`: endpoints that are asked only if no other endpoint has the blob.
        - `untrusted`: endpoints whose bytes the sink does not accept. They are asked last. If one of them has the blob,
          `sink.begin` raises an error.
        - `expected_size`: the size of the whole blob, used if the response does not state the size; None: such a
          response is refused.

        Raises BlobUnknown, RangesUnsupported (`span` does not start at 0, and the upstream sends only whole blobs),
        BlobLengthWrong (the upstream did not state the size, and `expected_size` is wrong), and the exceptions of the
        sink. Raises UpstreamUnavailable or UpstreamTimeout if the connection breaks, even after the sink has got
        some bytes. If this call is cancelled, closes the connection. The sink is not called after this call has ended
        or was cancelled."""
        ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """Returns a page of the repository's tags: at most `limit` tags that sort after `after`. Raises NameUnknown."""
        ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """Returns a page of the descriptors of manifests that refer to `subject`. Uses the referrers API, or, if the
        upstream has none, the fallback tag (spec: "Referrers Tag Schema")."""
        ...

    def is_nearly_exhausted(self) -> bool:
        """Returns whether the upstream's rate limit leaves only few requests. The mirror then sends only requests for
        which a client waits."""
        ...

    def endpoint_health(self) -> list[EndpointHealth]:
        """Returns the health of each endpoint, as this process has observed it, in the order of the settings."""
        ...

    async def aclose(self) -> None:
        """Cancels running requests and closes the connections."""
        ...
