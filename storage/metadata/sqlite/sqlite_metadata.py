"""Stores repositories, manifests, tags, blobs and upload sessions in an embedded SQLite database (`SqliteMetadata`).

Short lookups run on the event loop, because they take microseconds. They see all commits of all processes. Lookups that
may read many rows run in a thread (`ScanThread`). Changes run in another thread (`CommitThread`). A change survives a
power cut once its method has returned, unless the method runs the change with `durable=False`.

The *reserve* is disk space that the registry keeps allocated, so that content can be deleted when the disk is full. A
change that frees space may use the whole reserve (`ReserveUse.ALL`).

- A *link* is a row that lets a repository serve a blob.
- The *collect queue* lists the links and blobs that garbage collection may have to remove.
- `place` is the key under which the blob store has the bytes of a blob.
- `by` is the client for which a change is made. The audit log names it.
- `before` is a time in seconds since 1970. Garbage collection calls the methods with this parameter. These methods
  remove only links that were last queued and last used at this time or earlier, upload sessions that made their last
  progress at this time or earlier, and manifests that were deleted at this time or earlier. `queued_links` does not
  look at the last use; `drop_link` queues a link that was used later again, with the time of this use.
- `sparse` means that a manifest is mirrored: it comes from an upstream registry, and the repository may lack content
  that the manifest refers to.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, TypeVar
from weakref import WeakValueDictionary

import apsw

from storage.content import MIRROR_ACTOR, Actor, Condition, Descriptor, Manifest, Page
from storage.data_dir.reserve import ReserveUse
from storage.metadata.catalog import (
    BlobRow,
    DeletedManifest,
    LinkPreview,
    QueuedLink,
    StaleUpload,
    UnlinkedBlob,
    UploadRow,
)
from storage.metadata.sqlite import blob_changes, lookups, manifest_and_tag_changes
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.lookup_cache import (
    LookupCache,
    bytes_of_manifest,
    bytes_of_page,
    bytes_of_row,
    manifest_for_caller,
)
from storage.metadata.sqlite.manifest_deletion import ManifestDeletion
from storage.metadata.sqlite.needing_tags import run_checked
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep import deleted_manifests, event_tables, future_times
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.outbox import EventAction
from storage.patterns import NameSet
from storage.tag_rules import IsImmutable, nothing_immutable

_MAX_REPOSITORIES_ON_LOOP: Final = 1000
"""The method `repositories` reads a page on the event loop if `limit` is at most this number and the set `within`
contains every name. It reads all other pages in a thread."""
_MAX_REFERRERS_ON_LOOP: Final = 100
"""Largest number of referrers that are read for a page on the event loop. A *referrer* of a manifest is a manifest
whose `subject` field has the digest of that manifest."""
_MAX_REFERRERS_BYTES_ON_LOOP: Final = 64 * 1024
"""Approximate size in bytes above which a page of referrers is not read on the event loop."""
_LOOKUPS_ON_LOOP: Final = 4
"""Largest number of rows that are looked up one by one on the event loop."""
_LOOKUPS_IN_THREAD: Final = 500
"""Number of rows that one call in the thread looks up one by one. This takes about 5 ms."""
_BLOB_REPAIRED: Final = "the damaged blob %s is repaired: its right bytes were stored again for %s"
log = logging.getLogger("storage.metadata")
T = TypeVar("T")
S = TypeVar("S", bound=str)


class SqliteMetadata:
    """Implements `storage.metadata.catalog.Metadata`, which says what each method raises. Used from one event loop.

    `SqliteDatabase` makes this object, and closes the connections and threads that this object uses. `version` returns
    the data version: a value that changes with every commit of any process."""

    def __init__(
        self,
        db: apsw.Connection,
        version: Callable[[], object],
        cache: LookupCache,
        scans: ScanThread | ImmutableScans,
        writer: CommitThread | ImmutableDatabase,
        clock: Callable[[], float],
    ) -> None:
        """`cache` runs the lookups whose results are cached. `db` is a connection for other short lookups. `scans` runs
        long lookups, `writer` runs changes. If a full disk has no space to open the database normally, `writer` is an
        `ImmutableDatabase`, which refuses every change, and `scans` is an `ImmutableScans`. `clock` returns the time in
        seconds since 1970."""
        self._db = db
        self.version = version
        self._scans = scans
        self._cache = cache
        self._writer = writer
        self._large_manifests: WeakValueDictionary[Digest, Manifest] = WeakValueDictionary()
        """The large manifests that are in use now. Requests for the same manifest share one copy of it."""
        self._needing_tags_lock = asyncio.Lock()
        """Lock that is held while a manifest is deleted or gets another media type, if the check of the tags that need
        it takes too long for one transaction: if more than `MAX_TAGS_WITHOUT_LOCK` tags need it, or this many indexes
        contain it. So no transaction contains several such checks. A tag *needs* the manifest that it points at. If
        this manifest is an index, the tag also needs the manifests that the index lists, directly or through other
        indexes."""
        self._clock = clock
        self.on_mirrored: Callable[[], None] = lambda: None
        """Called after each `put_manifest` with `sparse` and each `add_blob_without_upload`, because these may have
        stored content from an upstream."""

    async def blob(self, repo: RepositoryName, digest: Digest) -> BlobRow:
        return self._cache.look_up(bytes_of_row, lookups.blob, repo, digest)

    async def touch_blob(self, repo: RepositoryName, digest: Digest) -> None:
        """Records that the registry has just told a client that the repository has the blob. Garbage collection then
        keeps the blob in the repository for a grace period, so that the client can push a manifest that refers to the
        blob."""
        now = self._clock()
        await self._writer.run(lambda db: blob_changes.touch_blob(db, repo, digest, now), durable=False)

    async def add_blob(
        self, repo: RepositoryName, digest: Digest, size: int, place: str, upload: UploadID, by: Actor
    ) -> None:
        """Adds an uploaded blob to the repository and deletes its upload session `upload`. `size`: in bytes."""
        now = self._clock()
        was_damaged = await self._writer.run(
            lambda db: blob_changes.add_blob(db, repo, digest, size, place, upload, by, now)
        )
        if was_damaged:
            log.warning(_BLOB_REPAIRED, digest, repo)

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
        """Adds to the repository a blob whose bytes the blob store already has at `place`. Unlike `add_blob`, needs no
        upload session. `size`: in bytes. `by`: the client that pushed the blob; None if no client did. `is_fill`:
        whether the mirror downloaded the blob from an upstream."""
        now = self._clock()

        def add(db: apsw.Connection) -> bool:
            if is_fill:
                event_tables.add_blob_event(db, EventAction.FILL, repo, digest, size, MIRROR_ACTOR, now)
            elif by is not None:
                event_tables.add_blob_event(db, EventAction.BLOB_PUSH, repo, digest, size, by, now)
            return blob_changes.add_blob_without_upload(db, repo, digest, size, place, now)

        if await self._writer.run(add):
            log.warning(_BLOB_REPAIRED, digest, repo)
        self.on_mirrored()

    async def mount_blob(
        self, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor
    ) -> int:
        """Gives `repo` a link to a blob that a source repository has, and returns the blob's size in bytes. `source`:
        the source repository, or a set of repositories to search for the blob."""
        now = self._clock()
        return await self._writer.run(lambda db: blob_changes.mount_blob(db, repo, digest, source, by, now))

    async def delete_blob(self, repo: RepositoryName, digest: Digest, by: Actor, even_if_referenced: bool) -> None:
        """Removes the blob from the repository. Refuses this if a manifest of the repository refers to the blob and
        `even_if_referenced` is false."""
        now = self._clock()
        await self._writer.run(
            lambda db: blob_changes.delete_blob(db, repo, digest, by, now, even_if_referenced=even_if_referenced),
            reserve_use=ReserveUse.ALL,
        )

    async def start_upload(self, upload: UploadID, repo: RepositoryName, algorithm: str, boot: str, owner: str) -> None:
        """Stores a new upload session. `algorithm`: the hash algorithm of the blob's digest. `boot`: the id of the
        machine's current boot. A restart of the machine changes this id, and can lose bytes that were written earlier.
        `owner`: name of the actor that may continue the session; empty if every client may."""
        now = self._clock()
        await self._writer.run(
            lambda db: blob_changes.start_upload(db, upload, repo, algorithm, boot, owner, now), durable=False
        )

    async def upload(self, repo: RepositoryName, upload: UploadID) -> UploadRow:
        return lookups.upload(self._db, repo, upload)

    async def save_upload(self, upload: UploadID, offset: int, state: bytes | None, boot: str) -> None:
        """Stores the progress of an upload session. `offset`: the number of bytes that have arrived. `state`: the state
        of the digest's computation after these bytes; None if it was not saved. `boot`: the id of the machine's boot in
        which these bytes were written."""
        now = self._clock()
        await self._writer.run(lambda db: blob_changes.save_upload(db, upload, offset, state, boot, now), durable=False)

    async def end_upload(self, upload: UploadID) -> None:
        """Deletes an upload session."""
        await self._writer.run(
            lambda db: blob_changes.end_upload(db, upload), durable=False, reserve_use=ReserveUse.ALL
        )

    async def manifest_descriptor(self, repo: RepositoryName, reference: Reference) -> Descriptor:
        return self._cache.look_up(bytes_of_row, lookups.manifest_descriptor, repo, reference)

    async def manifest(self, repo: RepositoryName, reference: Reference) -> Manifest:
        return manifest_for_caller(self._cache.look_up(bytes_of_manifest, self._find_manifest, repo, reference))

    def _find_manifest(self, db: apsw.Connection, repo: RepositoryName, reference: Reference) -> Manifest:
        return lookups.manifest(db, repo, reference, self._large_manifests)

    async def put_manifest(
        self,
        repo: RepositoryName,
        manifest: Manifest,
        tags: Sequence[Tag],
        by: Actor,
        sparse: bool,
        condition: Condition | None,
        is_immutable: IsImmutable = nothing_immutable,
    ) -> None:
        """Stores the manifest and points the tags at it. Refuses this in these cases:

        - `condition` does not hold for the first tag.
        - One of the tags is immutable and points at another manifest.
        - The manifest is stored already with another media type, and an immutable tag needs it (`_needing_tags_lock`).
        - The repository lacks content that the manifest refers to, and `sparse` is false."""
        now = self._clock()
        put = partial(manifest_and_tag_changes.put_manifest, repo=repo, manifest=manifest, tags=tags, by=by, now=now)
        check = manifest_and_tag_changes.media_type_check(is_immutable)
        await run_checked(
            partial(put, sparse=sparse, condition=condition, is_immutable=is_immutable),
            lambda db: check.check_all(db, repo, manifest.digest),
            *(self._writer, self._scans, self._needing_tags_lock),
        )
        if sparse:
            self.on_mirrored()

    async def delete_manifest(
        self,
        repo: RepositoryName,
        digest: Digest,
        by: Actor,
        restorable: bool = True,
        is_immutable: IsImmutable = nothing_immutable,
    ) -> None:
        """Deletes the manifest and all its tags. `restorable`: whether the manifest can be put back until garbage
        collection removes it. If the manifest has very many tags, a cancelled call may have deleted some of its tags,
        but not the manifest."""
        deletion = ManifestDeletion(repo, digest, by, self._clock, is_immutable)
        await deletion.run(self._writer, self._scans, self._needing_tags_lock, restorable=restorable)

    async def delete_tag(
        self,
        repo: RepositoryName,
        tag: Tag,
        by: Actor,
        is_immutable: IsImmutable = nothing_immutable,
        condition: Condition | None = None,
    ) -> None:
        delete = partial(manifest_and_tag_changes.delete_tag, condition=condition, is_immutable=is_immutable)
        now = self._clock()
        await self._writer.run(lambda db: delete(db, repo, tag, by, now), reserve_use=ReserveUse.ALL)

    async def is_known_repository(self, repo: RepositoryName) -> bool:
        """Returns whether the repository ever had content, even if all of it was deleted."""
        return lookups.is_known_repository(self._db, repo)

    async def repositories(self, after: str | None, limit: int, within: NameSet) -> Page[RepositoryName]:
        if within.has_every_name and limit <= _MAX_REPOSITORIES_ON_LOOP:
            return self._cache.look_up(bytes_of_page, lookups.repository_page, after, limit, within)
        # The cache also stores `within`, as a part of the key, so the size of the entry includes it.
        bytes_of = partial(bytes_of_page, name_set_bytes=within.memory_bytes)
        return await self._cache.scan(bytes_of, lookups.repository_page, after, limit, within)

    async def tags(self, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
        return self._cache.look_up(bytes_of_page, lookups.tag_page, repo, after, limit)

    async def referrers(
        self, repo: RepositoryName, subject: Digest, artifact_type: str | None, after: str | None, limit: int
    ) -> Page[Descriptor]:
        """Returns a page of the referrers of `subject`."""
        arguments = repo, subject, artifact_type, after
        page = lookups.referrer_page(
            self._db,
            *arguments,
            limit=min(limit, _MAX_REFERRERS_ON_LOOP),
            max_read=_MAX_REFERRERS_ON_LOOP,
            max_page_bytes=_MAX_REFERRERS_BYTES_ON_LOOP,
        )
        if not page.more or len(page.items) == limit:
            return page
        # There are too many referrers to read on the event loop, so the whole page is read in the thread.
        return await self._scans.run(lambda db: lookups.referrer_page(db, *arguments, limit=limit))

    async def queued_links(self, before: float, limit: int, after: QueuedLink | None = None) -> list[QueuedLink]:
        """Returns at most `limit` links that entered the collect queue at the time `before` or earlier. A link enters
        the queue when no manifest of its repository refers to the blob."""
        return blob_changes.queued_links(self._db, before, limit, after)

    async def preview_link(self, entry: QueuedLink, before: float) -> LinkPreview:
        """Returns what `drop_link` would do now. Runs in the thread, because the blob may have very many links."""
        return await self._scans.run(lambda db: blob_changes.preview_link(db, entry, before))

    async def unlinked_blobs(self, limit: int, after: Digest | None = None) -> list[UnlinkedBlob]:
        """Returns at most `limit` blobs of the collect queue. A blob enters the queue when no repository has a link to
        it."""
        return blob_changes.unlinked_blobs(self._db, limit, after)

    async def drop_link(self, entry: QueuedLink, before: float) -> bool:
        """Removes a queued link if no manifest of the repository refers to the blob, and no client has used the blob in
        the repository since the time `before`. Returns whether it removed the link."""
        now = self._clock()
        return await self._writer.run(
            lambda db: blob_changes.drop_link(db, entry, before, now), reserve_use=ReserveUse.ALL
        )

    async def drop_blob(self, digest: Digest) -> str | None:
        """If no repository has a link to the blob, deletes its row and returns its place, so that the caller can delete
        the bytes there. Returns None if a repository has a link to the blob, or the blob has no row."""
        return await self._writer.run(lambda db: blob_changes.drop_blob(db, digest), reserve_use=ReserveUse.ALL)

    async def known_blobs(self, digests: Sequence[Digest]) -> set[Digest]:
        """Returns the `digests` whose blobs are in the database."""
        return await self._existing_values(digests, table="blob", column="digest")

    async def has_future_times(self) -> bool:
        """Returns whether `correct_future_times` would change anything."""
        return future_times.has_future_times(self._db, self._clock())

    async def correct_future_times(self) -> None:
        """Replaces stored times that are in the future by the present time. A time gets into the future if it is stored
        while the machine's clock is ahead."""
        correct = partial(future_times.correct_future_times, now=self._clock())
        while await self._writer.run(correct, reserve_use=ReserveUse.ALL):
            pass

    async def stale_uploads(self, before: float, limit: int, after: StaleUpload | None = None) -> list[StaleUpload]:
        """Returns at most `limit` upload sessions that made no progress after `before`."""
        return blob_changes.stale_uploads(self._db, before, limit, after)

    async def drop_stale_upload(self, upload: UploadID, before: float) -> bool:
        """Deletes the upload session if it made no progress after `before`. Returns whether it deleted the session."""
        return await self._writer.run(
            lambda db: blob_changes.drop_stale_upload(db, upload, before), durable=False, reserve_use=ReserveUse.ALL
        )

    async def known_uploads(self, uploads: Sequence[UploadID]) -> set[UploadID]:
        """Returns the `uploads` whose sessions are in the database."""
        return await self._existing_values(uploads, table="upload", column="id")

    async def deleted_manifests(
        self, before: float, limit: int, after: DeletedManifest | None = None
    ) -> list[DeletedManifest]:
        return deleted_manifests.oldest(self._db, before, limit, after)

    async def drop_deleted_manifests(self, before: float, limit: int) -> list[DeletedManifest]:
        return await self._writer.run(
            lambda db: deleted_manifests.drop_oldest(db, before, limit), reserve_use=ReserveUse.ALL
        )

    async def _existing_values(self, values: Sequence[S], *, table: str, column: str) -> set[S]:
        """Returns the `values` that occur in the column of the table. If there are more than `_LOOKUPS_ON_LOOP`
        values, a thread looks them up. Each lookup releases the global interpreter lock, and may wait 5 ms until
        another thread gives it back. On the event loop, many such waits would block the loop."""
        if len(values) <= _LOOKUPS_ON_LOOP:
            return lookups.existing_values(self._db, table, column, values)
        existing: set[S] = set()
        for start in range(0, len(values), _LOOKUPS_IN_THREAD):
            group = values[start : start + _LOOKUPS_IN_THREAD]
            lookup = partial(lookups.existing_values, table=table, column=column, values=group)
            existing |= await self._scans.run(lookup)
        return existing
