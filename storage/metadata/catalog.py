"""The interface of the metadata store (`Metadata`): which blobs, manifests, tags and upload sessions exist.

The bytes of blobs are in a separate blob store; here a blob is a *row*. The *place* of a blob is the key under which
the blob store has its bytes, a text that means nothing here. A *link* is the right of a repository to serve a blob: two
repositories with the same blob have two links to one row. A blob is *published* once the blob store has stored its
bytes durably at their place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.content import Actor, Condition, Descriptor, Manifest, Page
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import NameSet

ANY_ACTOR = ""
"""`UploadRow.owner` of a session that every actor may resume."""


@dataclass(frozen=True, slots=True)
class BlobRow:
    """A blob of a repository. `size`: in bytes. `place`: key of its bytes in the blob store. `is_unreferenced`: True if
    no manifest of the repository refers to the blob, so that the garbage collector may remove its link. `last_used`:
    when a client last added or asked for the blob, in seconds since 1970."""

    digest: Digest
    size: int
    place: str
    is_unreferenced: bool
    last_used: float


@dataclass(frozen=True, slots=True)
class UploadRow:
    """An upload session. `algorithm`: hash algorithm of the digest that is computed as the bytes arrive. `offset`,
    `state` and `boot` are the last checkpoint of its progress: the number of bytes, the state of the digest after these
    bytes (None if it was not saved), and the id of the machine's boot in which they were written. `owner`: name of the
    actor that may resume the session, or `ANY_ACTOR`."""

    id: UploadID
    repository: RepositoryName
    algorithm: str
    offset: int
    state: bytes | None
    boot: str
    owner: str


@dataclass(frozen=True, slots=True)
class QueuedLink:
    """An entry of the garbage collector's queue: a link that perhaps no manifest needs any more. `repository`: row id
    of the repository. `digest`: digest of the blob."""

    repository: int
    digest: Digest


class Metadata(Protocol):
    """The metadata store. Each method is one transaction. A change returns when it is durable; changes described as not
    durable may be lost in a power cut. Methods without a description do what the method of the same name does in
    `storage.interface.Registry`. All methods raise StorageFull, StorageFailed, and the errors named at each."""

    @property
    def version(self) -> Callable[[], object]:
        """A function that returns the current version of all stored data, including accounts. If it returns equal
        versions twice, no process has changed anything in between. A lookup sees at least the data of every version
        that was returned before the lookup."""
        ...

    async def blob(self, repo: RepositoryName, digest: Digest) -> BlobRow:
        """Returns the row of a blob that the repository has. Raises BlobUnknown."""
        ...

    async def touch_blob(self, repo: RepositoryName, digest: Digest) -> None:
        """Sets `BlobRow.last_used` to now, because a client was told that the repository has the blob. Not durable.
        Raises BlobUnknown."""
        ...

    async def add_blob(self, repo: RepositoryName, digest: Digest, size: int, place: str, upload: UploadID) -> None:
        """Adds the row of a published blob and a link from the repository to it, and deletes its upload session. Raises
        BlobUploadUnknown."""
        ...

    async def adopt_blob(self, repo: RepositoryName, digest: Digest, size: int, place: str) -> None:
        """Adds the row of a published blob and a link from the repository to it. For blobs that did not come through an
        upload session."""
        ...

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> int:
        """Adds a link from `repo` to a blob that `source` has, and returns the blob's size in bytes. Raises
        BlobUnknown."""
        ...

    async def delete_blob(self, repo: RepositoryName, digest: Digest, by: Actor, even_if_referenced: bool) -> None: ...

    async def start_upload(self, upload: UploadID, repo: RepositoryName, algorithm: str, boot: str, owner: str) -> None:
        """Stores a new upload session. Not durable, like all changes of upload sessions."""
        ...

    async def upload(self, repo: RepositoryName, upload: UploadID) -> UploadRow:
        """Returns the row of an upload session. Raises BlobUploadUnknown."""
        ...

    async def save_upload(self, upload: UploadID, offset: int, state: bytes | None, boot: str) -> None:
        """Stores a checkpoint of the session's progress, unless a later one is stored. Not durable. Raises
        BlobUploadUnknown."""
        ...

    async def end_upload(self, upload: UploadID) -> None:
        """Deletes the row of an upload session. Not durable. Raises BlobUploadUnknown."""
        ...

    async def manifest_descriptor(self, repo: RepositoryName, reference: Reference) -> Descriptor: ...

    async def manifest(self, repo: RepositoryName, reference: Reference) -> Manifest: ...

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag],
        by: Actor,
        sparse: bool,
        condition: Condition | None,
    ) -> None: ...

    async def delete_manifest(self, repo: RepositoryName, digest: Digest, by: Actor) -> None: ...

    async def delete_tag(self, repo: RepositoryName, tag: Tag, by: Actor) -> None: ...

    async def is_known_repository(self, repo: RepositoryName) -> bool:
        """Returns whether the repository ever had content, even if all of it was deleted."""
        ...

    async def repositories(self, after: str | None, limit: int, within: NameSet) -> Page[RepositoryName]: ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]: ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]: ...

    # For the garbage collector. Changes that may remove the last reference to a blob put its link into a queue.

    async def queued_links(self, before: float, limit: int) -> list[QueuedLink]:
        """Returns at most `limit` entries that were put into the queue before `before` (seconds since 1970), oldest
        first."""
        ...

    async def unlinked_blobs(self, limit: int) -> list[Digest]:
        """Returns at most `limit` digests from the queue of blobs that have lost their last link."""
        ...

    async def drop_link(self, entry: QueuedLink, before: float) -> bool:
        """Deletes the link of an entry if no manifest of its repository refers to the blob and the blob was last used
        before `before` (seconds since 1970). Returns whether it deleted the link. If it did not, the entry leaves the
        queue, or stays in it for a later round if the blob was used since."""
        ...

    async def drop_blob(self, digest: Digest) -> str | None:
        """Takes the digest out of the queue of `unlinked_blobs`. If the blob still has no link, deletes its row and
        returns its place; otherwise returns None. The caller must hold the lock of the digest, and must remove the
        bytes at the place afterwards."""
        ...

    async def known_blobs(self, digests: Sequence[Digest]) -> set[Digest]:
        """Returns those of `digests` for which there is a blob row."""
        ...

    async def stale_uploads(self, before: float, limit: int) -> list[UploadID]:
        """Returns at most `limit` upload sessions that had no progress since `before` (seconds since 1970)."""
        ...

    async def drop_upload(self, upload: UploadID, before: float) -> bool:
        """Deletes the row of an upload session if it had no progress since `before` (seconds since 1970). Returns False
        if it had progress or does not exist. Not durable."""
        ...

    async def known_uploads(self, uploads: Sequence[UploadID]) -> set[UploadID]:
        """Returns those of `uploads` for which there is a row."""
        ...
