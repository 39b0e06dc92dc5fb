"""The interface between registry content and everything that serves it (`Registry`).

The store, the mirror, the router and the wrappers around them all implement `Registry`. Errors are those of
`storage.errors`. Opening a blob raises before any byte is sent, so a fallback is a plain `try … except BlobUnknown`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

from storage.content import (
    Actor,
    Condition,
    Descriptor,
    Manifest,
    OpenFile,
    Page,
    Span,
)
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES, NameSet


class BlobReader(Protocol):
    """An opened blob. Iterating yields the bytes of `span`. `aclose` may be called at any time, and repeatedly."""

    descriptor: Descriptor
    """Describes the whole blob."""
    span: tuple[int, int]
    """First byte, and the one after the last, that iterating yields."""
    data: bytes | None
    """All bytes of `span`, if opening the blob has read them already, as it does for small ones."""
    file: OpenFile | None
    """The open file, if the blob lies in one: a server can send it without copying."""
    location: str | None
    """A presigned URL of the bytes, if the store offers one."""
    is_incomplete: bool
    """Whether the blob is still being fetched, so that readers may have to wait for bytes."""

    async def ready(self, at: int) -> int:
        """Waits until the byte at `at` (inside `span`) is in `file`, and returns how far the bytes reach from there
        without a gap (inside `span`). The last byte of an incomplete blob is ready only once the digest was checked.
        Raises what iterating raises. A cancellation leaves nothing."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def aclose(self) -> None: ...


class BlobWriter(Protocol):
    """An upload session. The caller owns it until a newer request resumes it; from then on every call raises
    BlobUploadInvalid."""

    id: UploadID

    @property
    def offset(self) -> int:
        """Bytes written so far. After `aclose`, all of them survive this process."""
        ...

    async def write(self, data: bytes | memoryview) -> None:
        """Appends. The writer reads the memory of a view later, so the caller must not change it. Raises StorageFull,
        StorageFailed, BlobUploadInvalid (taken over). Cancelled: the session keeps what was written before."""
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """Returns bytes that were written; fewer than `length` where they end."""
        ...

    async def commit(self, digest: Digest) -> Descriptor:
        """Makes the content a blob of the repository, durably, and ends the session. Raises DigestInvalid (the content
        has another digest; the session ends and keeps nothing), StorageFull, StorageFailed. Cancelled: the commit is
        made or not, never half."""
        ...

    async def cancel(self) -> None:
        """Ends the session and drops its bytes."""
        ...

    async def aclose(self) -> None:
        """Releases the session, so that `resume_upload` can continue it. Does nothing after `commit`, `cancel` or
        another `aclose`. Raises BlobUploadInvalid, StorageFull, StorageFailed if written bytes could not be stored: the
        caller must not acknowledge them."""
        ...


class Reader(Protocol):
    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns the blob's descriptor. The blob then stays for the collector's grace time. Raises BlobUnknown."""
        ...

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        """Opens the blob, or a span of it. Raises BlobUnknown, RangeInvalid (with the size)."""
        ...

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Returns the manifest's descriptor. Raises ManifestUnknown."""
        ...

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        """Returns the manifest as it was pushed, byte for byte. Raises ManifestUnknown."""
        ...


class Writer(Protocol):
    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> BlobWriter:
        """Starts a session, hashed with `algorithm` while it is written. Only `by` can find it (None: everybody).
        Raises DigestInvalid for an unknown algorithm."""
        ...

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> BlobWriter:
        """Takes a session over at once from the request that owns it. Raises BlobUploadUnknown, also if the session
        belongs to another actor than `by` (None: any session may be taken); RangeInvalid (with the actual offset) if
        the session does not stand at `offset`, and then its owner keeps it."""
        ...

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        """Returns the bytes of a session, without taking it over. Raises BlobUploadUnknown, as `resume_upload` does."""
        ...

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        """Adds to `repo` a blob of `source`, a repository or any one of a set. Raises BlobUnknown."""
        ...

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag] = (),
        *,
        by: Actor,
        sparse: bool = False,
        condition: Condition | None = None,
    ) -> Descriptor:
        """Stores a manifest and points `tags` at it, in one transaction. Raises ManifestBlobUnknown (children or blobs
        missing, unless `sparse`), PreconditionFailed (`condition` does not hold for the first tag)."""
        ...


class Deleter(Protocol):
    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        """Removes the blob from the repository. Raises BlobUnknown; Unsupported if a manifest of the repository refers
        to the blob, unless `even_if_referenced`, for mirrored content, which can be fetched again."""
        ...

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        """Removes the manifest and every tag that points at it. Raises ManifestUnknown, NameUnknown."""
        ...

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        """Removes the tag only. Raises ManifestUnknown, NameUnknown."""
        ...


class Lister(Protocol):
    """Lists in byte order. They start after `after`, which need not exist or be a valid name, and have at most `limit`
    items."""

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        """Returns repositories that have a manifest and are in `within`. A page is full unless it is the last."""
        ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """Returns tags. A repository that once had content and has no tag gives an empty page. Raises NameUnknown."""
        ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """Returns the manifests whose subject is `subject`, ordered by digest; none for an unknown repository. A page
        may end before `limit` when it grows large; `more` says so."""
        ...


@runtime_checkable
class Registry(Reader, Writer, Deleter, Lister, Protocol):
    """All operations."""
