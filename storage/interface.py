"""The interface of a registry (`Registry`): what the HTTP API calls, and what every layer behind it implements.

Those layers are the store, the mirror, the router between them, and wrappers such as the access check. All errors named
here are classes of `storage.errors`. `open_blob` raises before it yields a byte, so a caller can fall back to another
registry with `try … except BlobUnknown`. A parameter `by` is the actor of the call: the client on whose behalf it is
made.
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
    """An opened blob. Iterating over it yields the bytes of `span`."""

    descriptor: Descriptor
    """Descriptor of the whole blob, also if `span` is only a part of it."""
    span: tuple[int, int]
    """Offsets in the blob: of the first byte to read, and of the byte after the last one."""
    data: bytes | None
    """All bytes of `span` if they were read when the blob was opened, as for small blobs; None otherwise."""
    file: OpenFile | None
    """The open file that holds the blob, so that a server can send it without copying; None if there is no file."""
    location: str | None
    """A presigned URL of the bytes; None if the store offers none."""
    is_incomplete: bool
    """Whether the blob is still being downloaded, so that a reader may have to wait for bytes."""

    async def readable_until(self, offset: int, /) -> int:
        """Waits until the byte at `offset`, which lies inside `span`, can be read from `file`. Returns the offset of
        the first byte after it that cannot be read yet, at most the end of `span`. The last byte of an incomplete blob
        can be read only after the digest was checked. Raises the same errors as iterating. A cancellation leaves
        nothing behind."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields the bytes of `span`. Raises StorageFailed, and for an incomplete blob the error that ended its
        download."""
        ...

    async def aclose(self) -> None:
        """Closes the blob. May be called at any time, and more than once."""
        ...


class BlobWriter(Protocol):
    """An upload session, opened for one request. As soon as a newer request resumes the same session, every call on
    this writer raises BlobUploadInvalid."""

    id: UploadID
    """Id of the session, for `Writer.resume_upload`."""

    @property
    def offset(self) -> int:
        """Number of bytes written to the session so far. After `aclose`, these bytes survive the end of this
        process."""
        ...

    async def write(self, data: bytes | memoryview) -> None:
        """Appends `data` to the session. The writer may read the memory of a memoryview after this call returns, so the
        caller must not change it. Raises StorageFull, StorageFailed, BlobUploadInvalid (a newer request resumed the
        session). After a cancellation the session keeps the bytes of earlier writes."""
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """Returns `length` bytes that were written at `offset`, or fewer if the session ends before."""
        ...

    async def commit(self, digest: Digest) -> Descriptor:
        """Stores the content durably as a blob of the repository, ends the session, and returns the blob's descriptor.
        Raises DigestInvalid (the content has another digest; the session ends and its bytes are deleted), StorageFull,
        StorageFailed. A cancelled commit has either happened completely or not at all."""
        ...

    async def cancel(self) -> None:
        """Ends the session and deletes its bytes."""
        ...

    async def aclose(self) -> None:
        """Saves the session and releases it, so that `resume_upload` can continue it. Does nothing after `commit`,
        `cancel` or another `aclose`. Raises BlobUploadInvalid, StorageFull, StorageFailed if written bytes could not be
        saved; the caller must then not acknowledge them to its client."""
        ...


class Reader(Protocol):
    """Operations that read blobs and manifests."""

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns the blob's descriptor. Because a client that checks a blob may refer to it in its next push, the
        garbage collector keeps the blob for its grace time from now on. Raises BlobUnknown."""
        ...

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        """Opens the blob for reading: the whole blob, or only `span`. Raises BlobUnknown, RangeInvalid (no byte of the
        blob lies in `span`; the error has the blob's size)."""
        ...

    async def resolve_manifest(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        """Returns the manifest's descriptor. Raises ManifestUnknown."""
        ...

    async def get_manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        """Returns the manifest as it was pushed, byte for byte. Raises ManifestUnknown."""
        ...


class Writer(Protocol):
    """Operations that add blobs and manifests."""

    async def start_upload(
        self, repo: RepositoryName, algorithm: str = "sha256", *, by: Actor | None = None
    ) -> BlobWriter:
        """Starts an upload session and returns its writer. The bytes are hashed with `algorithm` as they are written;
        an unknown algorithm raises DigestInvalid. Only the actor `by` can resume the session (None: every actor)."""
        ...

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> BlobWriter:
        """Returns a writer that continues the session `upload`. A request that still writes to the session loses it at
        once. Raises BlobUploadUnknown if there is no such session or another actor than `by` started it (None: the
        actor is not checked). Raises RangeInvalid, with the actual offset, if the session does not end at `offset`; the
        other request then keeps the session."""
        ...

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        """Returns the number of bytes that the session has. A request that writes to the session keeps it. Raises
        BlobUploadUnknown if there is no such session or another actor than `by` started it."""
        ...

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        """Adds to `repo` a blob that another repository has, and returns its descriptor (spec: "Mounting a blob from
        another repository"). `source`: the other repository, or a set of names in which any repository will do. Raises
        BlobUnknown if no repository of `source` has the blob. The search in a set is bounded, so that it may miss one;
        the client then uploads the blob."""
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
        """Stores a manifest, points `tags` at it, both in one transaction, and returns its descriptor. Raises
        ManifestBlobUnknown if the repository lacks a blob or child manifest that the manifest refers to, unless
        `sparse` is set; a mirror sets it, because it fetches these later. Raises PreconditionFailed if `condition` does
        not hold for the first of `tags`."""
        ...


class Deleter(Protocol):
    """Operations that remove blobs, manifests and tags."""

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        """Removes the blob from the repository; other repositories keep it. Raises BlobUnknown. Raises Unsupported if a
        manifest of the repository refers to the blob, unless `even_if_referenced` is set. That option is for mirrored
        blobs, because they can be fetched again."""
        ...

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, *, by: Actor) -> None:
        """Removes the manifest and every tag that points at it. Raises ManifestUnknown, NameUnknown."""
        ...

    async def delete_tag(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> None:
        """Removes the tag and keeps its manifest. Raises ManifestUnknown, NameUnknown."""
        ...


class Lister(Protocol):
    """Operations that list, page by page, in byte order. A page has at most `limit` items and starts with the first
    item that sorts after `after` (None: the first of all). `after` need not exist or be a valid name."""

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        """Returns a page of the repositories that have a manifest and whose names are in the set `within`. A page may
        have fewer than `limit` items although `Page.more` is set, because the work for one page is bounded."""
        ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """Returns a page of the repository's tags: an empty one if the repository once had content but has no tag.
        Raises NameUnknown if it never had content."""
        ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """Returns a page of the descriptors of manifests whose subject is `subject`, ordered by digest; with
        `artifact_type`, only those of that type. An unknown repository gives an empty page. A page may have fewer than
        `limit` items although `Page.more` is set, because its size in bytes is bounded too."""
        ...


@runtime_checkable
class Registry(Reader, Writer, Deleter, Lister, Protocol):
    """All operations of a registry."""
