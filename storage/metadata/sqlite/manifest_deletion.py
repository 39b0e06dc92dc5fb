"""Deletes a manifest and all its tags (`ManifestDeletion`, `delete_manifest`).

A manifest can have millions of tags, and all other changes of all processes wait for a transaction. So the tags of such
a manifest are deleted in *portions*, each in a transaction of its own. The last transaction deletes the remaining tags
and the manifest. If the process dies between two portions, the manifest is still there and has fewer tags.

A tag *needs* a manifest if it points at the manifest, or at an index that contains the manifest, directly or through
other indexes. A manifest that an immutable tag needs is not deleted.

Each function that takes `db` runs inside a transaction on this connection. `by` is the client for which the manifest is
deleted, `now` the time in seconds since 1970. `repo` is the name of a repository, `repository` its row id.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

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
"""A manifest that more than this number of tags need is deleted while the process holds a lock, so that it deletes only
one such manifest at a time. Otherwise hundreds of deletions could share one transaction, which would take long. The
number is that of the tags that one push can set."""
_MAX_CHANGED_TAGS: Final = 1000
"""Largest number of changes of tags that one transaction checks."""
_FIRST_TAGS: Final = """
SELECT name FROM tag INDEXED BY tag_manifest WHERE manifest = ?1 AND repository = ?2 ORDER BY name LIMIT ?3"""
_RECORD_DELETED_TAGS: Final = """
INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent)
SELECT ?1, value, NULL, ?3, ?4, ?5, ?6, ?7 FROM json_each(?2)"""
_SET_TAGS: Final = """
SELECT tag FROM tag_history NOT INDEXED WHERE id > ? AND repository = ? AND digest IS NOT NULL LIMIT ?"""
"""NOT INDEXED makes SQLite read only the entries with ids above the first parameter."""
_DELETE_TAGS: Final = "DELETE FROM tag WHERE repository = ? AND name IN (SELECT value FROM json_each(?))"
_TAGS_NEEDING_MANIFEST: Final = """
WITH RECURSIVE needing (id, repository, digest) AS (
  SELECT id, repository, digest FROM manifest WHERE id = ?
  UNION
  SELECT m.id, m.repository, m.digest
    FROM needing n JOIN manifest_child c ON c.repository = n.repository AND c.digest = n.digest
    JOIN manifest m ON m.id = c.manifest)
SELECT t.name FROM needing n CROSS JOIN tag t ON t.manifest = n.id"""
"""Finds the tags that need a manifest. With CROSS JOIN, SQLite does not read all tags of the store."""
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
        """Finds the manifest. Raises NameUnknown if there is no such repository, ManifestUnknown if it has no such
        manifest."""
        repository = lookups.repository_id(db, repo)
        row_id = db.execute("SELECT id FROM manifest WHERE repository = ? AND digest = ?", (repository, digest)).get
        if row_id is None:
            raise ManifestUnknown(f"{repo} has no manifest {digest}")
        return cls(repository, repo, int(row_id), digest)

    def first_tags(self, db: apsw.Connection, limit: int) -> list[str]:
        """Returns the names of at most `limit` tags of the manifest."""
        rows: list[Any] = db.execute(_FIRST_TAGS, (self.manifest_id, self.repository, limit)).fetchall()
        return [name for (name,) in rows]


class _StepResult(NamedTuple):
    """The result of a step of a deletion. `checked_to`: see `ManifestDeletion._checked_to`."""

    is_deleted: bool
    checked_to: int | None


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
        self._checked_to: int | None = None
        """Id of an entry of the tag history: up to this entry, no immutable tag needs the manifest. None: not known."""

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
            while True:  # between two steps, the thread makes other changes
                if self._checked_to is None:
                    self._checked_to = await scans.run(self._check)
                if await self._run_step(writer, restorable):
                    return

    async def _run_step(self, writer: CommitThread | ImmutableDatabase, restorable: bool) -> bool:
        """Runs `_step` in a transaction, and returns whether the manifest is deleted. If the disk has no space to keep
        the manifest, does not keep it."""
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
        # The thread may call `_step` several times until the commit, so it must not set this attribute itself.
        self._checked_to = result.checked_to
        return result.is_deleted

    def _step(self, db: apsw.Connection, restorable: bool) -> _StepResult:
        """Deletes the manifest, or some of its tags if it has too many for one transaction. Deletes nothing if the tags
        that need the manifest have to be checked first. Raises Denied if one of them is immutable."""
        # The time is read inside the transaction, so that later deletions have later times. Garbage collection keeps a
        # blob for the grace period after the last deletion of a manifest that refers to it. So it keeps the blob at
        # least as long as it keeps every deleted manifest that refers to the blob.
        now = self._clock()
        target = _Target.find(db, self._repo, self._digest)
        is_checked = self._checked_to is not None
        max_tags = MAX_TAGS_PER_TRANSACTION if is_checked else _MAX_TAGS_WITHOUT_LOCK
        tags = target.first_tags(db, max_tags + 1)
        is_last = len(tags) <= max_tags
        if not (self._check_changes(db, target) if is_checked else is_last and self._check_few(db, target)):
            return _StepResult(is_deleted=False, checked_to=None)
        if is_last:
            _delete(db, target, tags, self._by, now, restorable, EventAction.DELETE)
        else:
            _delete_tags(db, target, tags[:max_tags], self._by, now, EventAction.DELETE)
        return _StepResult(is_deleted=is_last, checked_to=_newest_entry(db))

    def _check(self, db: apsw.Connection) -> int:
        """Checks all tags that need the manifest. Returns the id of the newest entry of the tag history that was there
        before. Takes long if there are very many tags, so it must not run in a transaction that changes something.
        Raises NameUnknown, ManifestUnknown, Denied."""
        newest_entry = _newest_entry(db)
        if self._is_immutable is not nothing_immutable:
            self._refuse_immutable(db, _TAGS_NEEDING_MANIFEST, _Target.find(db, self._repo, self._digest).manifest_id)
        return newest_entry

    def _check_few(self, db: apsw.Connection, target: _Target) -> bool:
        """Checks the tags that need the manifest. Returns False if there are too many. Raises Denied."""
        if self._is_immutable is nothing_immutable:
            return True
        sql = f"{_TAGS_NEEDING_MANIFEST} LIMIT ?"
        return self._refuse_immutable(db, sql, target.manifest_id, _MAX_TAGS_WITHOUT_LOCK + 1) <= _MAX_TAGS_WITHOUT_LOCK

    def _check_changes(self, db: apsw.Connection, target: _Target) -> bool:
        """Checks the tags that were set after the entry `_checked_to` of the tag history. Older tags need no second
        check: an immutable tag keeps all manifests below its index, so no push can add a missing index between such a
        tag and this manifest. Returns False if too many tags were set. Raises Denied."""
        if self._is_immutable is nothing_immutable:
            return True
        rows: list[Any] = db.execute(_SET_TAGS, (self._checked_to, target.repository, _MAX_CHANGED_TAGS + 1)).fetchall()
        immutable_tags = [tag for (tag,) in rows if self._is_immutable(tag)]
        if immutable_tags:
            sql = f"{_TAGS_NEEDING_MANIFEST} WHERE t.name IN (SELECT value FROM json_each(?))"
            self._refuse_immutable(db, sql, target.manifest_id, json.dumps(immutable_tags))
        return len(rows) <= _MAX_CHANGED_TAGS

    def _refuse_immutable(self, db: apsw.Connection, sql: str, *parameters: object) -> int:
        """Raises Denied if a tag that the statement finds is immutable. Otherwise returns the number of these tags."""
        count, cursor = 0, db.execute(sql, parameters)
        try:
            for (tag,) in cursor:
                if self._is_immutable(tag):
                    raise immutable_delete_denied(self._repo, tag, self._digest)
                count += 1
        finally:
            cursor.close()
        return count


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
    all_tags = target.first_tags(db, -1)  # -1: no limit
    _delete(db, target, all_tags, by, now, restorable, action)


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
    action: EventAction,
) -> None:
    """Deletes the manifest and `tags`, which are all its tags."""
    repository, manifest_id = target.repository, target.manifest_id
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


def _newest_entry(db: apsw.Connection) -> int:
    """Returns the highest id in the tag history; 0 if it is empty."""
    return int(db.execute("SELECT coalesce(max(id), 0) FROM tag_history").get)
