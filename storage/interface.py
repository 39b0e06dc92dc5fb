"""The one interface between what registry content is and how it is served: `Registry`.

Everything is a `Registry`, wraps one, or is handed one. Errors are those of `storage.errors`. Opening is awaited and
raises before anything is sent, so a fallback is a plain `try … except BlobUnknown`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol, runtime_checkable

from storage.content import Actor, Condition, Descriptor, Manifest, OpenFile, Page, Span
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID

ANY = None
"""A mount's source when any repository will do."""


class BlobReader(Protocol):
    """An opened blob. Iterating yields the bytes of `span`; `aclose` may be called at any time, more than once."""

    descriptor: Descriptor
    """Of the whole blob."""
    span: tuple[int, int]
    """First byte and the one after the last: what iterating yields."""
    data: bytes | None
    """All of `span`, where opening it has read that already, as it does with little."""
    file: OpenFile | None
    """The open file and the offset of byte 0, where the bytes lie in one file: a server can send it without copying."""
    location: str | None
    """A self-authorising address of the bytes, where the store offers one."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def aclose(self) -> None: ...


class BlobWriter(Protocol):
    """An upload session. This caller owns it until a newer request resumes it; then every call raises
    BlobUploadInvalid."""

    id: UploadID

    @property
    def offset(self) -> int:
        """Bytes taken so far. After `aclose`, all of them survive this process."""
        ...

    async def write(self, data: bytes | memoryview) -> None:
        """Appends. The memory of a view is the writer's from now on: it is read later, so nobody may change it. Raises
        StorageFull, StorageFailed, BlobUploadInvalid (taken over). Cancelled: the session keeps what was written
        before."""
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """Bytes already written."""
        ...

    async def commit(self, digest: Digest) -> Descriptor:
        """Makes the content a blob of the repository, durably, and ends the session. Raises DigestInvalid (the content
        has another digest; the session ends and keeps nothing), StorageFull, StorageFailed. Cancelled: it is either
        done or not, never half."""
        ...

    async def cancel(self) -> None:
        """Ends the session and drops its bytes."""
        ...

    async def aclose(self) -> None:
        """Lets go of the session, which stays for `resume_upload`. After `commit` or `cancel`, and the second time, it
        does nothing. Raises BlobUploadInvalid, StorageFull, StorageFailed when bytes that were taken could not be
        kept: they must not be acknowledged."""
        ...


class Reader(Protocol):
    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Raises BlobUnknown. A client that was told a blob is here may rely on it for the collector's grace time."""
        ...

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        """Raises BlobUnknown, RangeInvalid (with the size)."""
        ...

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Raises ManifestUnknown."""
        ...

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        """The manifest as it was pushed, byte for byte. Raises ManifestUnknown."""
        ...


class Writer(Protocol):
    async def start_upload(self, repo: RepositoryName, algorithm: str = "sha256") -> BlobWriter:
        """A new session, hashed with `algorithm` while it is written. Raises DigestInvalid for an unknown one."""
        ...

    async def resume_upload(self, repo: RepositoryName, upload: UploadID, offset: int | None = None) -> BlobWriter:
        """Takes a session over, at once, from whoever has it. Raises BlobUploadUnknown; RangeInvalid (with the offset)
        when the session does not stand at `offset`; nobody loses it then."""
        ...

    async def upload_offset(self, repo: RepositoryName, upload: UploadID) -> int:
        """Bytes the session has, without taking it over. Raises BlobUploadUnknown."""
        ...

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | None, by: Actor
    ) -> Descriptor:
        """Gives `repo` a blob that `source` (None: any repository) has. Raises BlobUnknown."""
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
    async def delete_blob(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        """Takes the blob out of the repository. Raises BlobUnknown."""
        ...

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        """Takes the manifest and every tag at it out of the repository. Raises ManifestUnknown, NameUnknown."""
        ...

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        """Takes just the tag away. Raises ManifestUnknown, NameUnknown."""
        ...


class Lister(Protocol):
    """Lists are in byte order, strictly after `after` (which need not exist, nor be a valid name), at most `limit`."""

    async def repositories(self, after: str | None, limit: int) -> Page[RepositoryName]:
        """The repositories that hold a manifest."""
        ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """Raises NameUnknown. A repository that once had content and has no tag gives an empty page."""
        ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """Manifests whose subject is `subject`, by digest; none for an unknown repository. A page may end before
        `limit` when it grows large; `more` says so."""
        ...


@runtime_checkable
class Registry(Reader, Writer, Deleter, Lister, Protocol):
    """All of it."""
