"""What a mirror needs of a far registry (`UpstreamClient`). The mirror knows no HTTP; `registry.upstream` does."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from registry.memory_budget import ShareScope
from storage.content import Descriptor, Manifest, Page, Span
from storage.errors import BlobUnknown, ManifestUnknown, NameUnknown, RegistryError
from storage.names import Digest, Reference, RepositoryName, Tag


class RangesUnsupported(RegistryError):
    """The far registry sends blobs only whole. Nothing was handed on."""

    default = "the upstream registry sends blobs only from their start"


class UnconfirmedManifestUnknown(ManifestUnknown):
    """An answer that looks like "there is none", but nothing shows that the registry itself gave it: it may be a
    firewall's page, or that of a proxy before a registry that is being restarted. No reason to drop what is here."""

    default = "the upstream registry does not give out such a manifest"


class UnconfirmedNameUnknown(NameUnknown):
    """The same of a list: no reason to hide what is here."""

    default = "the upstream registry does not give out such a list"


class UnconfirmedBlobUnknown(BlobUnknown):
    """The same of a blob: no reason to remember that there is none."""

    default = "the upstream registry does not give out such a blob"


class BlobSink(Protocol):
    """Where a blob's bytes go. Called in a thread, one call at a time; whatever it raises ends the fetch, and is raised
    by it."""

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        """The far registry answered: what follows are the bytes from `start` to `stop`, of `size` in all."""
        ...

    def take(self, offset: int, data: memoryview) -> None:
        """Bytes of the blob, in order. The memory is used again once this returns."""
        ...


class UpstreamClient(Protocol):
    """A far registry. Names are its own (`library/ubuntu`). Content is verified where that can be done at once:
    manifests are, blobs are not. Nothing is asked before it is needed.

    Errors of all: UpstreamUnavailable (it cannot be reached, or failed), UpstreamTimeout, TooManyRequests (with
    `retry_after`), Denied (it refuses the login configured for it), StorageFailed. A refusal of an anonymous request
    is told as "unknown", since private content cannot be told from none. ManifestUnknown is ManifestDoubtful,
    BlobUnknown is BlobDoubtful and NameUnknown is NameDoubtful where the answer may not have been the registry's own,
    or logging in failed.
    """

    name: str
    endpoints: Sequence[str]
    """Where it answers, in the order of its settings."""
    connections: int
    """For blobs, the most at once over all processes."""

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """With one HEAD (free of Hub's rate limit). Raises ManifestUnknown. Where the answer names no digest, or
        may not be the registry's own, a GET follows."""
        ...

    async def get_manifest(
        self, repo: RepositoryName, reference: Reference, memory: ShareScope | None = None
    ) -> Manifest:
        """Raises ManifestUnknown; UpstreamUnavailable also for bytes of another digest. The memory of a large manifest
        counts until the block of `memory` ends."""
        ...

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Raises BlobUnknown."""
        ...

    async def fetch_blob(
        self, repo: RepositoryName, digest: Digest, span: Span, sink: BlobSink, avoid: Collection[str] = ()
    ) -> None:
        """Hands the bytes of `span` to `sink` and returns when it has them all. `avoid`: endpoints not to be asked,
        unless there is no other. Raises BlobUnknown, RangesUnsupported (it would send from byte 0), and what the sink
        raised; UpstreamUnavailable or UpstreamTimeout when it broke off: what the sink took stays taken. Cancelled:
        the connection is closed, and the sink is not called again once this has ended."""
        ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """Raises NameUnknown."""
        ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """By its referrers API, or the fallback tag where it has none."""
        ...

    def exhausted(self) -> bool:
        """It said that few requests are left to us: leave out what nobody waits for."""
        ...

    async def aclose(self) -> None: ...
