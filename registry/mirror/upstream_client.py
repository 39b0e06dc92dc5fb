"""What the mirror requires of an upstream registry (`UpstreamClient`). The mirror knows no HTTP; `registry.upstream`
implements this."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from registry.memory_budget import ShareScope
from storage.content import Descriptor, Manifest, Page, Span
from storage.errors import BlobUnknown, ManifestUnknown, NameUnknown, RegistryError
from storage.names import Digest, Reference, RepositoryName, Tag


class RangesUnsupported(RegistryError):
    """The upstream sends blobs only as a whole. The sink got no bytes."""

    default = "the upstream registry sends blobs only from their start"


class UnconfirmedManifestUnknown(ManifestUnknown):
    """A "not found" answer that may not come from the registry itself, but from a firewall or from a proxy before a
    registry that restarts. No reason to drop a cached manifest or to cache the answer."""

    default = "the upstream registry does not give out such a manifest"


class UnconfirmedNameUnknown(NameUnknown):
    """The same for a list: no reason to hide what is cached."""

    default = "the upstream registry does not give out such a list"


class UnconfirmedBlobUnknown(BlobUnknown):
    """The same for a blob: no reason to cache the answer."""

    default = "the upstream registry does not give out such a blob"


class BlobSink(Protocol):
    """Receives a blob's bytes. Called in a thread, one call at a time. An exception of the sink ends the fetch, which
    raises it."""

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        """Called once the upstream responds: bytes `start` to `stop` follow, of a blob of `size` bytes."""
        ...

    def take(self, offset: int, data: memoryview) -> None:
        """Called with the next bytes of the blob. The memory is reused after the call returns."""
        ...


class UpstreamClient(Protocol):
    """An upstream registry. Repository names are the upstream's own (`library/ubuntu`). Manifests are verified against
    their digest; blobs are not. Nothing is contacted before the first call.

    All methods raise UpstreamUnavailable (unreachable, or failed), UpstreamTimeout, TooManyRequests (with
    `retry_after`), Denied (the configured login was refused) and StorageFailed. A refused anonymous request raises
    "unknown", since a private repository looks like a missing one. When the answer may not come from the registry
    itself, or logging in failed, the error is UnconfirmedManifestUnknown, UnconfirmedBlobUnknown or
    UnconfirmedNameUnknown.
    """

    name: str
    endpoints: Sequence[str]
    """The URLs of the upstream, in the order of the settings."""
    connections: int
    """Largest number of connections for blobs, over all processes."""

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Returns a manifest's descriptor by a HEAD request, which Docker Hub does not count. A GET follows when the
        answer has no digest or may not come from the registry itself. Raises ManifestUnknown."""
        ...

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        """Returns a manifest. The memory of a large one counts until the block of `memory` ends. Raises
        ManifestUnknown; UpstreamUnavailable also when the bytes do not match the digest."""
        ...

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns a blob's descriptor. Raises BlobUnknown."""
        ...

    async def fetch_blob(
        self, repo: RepositoryName, digest: Digest, span: Span, sink: BlobSink, avoid: Collection[str] = ()
    ) -> None:
        """Passes the bytes of `span` to `sink` and returns after the last one. Endpoints in `avoid` are asked only when
        no other has the blob. Raises BlobUnknown, RangesUnsupported (the upstream would send from byte 0), and what the
        sink raises; UpstreamUnavailable or UpstreamTimeout when the connection breaks, after the sink took some bytes.
        A cancellation closes the connection; the sink is not called after this method has ended."""
        ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """Returns a page of the repository's tags. Raises NameUnknown."""
        ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """Returns a page of referrers, by the referrers API or, if the upstream has none, by the fallback tag."""
        ...

    def is_exhausted(self) -> bool:
        """Returns whether the upstream has said that few requests are left. Requests that no client waits for are then
        skipped."""
        ...

    async def aclose(self) -> None:
        """Cancels running requests and closes the connections."""
        ...
