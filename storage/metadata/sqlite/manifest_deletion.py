"""Deletes a manifest and all its tags (`ManifestDeletion`, `delete_manifest`).

A manifest can have millions of tags, and all other changes of all processes wait for a transaction. So the tags of such
a manifest are deleted in *portions*, each in a transaction of its own. The last transaction deletes the remaining tags
and the manifest. If the process dies between two portions, the manifest is still there and has fewer tags.

Each function that takes `db` runs inside a transaction on this connection. `by` is the client for which the manifest is
deleted, `now` the time in seconds since 1970. `repo` is the name of a repository, `repository` its row id.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import apsw

from storage.content import Actor
from storage.data_dir.reserve import ReserveUse
from storage.errors import ManifestUnknown, StorageFull
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.access.audit_table import record_content
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep import deleted_manifests, event_tables
from storage.metadata.sqlite.upkeep.damage_changes import forget_manifest
from storage.metadata.sqlite.upkeep.sqlite_pulls import delete_pulls
from storage.names import Digest, RepositoryName
from storage.outbox import EventAction
from storage.tag_rules import IsImmutable, immutable_delete_denied, nothing_immutable

MAX_TAGS_PER_TRANSACTION: Final = 500
"""Largest number of tags that one transaction deletes. This takes about 5 ms, or 50 ms if a webhook gets an event for
each tag. Other changes wait that long."""
_MAX_TAGS_WITHOUT_LOCK: Final = 64
"""A manifest with more tags than this is deleted while no other such manifest is deleted in the process. Otherwise
hundreds of deletions could share one transaction, which would take long. One push sets up to 64 tags, too."""
_FIRST_TAGS: Final = """
SELECT name FROM tag INDEXED BY tag_manifest WHERE manifest = ?1 AND repository = ?2 ORDER BY name LIMIT ?3"""
_RECORD_DELETED_TAGS: Final = """
INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent)
SELECT ?1, value, NULL, ?3, ?4, ?5, ?6, ?7 FROM json_each(?2)"""
_DELETE_TAGS: Final = "DELETE FROM tag WHERE repository = ? AND name IN (SELECT value FROM json_each(?))"
_TAGS_NEEDING_MANIFEST: Final = """
WITH RECURSIVE needing (id, repository, digest) AS (
  SELECT id, repository, digest FROM manifest WHERE id = ?
  UNION
  SELECT m.id, m.repository, m.digest
    FROM needing n JOIN manifest_child c ON c.repository = n.repository AND c.digest = n.digest
    JOIN manifest m ON m.id = c.manifest)
SELECT t.name FROM needing n CROSS JOIN tag t ON t.manifest = n.id"""
"""Finds the tags of a manifest, and the tags of all indexes that contain it, directly or through other indexes. With
CROSS JOIN, SQLite does not read all tags of the store."""
_QUEUE_UNREFERENCED_BLOBS: Final = """
INSERT INTO collect_queue (repository, digest, since)
SELECT ?1, g.digest, ?3 FROM manifest_blob g
 WHERE g.manifest = ?2
   AND NOT EXISTS (SELECT 1 FROM manifest_blob o
                    WHERE o.repository = ?1 AND o.digest = g.digest AND o.manifest <> ?2)
    ON CONFLICT (repository, digest) DO UPDATE SET since = excluded.since"""
"""Queues for garbage collection the blobs to which only this manifest of the repository refers."""

log = logging.getLogger("storage.metadata")


@dataclass(frozen=True, slots=True)
class _Target:
    """The manifest to delete: its repository and the row ids of both."""

    repository: int
    repo: RepositoryName
    manifest_id: int
    digest: Digest

    @classmethod
    def find(cls, db: apsw.Connection, repo: RepositoryName, digest: Digest) -> _Target:
        """Raises NameUnknown if there is no such repository, ManifestUnknown if it has no such manifest."""
        repository = lookups.repository_id(db, repo)
        row_id = db.execute("SELECT id FROM manifest WHERE repository = ? AND digest = ?", (repository, digest)).get
        if row_id is None:
            raise ManifestUnknown(f"{repo} has no manifest {digest}")
        return cls(repository, repo, int(row_id), digest)

    def first_tags(self, db: apsw.Connection, limit: int) -> list[str]:
        """Returns the names of at most `limit` tags of the manifest."""
        rows: list[Any] = db.execute(_FIRST_TAGS, (self.manifest_id, self.repository, limit)).fetchall()
        return [name for (name,) in rows]


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
        self._is_immutable = is_immutable
        self._is_checked = False
        """Whether `_check` has found no immutable tag."""

    async def run(
        self,
        writer: CommitThread | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        lock: asyncio.Lock,
        *,
        restorable: bool,
    ) -> None:
        """Deletes the manifest and all its tags. `lock`: held while a manifest with many tags is deleted. `restorable`:
        keeps the manifest, so that it can be put back, unless the disk is too full. A cancellation can leave the
        manifest with fewer tags. Raises NameUnknown if there is no such repository, ManifestUnknown if it has no such
        manifest, Denied if an immutable tag needs the manifest, StorageFull, StorageFailed."""
        if await self._run_step(writer, restorable):
            return
        async with lock:
            await scans.run(self._check)
            while not await self._run_step(writer, restorable):
                pass  # between two steps, the thread makes other changes

    async def _run_step(self, writer: CommitThread | ImmutableDatabase, restorable: bool) -> bool:
        """Runs `_step` in a transaction. If the disk has no space to keep the manifest, does not keep it."""
        try:
            return await writer.run(lambda db: self._step(db, restorable), reserve_use=ReserveUse.ALL)
        except StorageFull:
            if not restorable:
                raise
            log.warning(
                "the disk is too full to keep the deleted manifest %s of %s; it cannot be put back",
                self._digest,
                self._repo,
            )
            return await writer.run(lambda db: self._step(db, False), reserve_use=ReserveUse.ALL)

    def _step(self, db: apsw.Connection, restorable: bool) -> bool:
        """Before `_check` was called: deletes the manifest and returns True, unless it has more than
        `_MAX_TAGS_WITHOUT_LOCK` tags; then only returns False. After `_check`: deletes the manifest and returns True,
        unless it has more than `MAX_TAGS_PER_TRANSACTION` tags; then deletes this number of tags and returns False."""
        # The time is read inside the transaction, so that later deletions have later times. Garbage collection keeps a
        # blob for the grace period after the last deletion of a manifest that refers to it. So it keeps the blob at
        # least as long as it keeps every deleted manifest that refers to the blob.
        now = self._clock()
        target = _Target.find(db, self._repo, self._digest)
        max_tags = MAX_TAGS_PER_TRANSACTION if self._is_checked else _MAX_TAGS_WITHOUT_LOCK
        tags = target.first_tags(db, max_tags + 1)
        if len(tags) <= max_tags:
            _delete(db, target, tags, self._by, now, restorable, self._is_immutable, EventAction.DELETE)
            return True
        if self._is_checked:
            for tag in tags:  # such a tag was made after the check
                if self._is_immutable(tag):
                    raise immutable_delete_denied(self._repo, tag, self._digest)
            _delete_tags(db, target, tags[:max_tags], self._by, now, EventAction.DELETE)
        return False

    def _check(self, db: apsw.Connection) -> None:
        """Raises Denied if an immutable tag needs the manifest; then none of its tags has been deleted. Only reads, but
        takes long if there are very many tags."""
        if self._is_immutable is not nothing_immutable:
            _check_not_needed(db, _Target.find(db, self._repo, self._digest), self._is_immutable)
        self._is_checked = True


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
    target = _Target.find(db, repo, digest)
    _delete(db, target, target.first_tags(db, -1), by, now, restorable, nothing_immutable, action)


def delete_excess_tags(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, by: Actor, now: float, action: EventAction
) -> bool:
    """Deletes a portion of the manifest's tags if the manifest has more than `MAX_TAGS_PER_TRANSACTION`. Returns
    whether it did so; then the caller calls this again, in another transaction, before it deletes the manifest."""
    target = _Target.find(db, repo, digest)
    tags = target.first_tags(db, MAX_TAGS_PER_TRANSACTION + 1)
    if len(tags) <= MAX_TAGS_PER_TRANSACTION:
        return False
    _delete_tags(db, target, tags[:MAX_TAGS_PER_TRANSACTION], by, now, action)
    return True


def _delete(
    db: apsw.Connection,
    target: _Target,
    tags: Sequence[str],
    by: Actor,
    now: float,
    restorable: bool,
    is_immutable: IsImmutable,
    action: EventAction,
) -> None:
    """Deletes the manifest and `tags`, which are all its tags. Raises Denied if an immutable tag needs the manifest."""
    repository, manifest_id = target.repository, target.manifest_id
    if is_immutable is not nothing_immutable:
        _check_not_needed(db, target, is_immutable)
    if restorable:
        deleted_manifests.keep(db, manifest_id, now)
    _delete_tags(db, target, tags, by, now, action)
    event_tables.add_deleted_manifest(db, action, target.repo, manifest_id, by, now)
    db.execute(_QUEUE_UNREFERENCED_BLOBS, (repository, manifest_id, now))
    db.execute("DELETE FROM manifest_blob WHERE manifest = ?", (manifest_id,))
    db.execute("DELETE FROM manifest_child WHERE manifest = ?", (manifest_id,))
    delete_pulls(db, manifest_id)
    db.execute("DELETE FROM manifest WHERE id = ?", (manifest_id,))
    forget_manifest(db, repository, target.digest)
    db.execute("UPDATE repository SET manifests = manifests - 1 WHERE id = ?", (repository,))
    record_content(db, by, now, "manifest.delete", target.repo, target.digest)


def _delete_tags(
    db: apsw.Connection, target: _Target, tags: Sequence[str], by: Actor, now: float, action: EventAction
) -> None:
    """Deletes `tags`, which point at the manifest, and records this in the tag history and in events."""
    if not tags:
        return
    repository, names = target.repository, json.dumps(tags)
    event_tables.add_deleted_tags(db, action, target.repo, target.manifest_id, tags, by, now)
    db.execute(_RECORD_DELETED_TAGS, (repository, names, now, by.name, by.address, by.request_id, by.user_agent))
    db.execute(_DELETE_TAGS, (repository, names))


def _check_not_needed(db: apsw.Connection, target: _Target, is_immutable: IsImmutable) -> None:
    """Raises Denied if an immutable tag points at the manifest, or at an index that contains it."""
    rows: list[Any] = db.execute(_TAGS_NEEDING_MANIFEST, (target.manifest_id,)).fetchall()
    for (tag,) in rows:
        if is_immutable(tag):
            raise immutable_delete_denied(target.repo, tag, target.digest)
