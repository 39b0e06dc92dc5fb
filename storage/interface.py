"""The interface of a registry (`Registry`): what the HTTP API calls, and what every layer behind it implements.

Those layers are the store of pushed content, the mirror (a cache of other registries), the router that chooses between
these two, and wrappers such as the access check. All errors named in this module are classes of `storage.errors`. The
parameter `by` of a method is the actor of the call: the client on whose behalf the call is made.
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
    """A blob that was opened for reading, or a part of one. Iterating over the reader yields the bytes of `span`."""

    descriptor: Descriptor
    """Descriptor of the whole blob, even if `span` is only a part of the blob."""
    span: tuple[int, int]
    """The part of the blob to read: the offset of its first byte, and the offset after its last byte."""
    data: bytes | None
    """All bytes of `span` if `open_blob` has read them, which it does for small blobs; None for other blobs."""
    file: OpenFile | None
    """The open file that contains the blob, so that a server can pass it to `sendfile`; None if there is no file. An
    incomplete blob without a file is downloaded for this reader alone, and is not stored."""
    location: str | None
    """A presigned URL, from which the client can download the bytes itself; None if the store offers no such URL."""
    is_incomplete: bool
    """Whether the registry is still downloading the blob from another registry, so that reading may have to wait."""

    async def readable_until(self, offset: int, /) -> int:
        """Waits until the byte at `offset` can be read; `offset` must lie inside `span`. Returns the offset of the
        first byte after it that cannot be read yet, at most the end of `span`. The last byte of an incomplete blob can
        be read only after the digest was checked. Raises the errors that iterating raises. The reader stays usable
        after a cancelled call."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields the bytes of `span`. Raises StorageFailed. Raises the error of the download if the blob is incomplete
        and its download fails."""
        ...

    async def aclose(self) -> None:
        """Closes the reader; `file` must not be used afterwards. May be called more than once."""
        ...


class BlobWriter(Protocol):
    """Writes to an upload session on behalf of one request. As soon as a newer request resumes the session, this writer
    can no longer change it: its methods raise BlobUploadInvalid. A call of `write` that only collects its bytes in
    memory does not raise this error; a later call does."""

    id: UploadID
    """Id of the session. `Writer.resume_upload` takes it."""

    @property
    def offset(self) -> int:
        """Number of bytes in the session. After a successful `aclose`, these bytes survive the end of this process."""
        ...

    async def write(self, data: bytes | memoryview) -> None:
        """Appends `data` to the session. The writer may still read the memory of a memoryview after this call has
        returned, so the caller must never change that memory again. Raises StorageFull, StorageFailed,
        BlobUploadInvalid (a newer request resumed the session). If the call is cancelled, the session keeps the bytes
        of earlier calls."""
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """Returns the `length` bytes of the session that begin at `offset`, or fewer if the session has no more."""
        ...

    async def commit(self, digest: Digest) -> Descriptor:
        """Stores the content durably as a blob of the repository, ends the session, and returns the blob's descriptor.
        Raises DigestInvalid (the content has another digest; the session ends and its bytes are deleted), StorageFull,
        StorageFailed. If the call is cancelled, it takes effect either completely or not at all."""
        ...

    async def cancel(self) -> None:
        """Deletes the session and its bytes."""
        ...

    async def aclose(self) -> None:
        """Saves the written bytes, so that `resume_upload` can continue the session, and closes this writer. Does
        nothing after `commit`, `cancel` or another `aclose`. Raises BlobUploadInvalid, StorageFull, StorageFailed if
        it could not save the bytes; the caller must then not acknowledge them to its client."""
        ...


class Reader(Protocol):
    """Operations that read blobs and manifests."""

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns the blob's descriptor. A client that gets it may skip the upload of the blob and push a manifest that
        refers to it. So the garbage collector keeps the blob for its grace period from now on, even if no manifest
        refers to it. Raises BlobUnknown."""
        ...

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        """Opens the blob for reading: the whole blob, or only `span`. Raises BlobUnknown, RangeInvalid (no byte of the
        blob lies in `span`; the error has the blob's size). Raises these errors itself and not through the reader, so a
        caller that gets BlobUnknown can try another registry."""
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
        """Returns a writer that continues the session `upload`. If an earlier request still writes to the session, its
        writer loses the session. Raises BlobUploadUnknown if there is no such session or another actor than `by`
        started it (None: the actor is not checked). Raises RangeInvalid, with the actual number of bytes, if the
        session does not have exactly `offset` bytes (None: not checked); the earlier request then keeps the session.
        Raises BlobUploadInvalid if a newer request takes the session over meanwhile."""
        ...

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        """Returns the number of bytes in the session, without taking the session from a request that writes to it.
        Raises BlobUploadUnknown if there is no such session or another actor than `by` started it (None: the actor is
        not checked)."""
        ...

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        """Adds to `repo` a blob that another repository has, and returns its descriptor (OCI distribution spec,
        "Mounting a blob from another repository"). `source`: the name of the other repository, or a set of names. With
        a set, the blob may come from any repository with a name in the set, but only a limited number of these
        repositories is searched. Raises BlobUnknown if no such repository with the blob was found; the client then
        uploads the blob."""
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
        """Stores a manifest and points `tags` at it, in one transaction. Returns the manifest's descriptor. Raises
        ManifestBlobUnknown if the repository lacks a blob or manifest that the new manifest refers to, unless `sparse`
        is True. Only mirrors pass `sparse=True`, because they download the missing content later. Such a manifest
        counts as content of the upstream whose name is the first segment of `repo`. Raises PreconditionFailed if
        `condition` does not hold for the first of `tags`. Raises Denied because of an immutable tag in two cases:

        - One of `tags` is immutable and points at another manifest (`storage.tag_rules`).
        - The manifest is stored in the repository already, but with another media type, and an immutable tag points at
          the manifest or at an index that lists it."""
        ...


class Deleter(Protocol):
    """Operations that remove blobs, manifests and tags."""

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        """Removes the blob from the repository; other repositories keep it. Raises BlobUnknown. Raises Unsupported if a
        manifest of the repository refers to the blob, unless `even_if_referenced` is True. That option is for mirrored
        blobs, because the mirror can download them again."""
        ...

    async def delete_manifest(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, restorable: bool = True
    ) -> None:
        """Removes the manifest and every tag that points at it. Raises ManifestUnknown, NameUnknown (the repository
        never had content), Denied (an immutable tag points at the manifest, or at an index that lists it).

        `restorable`: the store keeps the manifest for the grace period of garbage collection, so that it can be put
        back. A mirror passes False, because it can fetch the manifest again.

        If very many tags point at the manifest, they are removed in several steps, and the manifest in the last one. A
        cancellation or an error can then leave the manifest with fewer tags."""
        ...

    async def delete_tag(
        self, repo: RepositoryName, tag: Tag, *, by: Actor, condition: Condition | None = None
    ) -> None:
        """Removes the tag and keeps its manifest. Raises ManifestUnknown (there is no such tag), NameUnknown (the
        repository never had content), PreconditionFailed (`condition` does not hold for the tag), Denied (the tag is
        immutable)."""
        ...


class Lister(Protocol):
    """Operations that list items page by page, sorted by the bytes of their UTF-8 text. A page has at most `limit`
    items and starts with the first item that sorts after the text `after` (None: with the first of all items). `after`
    may be any text."""

    async def repositories(self, after: str | None, limit: int, within: NameSet = ALL_NAMES) -> Page[RepositoryName]:
        """Returns a page of the repositories that have a manifest and whose names are in the set `within`. A page may
        have fewer than `limit` items although `Page.more` is True, because the work for one page is bounded."""
        ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        """Returns a page of the repository's tags. The page is empty if the repository has no tags now. Raises
        NameUnknown if the repository never had content."""
        ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """Returns a page of the descriptors of manifests whose subject is `subject`, sorted by digest. `artifact_type`:
        lists only manifests of this type (None: of every type). An unknown repository gives an empty page. A page may
        have fewer than `limit` items although `Page.more` is True, because a page is bounded in bytes as well."""
        ...


@runtime_checkable
class Registry(Reader, Writer, Deleter, Lister, Protocol):
    """All operations of a registry."""
