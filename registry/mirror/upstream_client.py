"""Protocol of the client for an upstream registry (`UpstreamClient`), as the mirror uses it.

The mirror is a pull-through cache; an *upstream* is a registry that it caches. An upstream has one or more *endpoints*:
base URLs that serve the same content. The mirror itself contains no HTTP code; `registry.upstream` implements this
Protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from registry.memory_budget import ShareScope
from storage.content import Descriptor, Manifest, Page, Span
from storage.errors import BlobUnknown, ManifestUnknown, NameUnknown, RegistryError
from storage.names import Digest, Reference, RepositoryName, Tag


class RangesUnsupported(RegistryError):
    """The upstream ignores or refuses byte ranges and sends blobs only as a whole. The `BlobSink` got no bytes."""

    default = "the upstream registry sends blobs only from their start"


class UnconfirmedManifestUnknown(ManifestUnknown):
    """A "not found" answer about a manifest that may not come from the registry itself, but from a firewall, or from a
    proxy in front of a registry that is restarting. So the mirror keeps its cached manifest and does not cache the
    answer."""

    default = "the upstream registry does not give out such a manifest"


class UnconfirmedNameUnknown(NameUnknown):
    """A "not found" answer about a repository that may not come from the registry itself. So the mirror lists what it
    has cached instead."""

    default = "the upstream registry does not give out such a list"


class UnconfirmedBlobUnknown(BlobUnknown):
    """A "not found" answer about a blob that may not come from the registry itself. So the mirror does not cache the
    answer."""

    default = "the upstream registry does not give out such a blob"


class BlobSink(Protocol):
    """Receives the bytes of one `UpstreamClient.fetch_blob` call. Its methods are called in a thread, one call at a
    time. If a method raises an exception, the fetch ends and raises the same exception."""

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        """Called when `endpoint` has responded, before the first `take`. The bytes from offset `start` up to, but
        without, `stop` follow, of a blob of `size` bytes."""
        ...

    def take(self, offset: int, data: memoryview) -> None:
        """Called with the next bytes of the blob, which begin at `offset`. The memory of `data` is reused after this
        call returns."""
        ...


class UpstreamClient(Protocol):
    """Client for one upstream registry. Repository names are those that the upstream itself uses (`library/ubuntu`).
    Manifests are verified against their digest; blobs are not. No connection is opened before the first call.

    All requests raise UpstreamUnavailable (the upstream cannot be reached, or failed), UpstreamTimeout, TooManyRequests
    (with `retry_after`), Denied (the upstream refused the configured login) and StorageFailed. If the upstream refuses
    an anonymous request, they raise ManifestUnknown, BlobUnknown or NameUnknown, because a private repository looks
    like a missing one. If such an answer may not come from the registry itself, or logging in failed, the error is
    UnconfirmedManifestUnknown, UnconfirmedBlobUnknown or UnconfirmedNameUnknown.
    """

    name: str
    """The name of the upstream in the settings, such as `docker.io`."""
    endpoints: Sequence[str]
    """The base URLs of the upstream, in the order of the settings."""
    connections: int
    """Maximum number of connections for blobs at a time, over all processes."""

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Returns a manifest's descriptor. Sends a HEAD request, which Docker Hub does not count against its rate
        limit. Sends a GET request as well if the answer has no digest or may not come from the registry itself. Raises
        ManifestUnknown."""
        ...

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        """Returns a manifest. A large manifest is counted against the process's memory budget until the `with` block of
        `memory` ends. Raises ManifestUnknown, and UpstreamUnavailable also if the bytes do not match the digest."""
        ...

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns a blob's descriptor, which has its size. Raises BlobUnknown."""
        ...

    async def fetch_blob(
        self, repo: RepositoryName, digest: Digest, span: Span, sink: BlobSink, avoid: Collection[str] = ()
    ) -> None:
        """Requests the bytes of `span`, passes them to `sink`, and returns after the last byte. Asks the endpoints in
        `avoid` only if no other endpoint has the blob. Raises BlobUnknown, RangesUnsupported (`span` does not begin at
        0, and the upstream sends only whole blobs), and the exceptions of the sink. Raises UpstreamUnavailable or
        UpstreamTimeout if the connection breaks, also after the sink got some bytes. A cancellation closes the
        connection. The sink is not called after this method has ended."""
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

    def is_exhausted(self) -> bool:
        """Returns whether the upstream's rate limit leaves only few more requests. The mirror then sends only requests
        that a client waits for."""
        ...

    async def aclose(self) -> None:
        """Cancels running requests and closes the connections."""
        ...
