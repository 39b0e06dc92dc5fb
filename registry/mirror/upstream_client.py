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
    """The upstream ignores or refuses byte ranges: it sends only whole blobs. The `BlobSink` of the request got no
    bytes."""

    default = "the upstream registry sends only whole blobs"


class UpstreamContentInvalid(UpstreamUnavailable):
    """The upstream sent a manifest that is not valid, or of a type that is not accepted. A retry does not help."""

    default = "the upstream registry sends a manifest that is not valid"


class BlobSizeWrong(UpstreamUnavailable):
    """The upstream sends a blob whose size differs from the size in the manifests of the repository, or sends something
    else than the blob, such as an error page."""


class BlobLengthWrong(BlobSizeWrong):
    """The upstream did not state the size of a blob, and its response ended before the expected size, or went on after
    it. The `BlobSink` has got bytes, which are possibly those of an error page."""


class BlobSizeUnknown(UpstreamUnavailable):
    """The upstream has the blob, since its response names the blob's digest, but it does not state the size."""


class Unconfirmed:
    """Base class of the three errors for a response "not found" that may be wrong: the content may exist."""

    is_refusal = False
    """True: the upstream or its token service has refused a request without a login, or the settings require a login
    that docker's `config.json` lacks. A retry does not help then. False: the response is possibly that of a firewall or
    proxy, and a retry may get another one."""


class UnconfirmedManifestUnknown(Unconfirmed, ManifestUnknown):
    """The response says that the manifest does not exist, but a firewall, or a proxy in front of an upstream that is
    restarting, possibly sent it. So the mirror does not delete its cached manifest and does not cache the response."""

    default = "the upstream registry does not have the manifest, or refuses to send it"


class UnconfirmedNameUnknown(Unconfirmed, NameUnknown):
    """The response to the request for a list, such as that of the tags of a repository, says that the repository does
    not exist. But a proxy or firewall in front of the upstream possibly sent this response. So the mirror responds with
    the list of its cached content."""

    default = "the upstream registry does not have the list, or refuses to send it"


class UnconfirmedBlobUnknown(Unconfirmed, BlobUnknown):
    """The response says that the blob does not exist, but a proxy or firewall in front of the upstream possibly sent
    it. So the mirror does not cache the response."""

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
        """Called once, before the first `take`, when the response has started. `endpoint`: the endpoint that sends it.
        The response has the bytes from offset `start` up to, but without, `stop`. `size`: size of the whole blob."""
        ...

    def take(self, offset: int, data: memoryview) -> None:
        """Called with the next bytes of the blob, which start at `offset`. The memory of `data` is reused after this
        call has returned, so the sink must copy the bytes that it needs later."""
        ...


class UpstreamClient(Protocol):
    """Client for one upstream registry. Repository names are those that the upstream itself uses (`library/ubuntu`).
    Manifests are verified against their digest; blobs are not. No connection is opened before the first call.

    All requests raise UpstreamUnavailable (the upstream cannot be reached, or failed), UpstreamTimeout, TooManyRequests
    (with `retry_after`), Denied (the upstream refused the configured login) and StorageFailed. If the upstream refuses
    an anonymous request, they raise ManifestUnknown, BlobUnknown or NameUnknown: registries respond in the same way for
    private and for missing repositories. The error is UnconfirmedManifestUnknown, UnconfirmedBlobUnknown or
    UnconfirmedNameUnknown if a proxy or firewall in front of the upstream possibly sent such a response, or if the
    login that the settings ask for, or a token, could not be obtained."""

    name: str
    """The name of the upstream in the settings, such as `docker.io`."""
    endpoints: Sequence[str]
    """The base URLs of the upstream, in the order of the settings."""
    connections: int
    """Largest number of simultaneous connections for downloads of blobs, over all processes."""

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Returns a manifest's descriptor. Sends a HEAD request, which does not use up the rate limit of Docker Hub. If
        the response has no digest, or was possibly sent by a proxy or firewall in front of the upstream, also sends a
        GET request. Raises ManifestUnknown."""
        ...

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        """Returns a manifest. `memory`: the memory of a large manifest is reserved in the process's memory budget until
        the `with` block of this scope ends. Raises ManifestUnknown. Raises UpstreamUnavailable also if the bytes do not
        match the digest."""
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
        """Requests the bytes of `span`, passes them to `sink`, and returns after the last byte. Asks no further
        endpoint after the first call of the sink.

        - `avoid`: endpoints that are asked only if no other endpoint has the blob.
        - `untrusted`: endpoints whose bytes the sink does not accept. They are asked last. If one of them has the blob,
          `sink.begin` raises an error.
        - `expected_size`: the size of the whole blob. It is used if the response does not state the size. None: a
          response that does not state the size is refused.

        Raises BlobUnknown, RangesUnsupported (`span` does not start at 0, and the upstream sends only whole blobs),
        BlobLengthWrong (the upstream did not state the size, and `expected_size` is wrong), and the exceptions of the
        sink. Raises UpstreamUnavailable or UpstreamTimeout if the connection breaks, also after the sink has got
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
