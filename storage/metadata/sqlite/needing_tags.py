"""Checks whether an immutable tag needs a manifest (`NeedingTagsCheck`), before the manifest is deleted or gets another
media type.

A tag *needs* a manifest if it points at the manifest, or at an index that contains the manifest, directly or through
other indexes.

A transaction checks only a few tags, because all other changes of all processes wait for it. If many tags need the
manifest, `NeedingTagsCheck.check_all` checks them before the transaction. The transaction then checks only the tags
that were set after `check_all` began.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import apsw

from storage.errors import Denied, ManifestUnknown
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.names import Digest, RepositoryName
from storage.tag_rules import IsImmutable, nothing_immutable

MAX_TAGS_WITHOUT_LOCK: Final = 64
"""If more than this number of tags need a manifest, or more than this number of indexes contain it, the process holds a
lock while it changes the manifest. The commit thread puts waiting changes together into one transaction. Without the
lock, one transaction could contain the changes of many such manifests, and would take long. One push sets at most this
number of tags (`registry.http.exchange.RequestLimits.tags_per_put`)."""
_MAX_CHANGED_TAGS: Final = 1000
"""Largest number of changes of tags that one transaction checks."""
_TAGS_SET_AFTER_ENTRY: Final = """
SELECT tag FROM tag_history NOT INDEXED WHERE id > ? AND repository = ? AND digest IS NOT NULL LIMIT ?"""
"""Finds the tags of a repository that were set after a given entry of the tag history. An entry without a digest
records the deletion of a tag. With NOT INDEXED, SQLite finds the given entry by its id, and reads only the entries
after it."""
_TAGS_NEEDING_MANIFEST: Final = """
WITH RECURSIVE needing (id, repository, digest) AS (
  SELECT id, repository, digest FROM manifest WHERE id = ?
  UNION
  SELECT m.id, m.repository, m.digest
    FROM needing n JOIN manifest_child c ON c.repository = n.repository AND c.digest = n.digest
    JOIN manifest m ON m.id = c.manifest)
SELECT t.name FROM needing n CROSS JOIN tag t ON t.manifest = n.id"""
"""Finds the tags that need a manifest. CROSS JOIN makes SQLite start with the manifests in `needing`, and not with all
tags of the store."""
_INDEXES_OF_MANIFEST: Final = """
SELECT m.id, m.digest FROM manifest_child c JOIN manifest m ON m.id = c.manifest
 WHERE c.repository = ? AND c.digest = ? LIMIT ?"""


@dataclass(frozen=True, slots=True)
class TargetManifest:
    """A manifest that a caller wants to change. `repository_id` and `manifest_id` are row ids. `media_type` is the
    stored media type."""

    repository_id: int
    repo: RepositoryName
    manifest_id: int
    digest: Digest
    media_type: str

    @classmethod
    def find(cls, db: apsw.Connection, repo: RepositoryName, digest: Digest) -> TargetManifest:
        """Finds the manifest. Raises NameUnknown if there is no such repository, ManifestUnknown if it has no such
        manifest."""
        repository_id = lookups.repository_id(db, repo)
        row: Any = db.execute(
            "SELECT id, media_type FROM manifest WHERE repository = ? AND digest = ?", (repository_id, digest)
        ).get
        if row is None:
            raise ManifestUnknown(f"{repo} has no manifest {digest}")
        manifest_id, media_type = row
        return cls(repository_id, repo, manifest_id, digest, media_type)


@dataclass(frozen=True, slots=True)
class NeedingTagsCheck:
    """Checks the tags that need a manifest, and refuses a change of the manifest if one of these tags is immutable.
    `make_error` returns the error for the manifest and the immutable tag."""

    is_immutable: IsImmutable
    make_error: Callable[[TargetManifest, str], Denied]

    def check_all(self, db: apsw.Connection, repo: RepositoryName, digest: Digest) -> int:
        """Checks all tags that need the manifest. Returns the id of the newest entry in the tag history when the check
        begins. The check may miss tags that are set after this entry. Must not run in a transaction that changes
        something, because the check can take long. Raises NameUnknown and ManifestUnknown. Raises Denied if an
        immutable tag needs the manifest."""
        last_id = last_entry_id(db)
        if self.is_immutable is not nothing_immutable:
            target = TargetManifest.find(db, repo, digest)
            self._refuse_immutable(db, target, _TAGS_NEEDING_MANIFEST, target.manifest_id)
        return last_id

    def check_in_transaction(self, db: apsw.Connection, target: TargetManifest, checked_to: int | None) -> bool:
        """Checks the tags in the transaction of the change. `checked_to` is the result of `check_all`, or None if
        `check_all` was not called. Returns False if there are too many tags to check: the caller must then call
        `check_all` (again). Raises Denied if an immutable tag needs the manifest."""
        if self.is_immutable is nothing_immutable:
            return True
        return self._check_few(db, target) if checked_to is None else self._check_changes(db, target, checked_to)

    def _check_few(self, db: apsw.Connection, target: TargetManifest) -> bool:
        """Checks the tags that need the manifest. Returns False if more than `MAX_TAGS_WITHOUT_LOCK` tags need the
        manifest, or more than this number of indexes contain it. Raises Denied if an immutable tag needs the manifest.

        Does not use `_TAGS_NEEDING_MANIFEST`: even with a LIMIT, SQLite would read all indexes that contain the
        manifest."""
        limit = MAX_TAGS_WITHOUT_LOCK + 1
        tag_count, seen_ids, unread = 0, {target.manifest_id}, [(target.manifest_id, target.digest)]
        while unread:
            manifest_id, digest = unread.pop()
            tag_count += self._refuse_immutable(
                db, target, "SELECT name FROM tag WHERE manifest = ? LIMIT ?", manifest_id, limit
            )
            rows: list[Any] = db.execute(_INDEXES_OF_MANIFEST, (target.repository_id, digest, limit)).fetchall()
            new_indexes = [(index_id, index_digest) for index_id, index_digest in rows if index_id not in seen_ids]
            seen_ids.update(index_id for index_id, _ in new_indexes)
            unread += new_indexes
            if tag_count > MAX_TAGS_WITHOUT_LOCK or len(seen_ids) > limit:
                return False
        return True

    def _check_changes(self, db: apsw.Connection, target: TargetManifest, checked_to: int) -> bool:
        """Checks the tags that were set after the entry `checked_to` of the tag history. Returns False if more than
        `_MAX_CHANGED_TAGS` tags were set. Raises Denied if an immutable tag among them needs the manifest.

        Does not check tags that were set earlier. `check_all` has found that none of their immutable tags needs the
        manifest. None of these immutable tags begins to need the manifest later: for this, a client would have to push
        an index that the tag needs and that is missing. But all indexes that an immutable tag needs are stored, and
        clients cannot delete them."""
        rows: list[Any] = db.execute(
            _TAGS_SET_AFTER_ENTRY, (checked_to, target.repository_id, _MAX_CHANGED_TAGS + 1)
        ).fetchall()
        immutable_tags = [tag for (tag,) in rows if self.is_immutable(tag)]
        if immutable_tags:
            sql = f"{_TAGS_NEEDING_MANIFEST} WHERE t.name IN (SELECT value FROM json_each(?))"
            self._refuse_immutable(db, target, sql, target.manifest_id, json.dumps(immutable_tags))
        return len(rows) <= _MAX_CHANGED_TAGS

    def _refuse_immutable(self, db: apsw.Connection, target: TargetManifest, sql: str, *values: int | str) -> int:
        """Runs the statement `sql`, which finds tags, with the parameters `values`. Raises Denied if one of the tags is
        immutable. Otherwise returns the number of tags."""
        count, cursor = 0, db.execute(sql, values)
        try:
            for (tag,) in cursor:
                if self.is_immutable(tag):
                    raise self.make_error(target, tag)
                count += 1
        finally:
            cursor.close()
        return count


class CheckedChange(Protocol):
    """A change of a manifest, to be called in a transaction."""

    def __call__(self, db: apsw.Connection, /, *, checked_to: int | None) -> bool:
        """If the change needs a check of tags, calls `NeedingTagsCheck.check_in_transaction` with `checked_to`.

        - If `check_in_transaction` returns False, because there are too many tags to check, changes nothing and
          returns False.
        - Otherwise makes the change and returns True."""
        ...


async def run_checked(
    change: CheckedChange,
    check_all: Callable[[apsw.Connection], int],
    writer: CommitThread | ImmutableDatabase,
    scans: ScanThread | ImmutableScans,
    lock: asyncio.Lock,
) -> None:
    """Runs a change of a manifest in a transaction. If many tags need the manifest, holds `lock` and calls `check_all`
    before the transaction. `check_all` calls `NeedingTagsCheck.check_all`. Raises the errors of `change`, and
    Denied."""
    if await writer.run(partial(change, checked_to=None)):
        return
    async with lock:
        is_done = False
        while not is_done:
            try:
                checked_to: int | None = await scans.run(check_all)
            except ManifestUnknown:
                # Another client has just deleted the manifest. If a client pushes the manifest again, `change` checks
                # the tags in the transaction.
                checked_to = None
            is_done = await writer.run(partial(change, checked_to=checked_to))


def last_entry_id(db: apsw.Connection) -> int:
    """Returns the highest id in the tag history; 0 if it is empty."""
    return int(db.execute("SELECT coalesce(max(id), 0) FROM tag_history").get)
