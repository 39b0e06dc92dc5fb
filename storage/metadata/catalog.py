"""The interface of the metadata store (`Metadata`), which records the blobs, manifests, tags and upload sessions.

The bytes of blobs are in a separate blob store. The metadata store has a *row* for each blob. The row contains the
*place* of the blob: the key under which the blob store has the bytes. Only the blob store can interpret the key. A
*link* is the right of a repository to serve a blob: if two repositories have the same blob, there are two links to one
row. A blob is *published* as soon as the blob store has stored its bytes durably at their place.
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
    """A blob of a repository. `size`: number of its bytes. `place`: key of these bytes in the blob store; never empty.
    `is_queued_for_collection`: whether the repository's link to the blob is in the queue of the garbage collector. It
    is True if no manifest of the repository refers to the blob. It may stay True for some time after a manifest that
    refers to the blob was pushed. `last_used`: approximate time in seconds since 1970 at which a client last added the
    blob or asked for it."""

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
    which the bytes were written. A reboot may lose written bytes."""

    id: UploadID
    repository: RepositoryName
    algorithm: str
    offset: int
    state: bytes | None
    boot: str
    owner: str


@dataclass(frozen=True, slots=True)
class QueuedLink:
    """An entry of the garbage collector's queue of links. `repository_id` and `name`: row id and name of the
    repository. `digest`: digest of the blob. `size`: number of the blob's stored bytes; 0 if they are damaged or
    missing. `since`: time in seconds since 1970 at which the link was queued. No manifest of the repository referred to
    the blob then."""

    repository_id: int
    digest: Digest
    name: str
    size: int
    since: float


@dataclass(frozen=True, slots=True)
class LinkPreview:
    """What `drop_link` would do to a queued link now. `is_dropped`: whether it would delete the link. `frees_blob`:
    whether calls of `drop_link` for all links to the blob would delete all these links. To let a caller count each
    freed blob once, `frees_blob` is True only for the link whose repository has the highest row id."""

    is_dropped: bool
    frees_blob: bool


@dataclass(frozen=True, slots=True)
class UnlinkedBlob:
    """An entry of the garbage collector's queue of blobs that have lost their last link. `size`: number of stored
    bytes; 0 if they are damaged or missing. `is_unlinked`: whether the blob exists and still has no link."""

    digest: Digest
    size: int
    is_unlinked: bool


@dataclass(frozen=True, slots=True)
class StaleUpload:
    """An upload session without recent progress. `repository`: the name of its repository. `touched`: when it last made
    progress, in seconds since 1970."""

    id: UploadID
    repository: str
    touched: float


@dataclass(frozen=True, slots=True)
class DeletedManifest:
    """A deleted manifest that can still be put back. `repository_id` and `name`: row id and name of the repository.
    `size`: in bytes. `deleted`: when it was deleted, in seconds since 1970."""

    repository_id: int
    digest: Digest
    name: str
    size: int
    deleted: float


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
        """Adds the row of a published blob, and a link from the repository to the blob. Deletes the row of the upload
        session `upload`, which received the blob's bytes. If the blob was damaged, it gets `place` as its new place,
        and is not damaged any more. `by`: the client that pushed the blob, for the blob's event (`storage.outbox`).
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
        """Adds the row of a published blob whose bytes no upload session received, such as a mirrored blob, or a file
        to which the store links instead of copying it. Like `add_blob`, adds a link from the repository to the blob and
        repairs a damaged blob. Raises QuotaExceeded. The blob's event (`storage.outbox`) is:

        - a fill (`EventAction.FILL`) if `is_fill` is True: a mirror downloaded the blob from its upstream.
        - otherwise a push by the client `by`, or no event if `by` is None."""
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
        restorable manifest, deletes the manifest without keeping it."""
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
        - Otherwise removes the repository's deleted manifests that were deleted at `before` or earlier, and then
          deletes the link and the entry. A deleted manifest needs its blobs until it is removed; after that, it cannot
          be put back. If there are many such manifests, removes only some, and keeps the link and the entry for a later
          call."""
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
        """Replaces stored times that are in the future (`storage.future_times`) by the present time, in small
        transactions. Otherwise unused content would stay until the clock has reached these times. Corrects the times
        of queued links, upload sessions and deleted manifests, and the time since which this registry has recorded all
        pulls (`storage.retention.TagFacts.unrecorded_until`)."""
        ...

    async def stale_uploads(self, before: float, limit: int, after: StaleUpload | None = None) -> list[StaleUpload]:
        """Returns at most `limit` upload sessions without progress since the time `before` (seconds since 1970). The
        session that has been idle longest comes first. If `after` is not None, returns only sessions that follow it."""
        ...

    async def drop_upload(self, upload: UploadID, before: float) -> bool:
        """Deletes the row of an upload session without progress since the time `before` (seconds since 1970). Returns
        whether it deleted the row. Not durable."""
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
