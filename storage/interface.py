"""The interface of a registry (`Registry`). The HTTP API calls it, and every layer behind the HTTP API implements it.

The layers are the store of pushed content, the mirror (a cache of other registries), the router that chooses between
the store and the mirror, and wrappers such as the access check. All errors that this module names are classes of
`storage.errors`. The parameter `by` of a method is the actor of the call: the client on whose behalf the call is made.
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
    """A blob, or a part of a blob, that is open for reading. Iterating over the reader yields the bytes of `span`."""

    descriptor: Descriptor
    """Descriptor of the whole blob, even if `span` is only a part of the blob."""
    span: tuple[int, int]
    """The range of bytes to read: the offset of its first byte, and the offset after its last byte."""
    data: bytes | None
    """All bytes of `span` if they are few and `open_blob` has read them already; otherwise None."""
    file: OpenFile | None
    """The open file that contains the blob. A server can pass it to `sendfile`. None if there is no file."""
    location: str | None
    """A presigned URL from which the client can download the bytes itself; None if the store offers no such URL."""
    is_incomplete: bool
    """Whether the registry is still downloading the blob from another registry. Reading may then have to wait. If the
    blob is incomplete and `file` is None, the registry downloads the blob for this reader alone and does not store the
    blob."""

    async def readable_until(self, offset: int, /) -> int:
        """Waits until the byte at `offset` can be read. `offset` must lie inside `span`. Then returns an end offset,
        which is at most the end of `span`: all bytes from `offset` up to the end offset can be read now. The last byte
        of an incomplete blob can be read only after the registry has checked the digest. After a cancelled call, the
        reader can still be used.

        Raises the errors of `__aiter__`. Raises StorageFull if the blob is incomplete and `file` is None, because no
        byte is stored."""
        ...

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Yields the bytes of `span`. Raises StorageFailed. If the download of an incomplete blob fails, raises the
        error of the download."""
        ...

    async def aclose(self) -> None:
        """Closes the reader; `file` must not be used afterwards. May be called more than once."""
        ...


class BlobWriter(Protocol):
    """Writes to an upload session for one request. After a newer request has resumed the session, the methods of this
    writer raise BlobUploadInvalid and no longer change the session. A call of `write` that only collects its
    bytes in memory does not raise this error; a later call raises it."""

    id: UploadID
    """Id of the session. `Writer.resume_upload` takes it."""

    @property
    def offset(self) -> int:
        """Number of bytes in the session. After a successful `aclose`, these bytes survive the end of this process."""
        ...

    async def write(self, data: bytes | memoryview) -> None:
        """Appends `data` to the session. If `data` is a memoryview, the caller must never change its memory again,
        because the writer may still read the memory after this call has returned. Raises StorageFull, StorageFailed,
        BlobUploadInvalid (a newer request has resumed the session). If the call is cancelled, the session keeps the
        bytes of earlier calls."""
        ...

    async def read_at(self, offset: int, length: int) -> bytes:
        """Returns the `length` bytes of the session that begin at `offset`, or fewer if the session has no more."""
        ...

    async def commit(self, digest: Digest) -> Descriptor:
        """Stores the session's bytes durably as a blob of the repository, ends the session, and returns the blob's
        descriptor. Raises DigestInvalid (the bytes do not have `digest`; the session ends and its bytes are deleted),
        StorageFull, StorageFailed. If the call is cancelled, it takes effect either completely or not at all."""
        ...

    async def cancel(self) -> None:
        """Deletes the session and its bytes."""
        ...

    async def aclose(self) -> None:
        """Saves the written bytes, so that `resume_upload` can continue the session, and closes this writer. Does
        nothing after `commit`, `cancel` or another `aclose`. If it cannot save the bytes, raises BlobUploadInvalid,
        StorageFull or StorageFailed; the caller must then not tell its client that the bytes were received."""
        ...


class Reader(Protocol):
    """Operations that read blobs and manifests."""

    async def resolve_blob(self, repo: RepositoryName, digest: Digest) -> Descriptor:
        """Returns the blob's descriptor. Raises BlobUnknown. Restarts the blob's grace period, in which garbage
        collection keeps the blob even if no manifest refers to it. A client can then push a manifest that refers to the
        blob, without an upload of the blob."""
        ...

    async def open_blob(self, repo: RepositoryName, digest: Digest, span: Span | None = None) -> BlobReader:
        """Opens the blob for reading: the whole blob, or only `span`. Raises BlobUnknown, RangeInvalid (no byte of the
        blob lies in `span`; the error has the blob's size). Raises both errors before it returns a reader. So a caller
        that gets BlobUnknown can try another registry."""
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
        """Starts an upload session and returns its writer, which hashes the bytes with `algorithm` as it writes them.
        Only the actor `by` can resume the session; if `by` is None, every actor can. Raises DigestInvalid if the
        algorithm is unknown."""
        ...

    async def resume_upload(
        self, repo: RepositoryName, upload: UploadID, offset: int | None = None, *, by: Actor | None = None
    ) -> BlobWriter:
        """Returns a writer that continues the session `upload`. The writers of earlier requests lose the session.
        Raises:

        - BlobUploadUnknown if there is no such session, or if an actor other than `by` started it. If `by` is None, the
          actor is not checked.
        - RangeInvalid, with the actual number of bytes, if the session does not have exactly `offset` bytes. The writer
          of an earlier request then keeps the session. If `offset` is None, the number is not checked.
        - BlobUploadInvalid if a newer request resumes the session meanwhile."""
        ...

    async def upload_offset(self, repo: RepositoryName, upload: UploadID, *, by: Actor | None = None) -> int:
        """Returns the number of bytes in the session. Does not interrupt a request that writes to the session. Raises
        BlobUploadUnknown if there is no such session, or if an actor other than `by` started it. If `by` is None, the
        actor is not checked."""
        ...

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> Descriptor:
        """Adds to `repo` a blob that another repository has, and returns the blob's descriptor (OCI distribution spec,
        "Mounting a blob from another repository"). `source`: the name of the other repository, or a set of names. In
        a set, the registry searches only a limited number of repositories. Raises BlobUnknown if the registry finds no
        repository with the blob; the client then uploads the blob."""
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
        """Stores a manifest and points `tags` at it, in one transaction. Returns the manifest's descriptor.

        `sparse`: whether to store the manifest even if the repository lacks blobs or manifests that it refers to. Only
        mirrors pass True, because they download the missing content later. A sparse manifest counts as content of the
        upstream whose name is the first segment of `repo`.

        Raises:

        - ManifestBlobUnknown if the repository lacks a blob or manifest that the new manifest refers to, and `sparse`
          is False.
        - PreconditionFailed if `condition` does not hold for the first of `tags`.
        - Denied if one of `tags` is immutable (`storage.tag_rules`) and points at another manifest.
        - Denied if the call would change the media type of a manifest that the repository already has under the same
          digest, and an immutable tag points at this manifest or at an index that lists it."""
        ...


class Deleter(Protocol):
    """Operations that remove blobs, manifests and tags."""

    async def delete_blob(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, even_if_referenced: bool = False
    ) -> None:
        """Removes the blob from the repository; other repositories keep it. Raises BlobUnknown. Raises Unsupported if a
        manifest of the repository refers to the blob, unless `even_if_referenced` is True. Pass True only for mirrored
        blobs: the mirror can download them again."""
        ...

    async def delete_manifest(
        self, repo: RepositoryName, digest: Digest, *, by: Actor, restorable: bool = True
    ) -> None:
        """Removes the manifest and every tag that points at it. Raises ManifestUnknown, NameUnknown (the repository
        never had content), Denied (an immutable tag points at the manifest, or at an index that lists it).

        `restorable`: whether the store keeps the manifest for the grace period of garbage collection, so that it can be
        put back. A mirror passes False, because it can fetch the manifest again.

        If very many tags point at the manifest, the store removes the tags in several steps, and the manifest last. A
        cancellation or an error between two steps leaves the manifest with fewer tags."""
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
    items. It starts with the first item that sorts after `after`, or with the first of all items if `after` is None.
    `after` may be any text, even if it is not an item."""

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
        """Returns a page of the descriptors of the manifests whose subject is `subject`, sorted by digest. If
        `artifact_type` is not None, lists only manifests of this type. An unknown repository gives an empty page. A
        page may have fewer than `limit` items although `Page.more` is True, because its size in bytes is limited."""
        ...


@runtime_checkable
class Registry(Reader, Writer, Deleter, Lister, Protocol):
    """All operations of a registry."""
