"""`UpstreamClient`: the Protocol for the client that sends the mirror's requests to an upstream registry.

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
    """The upstream sent an invalid manifest, or a manifest of a media type that is not accepted. A retry does not
    help."""

    default = "the upstream registry sends a manifest that is not valid"


class BlobSizeWrong(UpstreamUnavailable):
    """The size of a blob at the upstream differs from its size in the repository's manifests. Possibly the upstream did
    not send the blob but, for example, an error page."""


class BlobLengthWrong(BlobSizeWrong):
    """The case of `BlobSizeWrong` that is found only while the bytes arrive: the upstream's response did not state the
    size of the blob, and was shorter or longer than the expected size. The `BlobSink` has got bytes, possibly the bytes
    of an error page."""


class BlobSizeUnknown(UpstreamUnavailable):
    """The upstream's response names the blob's digest, so the upstream has the blob. But the response does not state
    the blob's size."""


class Unconfirmed:
    """Base class of three errors which say that content does not exist, although it may exist."""

    needs_login = False
    """Whether the error is due to a missing login.

    - True: the upstream or its token service has refused a request without a login, or the settings require a login
      that docker's `config.json` lacks. A retry does not help.
    - False: the response possibly comes from a proxy or firewall. A retry may get another response."""


class UnconfirmedManifestUnknown(Unconfirmed, ManifestUnknown):
    """The response says that the manifest does not exist, but a proxy or firewall in front of the upstream possibly
    sent this response. So the mirror neither deletes its cached manifest nor caches the response."""

    default = "the upstream registry does not have the manifest, or refuses to send it"


class UnconfirmedNameUnknown(Unconfirmed, NameUnknown):
    """The response to a request for a list, such as the tags of a repository, says that the repository does not exist.
    But a proxy or firewall in front of the upstream possibly sent this response. So the mirror lists its cached
    content."""

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
    - `last_error`: the message of the last failure; None if there was no failure.
    - `last_error_at`: the time of the last failure in seconds since 1970; None if there was no failure."""

    url: str
    breaker: Literal["closed", "open", "half-open"]
    failures: int
    retry_in_seconds: float | None
    last_error: str | None
    last_error_at: float | None


class BlobSink(Protocol):
    """Receives the bytes that one call of `UpstreamClient.fetch_blob` fetches. The methods are called in a thread, one
    after another. If a method raises an exception, `fetch_blob` raises the same exception."""

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        """Called once, before the first `take`, when the response has started.

        - `endpoint`: base URL of the endpoint that sends the response.
        - `start`: offset in the blob at which the response starts.
        - `stop`: offset in the blob at which the response ends (exclusive).
        - `size`: size of the whole blob in bytes."""
        ...

    def take(self, offset: int, data: memoryview) -> None:
        """Called with the next bytes of the blob. `offset`: offset of `data` in the blob. After this call has returned,
        the memory of `data` is reused, so the sink must copy the bytes that it needs later."""
        ...


class UpstreamClient(Protocol):
    """Client for one upstream registry. Repository names are those that the upstream itself uses (`library/ubuntu`).
    Manifests are verified against their digest; blobs are not. No connection is opened before the first call.

    Each method that sends a request may raise:

    - UpstreamUnavailable (the upstream cannot be reached, or failed), UpstreamTimeout, StorageFailed, and
      TooManyRequests (with `retry_after`).
    - Denied: the upstream refused the configured login.
    - ManifestUnknown, BlobUnknown or NameUnknown: the upstream does not have the content, or it refused a request
      without a login. Registries respond in the same way for private and for missing repositories.
    - UnconfirmedManifestUnknown, UnconfirmedBlobUnknown or UnconfirmedNameUnknown: a proxy or firewall in front of the
      upstream possibly sent the response, the login that the settings require is missing, or the client got no token
      from the token service."""

    name: str
    """The name of the upstream in the settings, such as `docker.io`."""
    endpoints: Sequence[str]
    """The base URLs of the upstream, in the order of the settings."""
    connections: int
    """Largest number of simultaneous connections for downloads of blobs, over all processes."""

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Returns a manifest's descriptor. Raises ManifestUnknown. Sends a HEAD request, because Docker Hub does not
        count HEAD requests in its rate limit. Sends a GET request afterwards in two cases:

        - The response to HEAD lacks the type, the size or (for a tag) the digest.
        - A proxy or firewall in front of the upstream possibly sent the response to HEAD."""
        ...

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        """Returns a manifest. Raises ManifestUnknown; UpstreamUnavailable also if the bytes do not match the digest.
        Each `UpstreamClient` has its own memory budget. A large manifest counts in this budget until the `with` block
        of `memory` ends. If `memory` is None, the manifest counts until the response is received."""
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
        does not have the blob, asks the next endpoint, unless the sink was already called.

        - `avoid`: endpoints that are asked only if no other endpoint has the blob.
        - `untrusted`: endpoints whose bytes the sink does not accept. They are asked last, and only to find out whether
          they have the blob. If one of them has the blob, `sink.begin` raises an error.
        - `expected_size`: the size of the whole blob in bytes, used if the response does not state the size. If
          `expected_size` is None, a response without the size is refused.

        Raises BlobUnknown, RangesUnsupported (`span` does not start at 0, and the upstream sends only whole blobs),
        BlobLengthWrong (the upstream did not state the size, and `expected_size` is wrong), and the exceptions of the
        sink. Raises UpstreamUnavailable or UpstreamTimeout if the connection breaks; the sink may have got bytes by
        then. A cancellation closes the connection. The sink is not called after this call has ended or was
        cancelled."""
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

    def is_near_rate_limit(self) -> bool:
        """Returns whether the upstream's rate limit leaves only few requests. If True, the mirror sends a request only
        if a client waits for the response."""
        ...

    def endpoint_health(self) -> list[EndpointHealth]:
        """Returns the health of each endpoint, as this process has observed it, in the order of the settings."""
        ...

    async def aclose(self) -> None:
        """Cancels running requests and closes the connections."""
        ...
