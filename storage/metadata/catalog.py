"""The interface of the metadata store (`Metadata`), which records the blobs, manifests, tags and upload sessions.

The bytes of blobs are in a separate blob store. The metadata store has a *row* for each blob. The row contains the
*place* of the blob: the key under which the blob store has the bytes. Only the blob store can interpret the key. A
*link* is the right of a repository to serve a blob: if two repositories have the same blob, there are two links to one
row. A blob is *published* when the blob store has stored the bytes of the blob durably.
"""

from __future__ import annotations

from asyncio import Future
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from storage.content import Actor, Condition, Descriptor, Manifest, Page
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import NameSet
from storage.tag_rules import IsImmutable, nothing_immutable

ANY_ACTOR = ""
"""Value of `UploadRow.owner` for a session that every actor may resume."""


class CommitObserver(Protocol):
    """Measures the changes of the metadata. Its methods must return at once and raise nothing."""

    def on_queued(self, change: Future[Any]) -> None:
        """Called on the event loop for each change. `change` is done when the change is committed or has failed."""
        ...

    def on_commit(self, change_count: int, wait_seconds: float, commit_seconds: float) -> None:
        """Called after each batch of changes, in the thread that commits the changes. `change_count`: number of changes
        in the batch. `wait_seconds`: how long the thread waited for the lock of the database. `commit_seconds`: how
        long the changes and their commit took."""
        ...


class _NoCommitObserver:
    """A `CommitObserver` that measures nothing."""

    def on_queued(self, change: Future[Any]) -> None:
        return

    def on_commit(self, change_count: int, wait_seconds: float, commit_seconds: float) -> None:
        return


UNOBSERVED_COMMITS: Final[CommitObserver] = _NoCommitObserver()
"""The observer of a store whose changes are not measured, for example the store of a command."""


@dataclass(frozen=True, slots=True)
class BlobRow:
    """A blob of a repository.

    - `size`: number of the blob's bytes.
    - `place`: key of the bytes in the blob store; never empty.
    - `is_queued_for_collection`: whether the repository's link to the blob is in the queue of the garbage collector.
      False means that a manifest of the repository refers to the blob. After the push of such a manifest, the value may
      stay True for some time.
    - `last_used`: approximate time in seconds since 1970 at which a client last added or requested the blob."""

    digest: Digest
    size: int
    place: str
    is_queued_for_collection: bool
    last_used: float


@dataclass(frozen=True, slots=True)
class UploadRow:
    """An upload session. `algorithm`: hash algorithm of the digest that is computed as the bytes arrive. `owner`: name
    of the actor (client) that may resume the session, or `ANY_ACTOR`.

    `offset`, `state` and `boot` are the last checkpoint of the session's progress. `offset`: number of bytes. `state`:
    state of the digest computation after these bytes; None if it was not saved. `boot`: id of the machine's boot during
    which the bytes were written, because a reboot may lose written bytes."""

    id: UploadID
    repository: RepositoryName
    algorithm: str
    offset: int
    state: bytes | None
    boot: str
    owner: str


@dataclass(frozen=True, slots=True)
class QueuedLink:
    """An entry of the garbage collector's queue of links. `repository_id` and `repository`: row id and name of the
    repository. `digest`: digest of the blob. `size`: number of the blob's stored bytes; 0 if they are damaged or
    missing. `queued_at`: time in seconds since 1970 at which the link was queued. At this time, no manifest of the
    repository referred to the blob."""

    repository_id: int
    digest: Digest
    repository: str
    size: int
    queued_at: float


@dataclass(frozen=True, slots=True)
class LinkPreview:
    """What `drop_link` would do to a queued link now. `is_dropped`: whether it would delete the link. `frees_blob`:
    whether the blob would lose all its links if `drop_link` were called for each link to the blob. If several
    repositories have a link to the blob, `frees_blob` is True for at most one of the links: that of the repository with
    the highest row id. So a caller that previews all links counts each freed blob once."""

    is_dropped: bool
    frees_blob: bool


@dataclass(frozen=True, slots=True)
class UnlinkedBlob:
    """An entry of the garbage collector's queue of blobs that have lost their last link. `size`: number of stored
    bytes; 0 if they are damaged or missing. `is_still_unlinked`: whether the blob exists and has got no new link."""

    digest: Digest
    size: int
    is_still_unlinked: bool


@dataclass(frozen=True, slots=True)
class StaleUpload:
    """An upload session without recent progress. `repository`: the name of its repository. `last_progress`: when the
    session last made progress, in seconds since 1970."""

    id: UploadID
    repository: str
    last_progress: float


@dataclass(frozen=True, slots=True)
class DeletedManifest:
    """A deleted manifest that can still be put back. `repository_id` and `repository`: row id and name of the
    repository. `size`: size of the manifest in bytes. `deleted_at`: time of the deletion in seconds since 1970."""

    repository_id: int
    digest: Digest
    repository: str
    size: int
    deleted_at: float


class Metadata(Protocol):
    """The metadata store. Each method is one transaction, or several if it reads or changes very many rows. A method
    that changes something returns when the change is durable. If its docstring says "Not durable", a power cut may lose
    the change. All methods may raise StorageFull and StorageFailed, in addition to the errors that their docstrings
    name.

    A method without a docstring does the metadata part of the method with the same name in
    `storage.interface.Registry`; `manifest_descriptor` does the metadata part of `resolve_manifest`, and `manifest` the
    metadata part of `get_manifest`."""

    @property
    def version(self) -> Callable[[], object]:
        """A function that returns the current version of all stored data, including accounts. If two calls return equal
        versions, no process has changed anything between the calls. A lookup after a call sees data that is at least as
        new as the returned version."""
        ...

    on_mirrored: Callable[[], None]
    """Called after this process has stored content that may have come from an upstream: after
    `add_blob_without_upload`, and after `put_manifest` with `sparse=True` (a mirrored manifest). Must return at
    once."""

    async def blob(self, repo: RepositoryName, digest: Digest) -> BlobRow:
        """Returns the row of a blob of the repository. Raises BlobUnknown if the repository does not have the blob, or
        if the blob is damaged (`storage.damage`)."""
        ...

    async def touch_blob(self, repo: RepositoryName, digest: Digest) -> None:
        """Sets `BlobRow.last_used` to the current time. Called when a client has asked for the blob. Not durable.
        Raises BlobUnknown."""
        ...

    async def add_blob(
        self, repo: RepositoryName, digest: Digest, size: int, place: str, upload: UploadID, by: Actor
    ) -> None:
        """Adds the row of a published blob, and a link from the repository to the blob. If the blob already has a row,
        sets its place to `place`, and a damaged blob is not damaged any more. Deletes the row of the upload session
        `upload`, which received the blob's bytes. Stores an event (`storage.outbox`) for a push by the client `by`.
        Raises BlobUploadUnknown, QuotaExceeded."""
        ...

    async def add_blob_without_upload(
        self,
        repo: RepositoryName,
        digest: Digest,
        size: int,
        place: str,
        *,
        by: Actor | None = None,
        is_fill: bool = False,
    ) -> None:
        """Adds a blob like `add_blob`, but for bytes that no upload session received, such as those of a mirrored blob.
        Raises QuotaExceeded. Stores one of these events (`storage.outbox`):

        - If `is_fill` is True: a fill (`EventAction.FILL`), the download of a blob by a mirror.
        - If `is_fill` is False: a push by the client `by`, or no event if `by` is None."""
        ...

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> int:
        """Adds a link from `repo` to a blob of another repository. `source`: the other repository, or a set of
        repositories to search for the blob. Returns the blob's size in bytes. Raises BlobUnknown (no repository with
        the blob was found), QuotaExceeded."""
        ...

    async def delete_blob(self, repo: RepositoryName, digest: Digest, by: Actor, even_if_referenced: bool) -> None: ...

    async def start_upload(self, upload: UploadID, repo: RepositoryName, algorithm: str, boot: str, owner: str) -> None:
        """Stores the row of a new upload session. Not durable."""
        ...

    async def upload(self, repo: RepositoryName, upload: UploadID) -> UploadRow:
        """Returns the row of an upload session. Raises BlobUploadUnknown."""
        ...

    async def save_upload(self, upload: UploadID, offset: int, state: bytes | None, boot: str) -> None:
        """Stores a checkpoint of the session's progress (`UploadRow`). If the stored checkpoint has more bytes and the
        same `boot`, keeps the stored checkpoint. Not durable. Raises BlobUploadUnknown."""
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
        is_immutable: IsImmutable = nothing_immutable,
    ) -> None: ...

    async def delete_manifest(
        self,
        repo: RepositoryName,
        digest: Digest,
        by: Actor,
        restorable: bool = True,
        is_immutable: IsImmutable = nothing_immutable,
    ) -> None:
        """Does the metadata part of `storage.interface.Registry.delete_manifest`. If the disk is too full to keep a
        restorable manifest, deletes the manifest for good."""
        ...

    async def delete_tag(
        self,
        repo: RepositoryName,
        tag: Tag,
        by: Actor,
        is_immutable: IsImmutable = nothing_immutable,
        condition: Condition | None = None,
    ) -> None: ...

    async def is_known_repository(self, repo: RepositoryName) -> bool:
        """Returns whether the repository ever had content, even if all of it was deleted."""
        ...

    async def repositories(self, after: str | None, limit: int, within: NameSet) -> Page[RepositoryName]: ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]: ...

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]: ...

    # The next methods are for the garbage collector, which has two queues:
    # - The queue of links. A link enters it when the link is created and no manifest of the repository refers to the
    #   blob yet, and when the last manifest of the repository that refers to the blob is deleted.
    # - The queue of unlinked blobs. The digest of a blob enters it when the last link to the blob is deleted.

    async def queued_links(self, before: float, limit: int, after: QueuedLink | None = None) -> list[QueuedLink]:
        """Returns at most `limit` entries that were put into the queue of links at the time `before` (seconds since
        1970) or earlier, oldest first. If `after` is not None, returns only entries that follow it."""
        ...

    async def preview_link(self, entry: QueuedLink, before: float) -> LinkPreview:
        """Returns what `drop_link` would do now. Changes nothing."""
        ...

    async def unlinked_blobs(self, limit: int, after: Digest | None = None) -> list[UnlinkedBlob]:
        """Returns at most `limit` entries from the queue of unlinked blobs, sorted by digest. If `after` is not None,
        returns only entries that follow this digest."""
        ...

    async def drop_link(self, entry: QueuedLink, before: float) -> bool:
        """Deletes the link of an entry if the link has been unused since the time `before` (seconds since 1970).
        Returns whether it deleted the link.

        - If the link was queued again after `before`, changes nothing.
        - If the link no longer exists, or a manifest of the repository refers to the blob, deletes only the entry.
        - If a client used the blob after `before`, keeps the entry for a later call.
        - Otherwise, first removes for good the repository's manifests that were deleted at `before` or earlier. If such
          a manifest were put back later, it might lack the blob. Then deletes the link and the entry. If there are too
          many such manifests for one transaction, removes only some of them, and keeps the link and the entry for a
          later call."""
        ...

    async def drop_blob(self, digest: Digest) -> str | None:
        """Removes the digest from the queue of unlinked blobs. If the blob still has no link, deletes its row and
        returns its place, which is empty for a damaged blob. Returns None if the blob has a link again or has no row.
        The caller must hold the lock of the digest (`storage.leases.DigestLocks`), and must remove the bytes at the
        returned place from the blob store before it releases the lock."""
        ...

    async def known_blobs(self, digests: Sequence[Digest]) -> set[Digest]:
        """Returns those of `digests` for which there is a blob row."""
        ...

    async def has_future_times(self) -> bool:
        """Returns whether `correct_future_times` would change anything."""
        ...

    async def correct_future_times(self) -> None:
        """Replaces stored times that are in the future (`storage.future_times`) by the present time, so that they do
        not delay the removal of unused content. Uses small transactions. Corrects the times of queued links, upload
        sessions and deleted manifests, and the time since which this registry has recorded all pulls
        (`storage.retention.TagFacts.unrecorded_until`)."""
        ...

    async def stale_uploads(self, before: float, limit: int, after: StaleUpload | None = None) -> list[StaleUpload]:
        """Returns at most `limit` upload sessions without progress since the time `before` (seconds since 1970). The
        session that has been idle longest comes first. If `after` is not None, returns only sessions that follow it."""
        ...

    async def drop_stale_upload(self, upload: UploadID, before: float) -> bool:
        """Deletes the row of an upload session if the session has made no progress since the time `before` (seconds
        since 1970). Returns whether it deleted the row. Not durable."""
        ...

    async def known_uploads(self, uploads: Sequence[UploadID]) -> set[UploadID]:
        """Returns those of `uploads` for which there is a row."""
        ...

    async def deleted_manifests(
        self, before: float, limit: int, after: DeletedManifest | None = None
    ) -> list[DeletedManifest]:
        """Returns at most `limit` manifests that were deleted at the time `before` (seconds since 1970) or earlier and
        can still be put back. The manifest that was deleted first comes first. If `after` is not None, returns only
        manifests that follow it."""
        ...

    async def drop_deleted_manifests(self, before: float, limit: int) -> list[DeletedManifest]:
        """Removes at most `limit` of the manifests that `deleted_manifests` returns for `before`. Returns the removed
        manifests, which cannot be put back any more; an empty list if there were none."""
        ...
