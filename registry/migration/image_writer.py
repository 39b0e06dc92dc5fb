"""Stores images of another registry, the *old registry*, in this registry (`ImageWriter`).

The *children* of an index are the manifests that it lists. The content *below* a manifest is all that the manifest
refers to, directly or through its children. The content below a manifest is stored before the manifest, and the tag of
the image is set last. So an interrupted import leaves no incomplete image, and a second import continues. If content
of an image is missing or damaged at the old registry, or has a type that this registry does not accept, the import of
the image raises ContentBroken.

If the target repository lacks a blob, and another repository of this registry has it, the import can *mount* the blob:
add it to the target repository without a copy of the bytes. Before a mount, the import checks that the old registry
serves the blob from its repository of the same name as the target repository. Without the check, the author of a
manifest could name the digest of a blob that the author may not read, and so get the blob (ADR 9).

Without `overwrite`, an import keeps two kinds of tags as they are:

- A tag that somebody has changed in this registry since the last import. The history of a tag names the program that
  made each change. The program of an import is `IMPORT_PROGRAM`.
- A tag of this registry that once pointed at the manifest to import, and that retention has deleted. Retention would
  delete the tag again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from registry.migration.import_report import ImportReport
from registry.migration.workers import as_async_iterator, run_workers
from storage.content import Actor, Condition, Descriptor, Manifest
from storage.errors import BlobUnknown, ManifestBlobUnknown, ManifestUnknown, PreconditionFailed, QuotaExceeded
from storage.imports import IMPORT_PROGRAM, ContentBroken
from storage.keyed_locks import KeyedLocks
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import ALL_NAMES
from storage.retention import RETENTION_ACTOR
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import immutable_tag_denied

BLOBS_AT_A_TIME: Final = 4
"""Largest number of blobs of one manifest that are stored at the same time."""
MAX_NESTED_INDEXES: Final = 10
"""Largest number of indexes that are nested in one another."""
MAX_ATTEMPTS: Final = 10
"""Largest number of attempts to store a manifest. An attempt fails if garbage collection with a very short grace period
removes a blob of the manifest before the manifest is stored."""


TimeEstimator = Callable[[Manifest], Awaitable[float]]
"""A function that estimates when a tag was set at the old registry, in seconds since 1970. Its argument is the manifest
that the tag points at. This registry must have stored the manifest before the call."""


class ContentSource(Protocol):
    """Reads content from the old registry."""

    async def get_manifest(self, repo: RepositoryName, digest: Digest) -> Manifest:
        """Returns the manifest, after a check of its digest. Raises ContentBroken, and errors of the old registry."""
        ...

    async def blob_size(self, repo: RepositoryName, digest: Digest) -> int:
        """Returns the size in bytes of a blob that the old registry serves from this repository. Raises ContentBroken
        if the old registry does not serve the blob from this repository. Raises the errors of the old registry."""
        ...

    async def import_blob(self, repo: RepositoryName, blob: Descriptor) -> None:
        """Copies a blob from the repository `repo` of the old registry to the repository `repo` of this registry.
        Raises ContentBroken, for example if the old registry does not serve the blob from `repo`. Raises the errors of
        the old registry, StorageFull, StorageFailed."""
        ...


class ImageWriter:
    """Stores images of `source`. Many calls of its methods may run at the same time."""

    def __init__(
        self, store: StoredRegistry, source: ContentSource, report: ImportReport, *, actor: str, overwrite: bool = False
    ) -> None:
        """`actor`: who runs the import, for the audit log. `overwrite`: whether the import may set tags that it would
        otherwise keep (see the docstring of the module)."""
        self._store = store
        self._source = source
        self._report = report
        self._actor = Actor(actor, user_agent=IMPORT_PROGRAM)
        self._overwrite = overwrite
        self._blob_locks: KeyedLocks[Digest] = KeyedLocks()
        self._manifest_locks: KeyedLocks[tuple[RepositoryName, Digest]] = KeyedLocks()
        """A task holds the lock of a manifest while it stores the content below the manifest, and then the manifest.
        There is no deadlock, because a manifest cannot be below itself."""

    async def import_tag(
        self,
        repo: RepositoryName,
        tag: Tag,
        digest: Digest,
        *,
        set_at: float | TimeEstimator,
    ) -> None:
        """Stores a manifest and all content below it, and points `tag` at the manifest. If the tag already points at
        the manifest, stores the manifest again only if the stored manifest is damaged. If the import keeps the tag as
        it is, records a note. `set_at`: when the tag was set at the old registry, in seconds since 1970, or a function
        that estimates this time.

        Raises Denied if the tag is immutable and points at another manifest. Raises ContentBroken, and the errors of
        the source and the store."""
        current_digest = await self._store.imports.tag_digest(repo, tag)
        if current_digest == digest:
            if await self.has_manifest(repo, digest):
                self._report.present += 1
                await self._add_missing_record(repo, tag, digest, set_at)
                return
            await self.import_manifest(repo, digest)  # the stored manifest is damaged; the tag keeps its time
            self._report.record_imported(repo, tag, digest)
            return
        if current_digest is not None and self._store.immutable_tags.is_immutable(repo, tag):
            raise immutable_tag_denied(repo, tag, current_digest)  # before time is spent on copying
        if not self._overwrite and (reason := await self._reason_to_keep(repo, tag, digest)) is not None:
            self._report.record_note(repo, reason, tag=tag)
            return
        # The tag must still point at `current_digest`. If there was no tag, there must still be none (`negated`).
        condition = Condition(frozenset({current_digest})) if current_digest else Condition(negated=True)
        try:
            manifest = await self.import_manifest(repo, digest, (tag,), None if self._overwrite else condition)
        except PreconditionFailed:
            self._report.record_note(repo, "the tag stays as it is: it was changed here during the import", tag=tag)
            return
        await self._record_import(repo, tag, manifest, set_at)
        self._report.record_imported(repo, tag, digest)

    async def _record_import(
        self, repo: RepositoryName, tag: Tag, manifest: Manifest, set_at: float | TimeEstimator
    ) -> None:
        """Records that an import has pointed the tag at the manifest."""
        time = set_at if isinstance(set_at, float) else await set_at(manifest)
        await self._store.imports.record_import(repo, manifest.digest, {tag: time})

    async def _add_missing_record(
        self, repo: RepositoryName, tag: Tag, digest: Digest, set_at: float | TimeEstimator
    ) -> None:
        """If an earlier import made the tag's last change, and nothing has recorded that import, records it now
        (`_record_import`). An import leaves no record if it was interrupted, or if an earlier version of this program
        ran it."""
        # `record_import` adds a record of the manifest to `pulls`, because retention counts an import as a pull. A pull
        # by a client adds a record too. A missing record of the import is then not noticed.
        if await self._store.pulls.record_of(repo, digest) is not None:
            return
        change = await self._store.imports.last_tag_change(repo, tag)
        if change is not None and change.program == IMPORT_PROGRAM:
            await self._record_import(repo, tag, await self._store.get_manifest(repo, digest), set_at)

    async def _reason_to_keep(self, repo: RepositoryName, tag: Tag, digest: Digest) -> str | None:
        """Returns why the import keeps the tag as it is (see the docstring of the module). Returns None if the import
        may point the tag at the manifest."""
        change = await self._store.imports.last_tag_change(repo, tag)
        if change is None or change.program == IMPORT_PROGRAM:
            return None
        if change.digest is not None:
            return f"the tag stays as it is: {change.actor} has set it here"
        if change.actor != RETENTION_ACTOR.name:
            return f"the tag stays as it is: {change.actor} has deleted it here"
        if await self._store.imports.has_pointed_at(repo, tag, digest):
            return (
                f"the tag stays deleted: {change.actor} has deleted it here after it had pointed at the same image as "
                "at the old registry"
            )
        return None

    async def import_untagged(self, repo: RepositoryName, digest: Digest) -> None:
        """Stores a manifest and all content below it. Does nothing if the repository has the manifest already.
        Raises the errors of `import_tag`."""
        if not await self.has_manifest(repo, digest):
            await self.import_manifest(repo, digest)
            await self._store.imports.record_import(repo, digest)

    async def import_manifest(
        self,
        repo: RepositoryName,
        digest: Digest,
        tags: Sequence[Tag] = (),
        condition: Condition | None = None,
        depth: int = 0,
    ) -> Manifest:
        """Stores a manifest and all content below it. Points `tags` at the manifest if `condition` holds or is None.
        `depth`: the number of indexes above the manifest. Returns the manifest. Raises the errors of
        `import_tag`, and PreconditionFailed if the condition does not hold."""
        if depth > MAX_NESTED_INDEXES:
            raise ContentBroken(f"its indexes are nested more than {MAX_NESTED_INDEXES} levels deep")
        async with self._manifest_locks.hold((repo, digest)):
            return await self._import_manifest(repo, digest, tags, condition, depth)

    async def _import_manifest(
        self, repo: RepositoryName, digest: Digest, tags: Sequence[Tag], condition: Condition | None, depth: int
    ) -> Manifest:
        """Does the work of `import_manifest`. The caller holds the lock of the manifest."""
        is_new = False
        try:
            manifest = await self._store.get_manifest(repo, digest)
        except ManifestUnknown:
            is_new = True
            manifest = await self._source.get_manifest(repo, digest)
        if not is_new and not tags:
            return manifest
        for attempt in range(MAX_ATTEMPTS):
            if is_new or attempt:
                await self._import_content(repo, manifest, depth)
            try:
                await self._store.put_manifest(repo, manifest, tags, by=self._actor, condition=condition)
            except ManifestBlobUnknown as error:
                if attempt == MAX_ATTEMPTS - 1:
                    raise ContentBroken(error.message) from None
            else:
                break
        self._report.manifests += is_new
        return manifest

    async def has_manifest(self, repo: RepositoryName, digest: Digest) -> bool:
        """Returns whether the repository has the manifest, and its stored bytes are not known to be damaged."""
        try:
            await self._store.resolve_manifest(repo, digest)
        except ManifestUnknown:
            return False
        return True

    async def _import_content(self, repo: RepositoryName, manifest: Manifest, depth: int) -> None:
        """Stores the manifests and blobs to which a manifest refers."""
        for child in manifest.manifests:
            # `blob_children`: the entries that may be blobs. The indexes of BuildKit's build cache list blobs.
            try:
                if child.digest in manifest.blob_children:
                    await self._import_blob(repo, child)
                    continue
            except ContentBroken:
                pass  # the media type of the child is unknown, so the child may be a manifest
            try:
                await self.import_manifest(repo, child.digest, depth=depth + 1)
            except ContentBroken as error:
                raise ContentBroken(
                    f"its child {child.digest}: {error.message}", path_to_broken=(child.digest, *error.path_to_broken)
                ) from None
        blobs = {blob.digest: blob for blob in manifest.blobs}
        for blob in blobs.values():
            # Checks each blob alone, before the first blob is read. If only the total size exceeds the quota,
            # `_import_blob` fails later.
            if blob.digest not in manifest.foreign:
                await self._check_quota(repo, blob)

        async def import_listed_blob(blob: Descriptor) -> None:
            try:
                await self._import_blob(repo, blob, may_mount=blob.digest not in manifest.foreign)
            except ContentBroken:
                if blob.digest not in manifest.foreign:  # clients fetch foreign layers from other servers
                    raise

        workers = min(BLOBS_AT_A_TIME, max(len(blobs), 1))
        await run_workers(as_async_iterator(blobs.values()), import_listed_blob, workers)

    async def _import_blob(self, repo: RepositoryName, blob: Descriptor, *, may_mount: bool = True) -> None:
        """Stores a blob in `repo`. If another repository of this registry has the blob already, and the old registry
        serves the blob from its repository `repo`, mounts the blob instead of fetching its bytes.
        `may_mount`: False for a foreign layer. A foreign layer is stored only if the old registry sends its bytes."""
        async with self._blob_locks.hold(blob.digest):
            try:
                await self._store.resolve_blob(repo, blob.digest)
                return
            except BlobUnknown:
                pass
            if not may_mount or not await self._mount(repo, blob.digest):
                await self._check_quota(repo, blob)
                await self._source.import_blob(repo, blob)

    async def _check_quota(self, repo: RepositoryName, blob: Descriptor) -> None:
        """Checks, before the bytes of a blob are read, that the blob fits into the quotas of `repo`. If the size in the
        manifest does not fit, asks the source for the real size. Raises QuotaExceeded if the blob does not fit, and
        ContentBroken if the source is asked and does not have the blob."""
        usage = self._store.usage
        try:
            await usage.check_quota(repo, blob.size, blob.digest)
        except QuotaExceeded:
            # The manifest may state a wrong size. The source may lack the blob, for example a foreign layer.
            await usage.check_quota(repo, await self._source.blob_size(repo, blob.digest), blob.digest)

    async def _mount(self, repo: RepositoryName, digest: Digest) -> bool:
        """If another repository of this registry has the blob, and the old registry serves a blob of the same size from
        `repo`, adds the blob to `repo` and returns True. Otherwise returns False. Raises ContentBroken if the old
        registry does not serve the blob from `repo`."""
        stored_size = await self._store.imports.stored_size(digest)
        if stored_size is None:
            return False
        # The old registry may redirect to a login page, whose status is 200. The size tells the page from the blob.
        if await self._source.blob_size(repo, digest) != stored_size:
            return False
        try:
            await self._store.mount_blob(repo, digest, ALL_NAMES, self._actor)
        except BlobUnknown:  # garbage collection has just deleted the blob
            return False
        self._report.shared += 1
        return True
