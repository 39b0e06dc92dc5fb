"""Deletes a manifest and all its tags (`ManifestDeletion`, `delete_manifest`).

While a transaction runs, all other changes in all processes wait. So the transactions are short. If a manifest has too
many tags for one transaction, its tags are deleted in *portions*, each in a transaction of its own. The last
transaction deletes the remaining tags and the manifest. If the process dies between two portions, the manifest is still
stored and has fewer tags.

A tag *needs* a manifest if it points at the manifest, or at an index that contains the manifest, directly or through
other indexes. A manifest that an immutable tag needs is not deleted (`storage.metadata.sqlite.needing_tags`).

Each function that takes `db` runs inside a transaction on this connection. `by` is the actor that the tag history, the
events and the audit log name. `now` is the time in seconds since 1970. `repo` is the name of a repository, and
`repository_id` is its row id.
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
"""Largest number of tags that one transaction deletes. Such a transaction takes about 5 ms, or 50 ms if a webhook gets
an event for each tag."""
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
"""Adds the blobs of a manifest to the queue of garbage collection, except blobs to which another manifest of the
repository refers."""

log = logging.getLogger("storage.metadata")


class _StepResult(NamedTuple):
    """The result of one transaction. `is_deleted`: whether the transaction deleted the manifest. `checked_to`: the new
    value of `ManifestDeletion._checked_to`, an id in the tag history or None."""

    is_deleted: bool
    checked_to: int | None


def _denied(target: TargetManifest, tag: str) -> Denied:
    """Returns the error for the deletion of a manifest that an immutable tag needs."""
    return immutable_delete_denied(target.repo, tag, target.digest)


class ManifestDeletion:
    """Deletes one manifest at the request of a client (`run`)."""

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
        self._tags_check = NeedingTagsCheck(is_immutable, _denied)
        self._checked_to: int | None = None
        """Id of the entry of the tag history that was the newest at the last check. The check found no immutable tag
        that needs the manifest. Tags that were set after this entry are not checked yet. None:
        `NeedingTagsCheck.check_all` must run next if the manifest has many tags."""

    async def run(
        self,
        writer: CommitThread | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        lock: asyncio.Lock,
        *,
        restorable: bool,
    ) -> None:
        """Deletes the manifest and all its tags. A cancellation can leave the manifest with fewer tags.

        - `writer` runs the transactions. An `ImmutableDatabase` refuses every change with StorageFull: the disk was too
          full to open the database for changes.
        - `scans` checks the tags of a manifest that many tags need.
        - `lock` is held while a manifest that many tags need is deleted.
        - `restorable`: whether to store a copy, from which the manifest can be put back. If the disk is too full for
          the copy, deletes the manifest without storing a copy.

        Raises NameUnknown if there is no such repository, ManifestUnknown if the repository has no such manifest,
        Denied if an immutable tag needs the manifest, StorageFull, StorageFailed."""
        if await self._run_step(writer, restorable):
            return
        async with lock:
            while True:  # other changes may run between two transactions
                if self._checked_to is None:
                    self._checked_to = await scans.run(
                        lambda db: self._tags_check.check_all(db, self._repo, self._digest)
                    )
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
        """Deletes the manifest and its tags. If the manifest has too many tags for one transaction, deletes only a
        portion of the tags. Deletes nothing if `NeedingTagsCheck.check_all` has to run first. Raises Denied if an
        immutable tag needs the manifest."""
        # The time is read inside the transaction, so that a later deletion does not get an earlier time. Otherwise, if
        # two deleted manifests share a blob, the later deletion could add the blob to the queue of garbage collection
        # with the earlier time. The blob could then be removed while the copy of the other manifest is still kept.
        now = self._clock()
        target = TargetManifest.find(db, self._repo, self._digest)
        is_checked = self._checked_to is not None
        # If no check has run, and the manifest has more than `MAX_TAGS_WITHOUT_LOCK` tags, this step deletes nothing.
        # `run` then takes the lock and calls `check_all` before the next step.
        max_tags = MAX_TAGS_PER_TRANSACTION if is_checked else MAX_TAGS_WITHOUT_LOCK
        tags = _first_tags(db, target, max_tags + 1)
        is_last = len(tags) <= max_tags
        # `check_in_transaction` returns False if there are too many tags to check in one transaction.
        if not ((is_last or is_checked) and self._tags_check.check_in_transaction(db, target, self._checked_to)):
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
    """Deletes the manifest and all its tags. The caller makes sure that the manifest has only a few tags, and that no
    immutable tag needs the manifest. Adds the manifest's blobs to the queue of garbage collection, except blobs to
    which another manifest of the repository refers. `restorable`: whether to keep a copy in the table
    `deleted_manifest`, from which the manifest can be put back. `action`: the action that the events name. Raises
    NameUnknown if there is no such repository, ManifestUnknown if the repository has no such manifest."""
    target = TargetManifest.find(db, repo, digest)
    all_tags = _first_tags(db, target, -1)
    _delete(db, target, all_tags, by, now, restorable, action)


def delete_tag_portion(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, by: Actor, now: float, action: EventAction
) -> bool:
    """If the manifest has more than `MAX_TAGS_PER_TRANSACTION` tags, deletes this number of them and returns True.
    Otherwise deletes nothing and returns False. Before `delete_manifest`, call this function in one transaction after
    the other until it returns False. Raises NameUnknown, ManifestUnknown."""
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
    event_tables.add_manifest_deletion(db, action, target.repo, manifest_id, by, now)
    db.execute(_QUEUE_UNREFERENCED_BLOBS, (repository_id, manifest_id, now))
    db.execute("DELETE FROM manifest_blob WHERE manifest = ?", (manifest_id,))
    db.execute("DELETE FROM manifest_child WHERE manifest = ?", (manifest_id,))
    delete_pull_row(db, manifest_id)
    db.execute("DELETE FROM manifest WHERE id = ?", (manifest_id,))
    damage_changes.delete_manifest_damage(db, repository_id, target.digest)
    db.execute("UPDATE repository SET manifests = manifests - 1 WHERE id = ?", (repository_id,))
    record_content(db, by, now, "manifest.delete", target.repo, target.digest)


def _delete_tags(
    db: apsw.Connection, target: TargetManifest, tags: Sequence[str], by: Actor, now: float, action: EventAction
) -> None:
    """Deletes `tags`, which point at the manifest, and records this in the tag history and in events."""
    if not tags:
        return
    repository_id, names = target.repository_id, json.dumps(tags)
    event_tables.add_deletions_of_all_tags(db, action, target.repo, target.manifest_id, tags, by, now)
    db.execute(_RECORD_DELETED_TAGS, (repository_id, names, now, by.name, by.address, by.request_id, by.user_agent))
    db.execute(_DELETE_TAGS, (repository_id, names))


def _first_tags(db: apsw.Connection, target: TargetManifest, limit: int) -> list[str]:
    """Returns the names of at most `limit` tags of the manifest. A negative `limit` means all tags."""
    rows: list[Any] = db.execute(_FIRST_TAGS, (target.manifest_id, target.repository_id, limit)).fetchall()
    return [name for (name,) in rows]
