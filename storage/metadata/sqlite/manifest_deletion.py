"""Deletes a manifest and all its tags (`ManifestDeletion`, `delete_manifest`).

A manifest can have millions of tags, and while a transaction runs, all other changes of all processes wait. The tags
of such a manifest are therefore deleted in *portions*, each in a transaction of its own. The last transaction deletes
the remaining tags and the manifest. If the process dies between two portions, the manifest is still there and has fewer
tags.

A tag *needs* a manifest if it points at the manifest, or at an index that contains the manifest, directly or through
other indexes. A manifest that an immutable tag needs is not deleted (`storage.metadata.sqlite.needing_tags`).

Each function that takes `db` runs inside a transaction on this connection. `by` is the client for which the manifest is
deleted, `now` the time in seconds since 1970. `repo` is the name of a repository, `repository_id` its row id.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import apsw

from storage.content import Actor
from storage.data_dir.reserve import ReserveUse
from storage.errors import Denied, StorageFull
from storage.metadata.sqlite.access.audit_table import record_content
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.needing_tags import MAX_TAGS_WITHOUT_LOCK, NeedingTagsCheck, TargetManifest, last_entry_id
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep import damage_changes, deleted_manifests, event_tables
from storage.metadata.sqlite.upkeep.sqlite_pulls import delete_pull_row
from storage.names import Digest, RepositoryName
from storage.outbox import EventAction
from storage.tag_rules import IsImmutable, immutable_delete_denied, nothing_immutable

MAX_TAGS_PER_TRANSACTION: Final = 500
"""Largest number of tags that one transaction deletes. The transaction takes about 5 ms, or 50 ms if a webhook gets an
event for each tag. Other changes wait meanwhile."""
_FIRST_TAGS: Final = """
SELECT name FROM tag INDEXED BY tag_manifest WHERE manifest = ?1 AND repository = ?2 ORDER BY name LIMIT ?3"""
_RECORD_DELETED_TAGS: Final = """
INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent)
SELECT ?1, value, NULL, ?3, ?4, ?5, ?6, ?7 FROM json_each(?2)"""
_DELETE_TAGS: Final = "DELETE FROM tag WHERE repository = ? AND name IN (SELECT value FROM json_each(?))"
_QUEUE_UNREFERENCED_BLOBS: Final = """
INSERT INTO collect_queue (repository, digest, since)
SELECT ?1, own.digest, ?3 FROM manifest_blob own
 WHERE own.manifest = ?2
   AND NOT EXISTS (SELECT 1 FROM manifest_blob other
                    WHERE other.repository = ?1 AND other.digest = own.digest AND other.manifest <> ?2)
    ON CONFLICT (repository, digest) DO UPDATE SET since = excluded.since"""
"""Queues for garbage collection the blobs to which only this manifest of the repository refers."""

log = logging.getLogger("storage.metadata")


class _StepResult(NamedTuple):
    """The result of a step, that is, of one transaction of a deletion. `checked_to`: see
    `ManifestDeletion._checked_to`."""

    is_deleted: bool
    checked_to: int | None


def _denied(target: TargetManifest, tag: str) -> Denied:
    """Returns the error for the deletion of a manifest that an immutable tag needs."""
    return immutable_delete_denied(target.repo, tag, target.digest)


class ManifestDeletion:
    """The deletion of one manifest at the request of a client. `run` deletes it."""

    def __init__(
        self,
        repo: RepositoryName,
        digest: Digest,
        by: Actor,
        clock: Callable[[], float],
        is_immutable: IsImmutable = nothing_immutable,
    ) -> None:
        """`clock` returns the time in seconds since 1970."""
        self._repo = repo
        self._digest = digest
        self._by = by
        self._clock = clock
        self._check = NeedingTagsCheck(is_immutable, _denied)
        self._checked_to: int | None = None
        """Id of the newest entry of the tag history at the last check, which found no immutable tag that needs the
        manifest. None: `NeedingTagsCheck.check_all` has not run, or must run again."""

    async def run(
        self,
        writer: CommitThread | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        lock: asyncio.Lock,
        *,
        restorable: bool,
    ) -> None:
        """Deletes the manifest and all its tags. `writer` runs the transactions. If the disk was too full to open the
        database for changes, `writer` is an `ImmutableDatabase`, which refuses every change with StorageFull. For a
        manifest with many tags, `scans` checks the tags, and `lock` is held during the deletion. If `restorable` is
        true, stores a copy of the manifest, from which it can be put back, unless the disk is too full for the copy. A
        cancellation can leave the manifest with fewer tags. Raises NameUnknown if there is no such repository,
        ManifestUnknown if it has no such manifest, Denied if an immutable tag needs the manifest, StorageFull,
        StorageFailed."""
        if await self._run_step(writer, restorable):
            return
        async with lock:
            while True:  # between two steps, other changes are made
                if self._checked_to is None:
                    self._checked_to = await scans.run(lambda db: self._check.check_all(db, self._repo, self._digest))
                if await self._run_step(writer, restorable):
                    return

    async def _run_step(self, writer: CommitThread | ImmutableDatabase, restorable: bool) -> bool:
        """Runs `_step` in a transaction, and returns whether the manifest is deleted. If the disk is too full for a
        copy of the manifest, runs `_step` again without storing a copy."""
        try:
            result = await writer.run(lambda db: self._step(db, restorable), reserve_use=ReserveUse.ALL)
        except StorageFull:
            if not restorable:
                raise
            log.warning(
                "the disk is too full to keep the deleted manifest %s of %s; it cannot be put back",
                self._digest,
                self._repo,
            )
            result = await writer.run(lambda db: self._step(db, False), reserve_use=ReserveUse.ALL)
        # `_step` does not set this attribute itself, because `writer` may call it several times before it commits.
        self._checked_to = result.checked_to
        return result.is_deleted

    def _step(self, db: apsw.Connection, restorable: bool) -> _StepResult:
        """Deletes the manifest, or a portion of its tags if it has too many for one transaction. Deletes nothing if
        `NeedingTagsCheck.check_all` has to run first. Raises Denied if an immutable tag needs the manifest."""
        # The time is read inside the transaction, so that a later deletion does not get an earlier time. Garbage
        # collection keeps the copy of a deleted manifest, and its blobs, for a grace period after the deletion. If two
        # deleted manifests refer to the same blob, the grace period of the blob begins with the later deletion. If that
        # deletion had an earlier time, the blob would be removed before the copy of the first manifest.
        now = self._clock()
        target = TargetManifest.find(db, self._repo, self._digest)
        is_checked = self._checked_to is not None
        max_tags = MAX_TAGS_PER_TRANSACTION if is_checked else MAX_TAGS_WITHOUT_LOCK
        tags = _first_tags(db, target, max_tags + 1)
        is_last = len(tags) <= max_tags
        # `check` raises Denied if an immutable tag needs the manifest. It returns False if there are too many tags to
        # check in one transaction. Before `check_all` has run, at most `MAX_TAGS_WITHOUT_LOCK` tags are deleted, even
        # if no tags are immutable.
        if not ((is_last or is_checked) and self._check.check_in_transaction(db, target, self._checked_to)):
            return _StepResult(is_deleted=False, checked_to=None)
        if is_last:
            _delete(db, target, tags, self._by, now, restorable, EventAction.DELETE)
        else:
            _delete_tags(db, target, tags[:max_tags], self._by, now, EventAction.DELETE)
        return _StepResult(is_deleted=is_last, checked_to=last_entry_id(db))


def delete_manifest(
    db: apsw.Connection,
    repo: RepositoryName,
    digest: Digest,
    by: Actor,
    now: float,
    *,
    restorable: bool,
    action: EventAction,
) -> None:
    """Deletes the manifest and all its tags. Queues for garbage collection the blobs to which no other manifest of the
    repository refers. `restorable`: whether to keep the manifest in the table `deleted_manifest`, so that it can be put
    back. `action`: the action that the events record. Raises NameUnknown if there is no such repository,
    ManifestUnknown if it has no such manifest. The caller makes sure that the manifest has only a few tags, and that no
    immutable tag needs it."""
    target = TargetManifest.find(db, repo, digest)
    all_tags = _first_tags(db, target, -1)
    _delete(db, target, all_tags, by, now, restorable, action)


def delete_excess_tags(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, by: Actor, now: float, action: EventAction
) -> bool:
    """Deletes a portion of the manifest's tags if the manifest has more than `MAX_TAGS_PER_TRANSACTION`. Returns
    whether it deleted tags. If so, the caller calls this function again, in another transaction, before it deletes the
    manifest."""
    target = TargetManifest.find(db, repo, digest)
    tags = _first_tags(db, target, MAX_TAGS_PER_TRANSACTION + 1)
    if len(tags) <= MAX_TAGS_PER_TRANSACTION:
        return False
    _delete_tags(db, target, tags[:MAX_TAGS_PER_TRANSACTION], by, now, action)
    return True


def _delete(
    db: apsw.Connection,
    target: TargetManifest,
    tags: Sequence[str],
    by: Actor,
    now: float,
    restorable: bool,
    action: EventAction,
) -> None:
    """Deletes the manifest and `tags`, which are all its tags."""
    repository_id, manifest_id = target.repository_id, target.manifest_id
    if restorable:
        deleted_manifests.add(db, manifest_id, now)
    _delete_tags(db, target, tags, by, now, action)
    event_tables.add_deleted_manifest(db, action, target.repo, manifest_id, by, now)
    db.execute(_QUEUE_UNREFERENCED_BLOBS, (repository_id, manifest_id, now))
    db.execute("DELETE FROM manifest_blob WHERE manifest = ?", (manifest_id,))
    db.execute("DELETE FROM manifest_child WHERE manifest = ?", (manifest_id,))
    delete_pull_row(db, manifest_id)
    db.execute("DELETE FROM manifest WHERE id = ?", (manifest_id,))
    damage_changes.forget_manifest(db, repository_id, target.digest)
    db.execute("UPDATE repository SET manifests = manifests - 1 WHERE id = ?", (repository_id,))
    record_content(db, by, now, "manifest.delete", target.repo, target.digest)


def _delete_tags(
    db: apsw.Connection, target: TargetManifest, tags: Sequence[str], by: Actor, now: float, action: EventAction
) -> None:
    """Deletes `tags`, which point at the manifest, and records this in the tag history and in events."""
    if not tags:
        return
    repository_id, names = target.repository_id, json.dumps(tags)
    event_tables.add_deleted_tags(db, action, target.repo, target.manifest_id, tags, by, now)
    db.execute(_RECORD_DELETED_TAGS, (repository_id, names, now, by.name, by.address, by.request_id, by.user_agent))
    db.execute(_DELETE_TAGS, (repository_id, names))


def _first_tags(db: apsw.Connection, target: TargetManifest, limit: int) -> list[str]:
    """Returns the names of at most `limit` tags of the manifest. A negative `limit` means all tags."""
    rows: list[Any] = db.execute(_FIRST_TAGS, (target.manifest_id, target.repository_id, limit)).fetchall()
    return [name for (name,) in rows]
