"""Checks whether an immutable tag needs a manifest (`NeedingTagsCheck`), before the manifest is deleted or gets another
media type.

A tag *needs* a manifest if it points at the manifest, or at an index that contains the manifest, directly or through
other indexes. Millions of tags can need a manifest, and all other changes of all processes wait for a transaction. So a
transaction checks only a few tags. If there are more, `NeedingTagsCheck.check_all` checks them before the transaction,
and the transaction checks only the tags that have changed since then.
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
"""The process holds a lock while it changes a manifest that more than this number of tags need, or that more than this
number of indexes contain. The lock limits the process to one such change at a time. Without it, hundreds of them could
wait, and the commit thread would make them all in one long transaction. One push can set this number of tags
(`registry.http.exchange.RequestLimits.tags_per_put`). So a manifest with the tags of one push needs no lock."""
_MAX_CHANGED_TAGS: Final = 1000
"""Largest number of changes of tags that one transaction checks."""
_TAGS_SET_AFTER_ENTRY: Final = """
SELECT tag FROM tag_history NOT INDEXED WHERE id > ? AND repository = ? AND digest IS NOT NULL LIMIT ?"""
"""Reads the entries of the tag history after a given entry, and returns the tags of a repository that were set. Leaves
out entries that deleted a tag. NOT INDEXED forbids the indexes of the table. SQLite then finds the first entry by its
id, and reads only the entries after it."""
_TAGS_NEEDING_MANIFEST: Final = """
WITH RECURSIVE needing (id, repository, digest) AS (
  SELECT id, repository, digest FROM manifest WHERE id = ?
  UNION
  SELECT m.id, m.repository, m.digest
    FROM needing n JOIN manifest_child c ON c.repository = n.repository AND c.digest = n.digest
    JOIN manifest m ON m.id = c.manifest)
SELECT t.name FROM needing n CROSS JOIN tag t ON t.manifest = n.id"""
"""Finds the tags that need a manifest. With CROSS JOIN, SQLite does not read all tags of the store."""
_INDEXES_OF_MANIFEST: Final = """
SELECT m.id, m.digest FROM manifest_child c JOIN manifest m ON m.id = c.manifest
 WHERE c.repository = ? AND c.digest = ? LIMIT ?"""


@dataclass(frozen=True, slots=True)
class TargetManifest:
    """A manifest to change. `repository_id`, `manifest_id`: row ids. `repo`: the name of the repository. `media_type`:
    the stored one."""

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
    """Refuses a change of a manifest that an immutable tag needs. `denied` returns the error about the manifest
    and such a tag."""

    is_immutable: IsImmutable
    denied: Callable[[TargetManifest, str], Denied]

    def check_all(self, db: apsw.Connection, repo: RepositoryName, digest: Digest) -> int:
        """Checks all tags that need the manifest. Returns the id of the newest entry of the tag history when the check
        began: the check covers the tags that this entry and earlier ones set. Takes long if there are very many tags,
        so it must not run in a transaction that changes something. Raises NameUnknown, ManifestUnknown, and Denied if
        an immutable tag needs the manifest."""
        newest = newest_entry(db)
        if self.is_immutable is not nothing_immutable:
            target = TargetManifest.find(db, repo, digest)
            self._refuse_immutable(db, target, _TAGS_NEEDING_MANIFEST, target.manifest_id)
        return newest

    def check(self, db: apsw.Connection, target: TargetManifest, checked_to: int | None) -> bool:
        """Checks the tags in the transaction of the change. `checked_to`: what `check_all` returned; None if it was not
        called. Returns False if there are too many tags, so that `check_all` has to be called (again). Raises
        Denied."""
        if self.is_immutable is nothing_immutable:
            return True
        return self._check_few(db, target) if checked_to is None else self._check_changes(db, target, checked_to)

    def _check_few(self, db: apsw.Connection, target: TargetManifest) -> bool:
        """Checks the tags that need the manifest. Returns False if there are too many of them, or too many indexes
        through which tags may need it. Raises Denied.

        Reads the indexes of one manifest after another, with a limit for each. A LIMIT on `_TAGS_NEEDING_MANIFEST` does
        not suffice: with it, SQLite would still find all indexes of a manifest at once, even millions."""
        limit = MAX_TAGS_WITHOUT_LOCK + 1
        tags, seen, unread = 0, {target.manifest_id}, [(target.manifest_id, target.digest)]
        while unread:
            manifest_id, digest = unread.pop()
            tags += self._refuse_immutable(
                db, target, "SELECT name FROM tag WHERE manifest = ? LIMIT ?", manifest_id, limit
            )
            rows: list[Any] = db.execute(_INDEXES_OF_MANIFEST, (target.repository_id, digest, limit)).fetchall()
            new = [(index_id, index_digest) for index_id, index_digest in rows if index_id not in seen]
            seen.update(index_id for index_id, _ in new)
            unread += new
            if tags > MAX_TAGS_WITHOUT_LOCK or len(seen) > limit:
                return False
        return True

    def _check_changes(self, db: apsw.Connection, target: TargetManifest, checked_to: int) -> bool:
        """Checks the tags that were set after the entry `checked_to` of the tag history. Does not check older tags:
        `check_all` found no immutable one that needs the manifest. An older tag can have begun to need it only if the
        tag points at an index that lists a missing index, and a client has pushed the missing index since. No immutable
        tag needs a missing index, because clients cannot delete an index that it needs. Returns False if too many tags
        were set. Raises Denied."""
        rows: list[Any] = db.execute(
            _TAGS_SET_AFTER_ENTRY, (checked_to, target.repository_id, _MAX_CHANGED_TAGS + 1)
        ).fetchall()
        immutable_tags = [tag for (tag,) in rows if self.is_immutable(tag)]
        if immutable_tags:
            sql = f"{_TAGS_NEEDING_MANIFEST} WHERE t.name IN (SELECT value FROM json_each(?))"
            self._refuse_immutable(db, target, sql, target.manifest_id, json.dumps(immutable_tags))
        return len(rows) <= _MAX_CHANGED_TAGS

    def _refuse_immutable(self, db: apsw.Connection, target: TargetManifest, sql: str, *values: int | str) -> int:
        """Raises Denied if a tag that the statement finds is immutable. Otherwise returns the number of these tags.
        `values`: those for the statement."""
        count, cursor = 0, db.execute(sql, values)
        try:
            for (tag,) in cursor:
                if self.is_immutable(tag):
                    raise self.denied(target, tag)
                count += 1
        finally:
            cursor.close()
        return count


class CheckedChange(Protocol):
    """A change of a manifest, to be called in a transaction."""

    def __call__(self, db: apsw.Connection, /, *, checked_to: int | None) -> bool:
        """Makes the change, and returns True. If `NeedingTagsCheck.check` returns False, changes nothing, and returns
        False. `checked_to`: see that method."""
        ...


async def run_checked(
    change: CheckedChange,
    check_all: Callable[[apsw.Connection], int],
    writer: CommitThread | ImmutableDatabase,
    scans: ScanThread | ImmutableScans,
    lock: asyncio.Lock,
) -> None:
    """Runs a change of a manifest in a transaction. `check_all`: calls `NeedingTagsCheck.check_all`. `lock`: held while
    a manifest that many tags need is changed. Raises the errors of `change`, and Denied."""
    if await writer.run(partial(change, checked_to=None)):
        return
    async with lock:
        is_done = False
        while not is_done:
            try:
                checked_to: int | None = await scans.run(check_all)
            except ManifestUnknown:
                # Another client has just deleted the manifest, so there is nothing to check. If it is pushed again in
                # the meantime, `change` checks its tags in the transaction.
                checked_to = None
            is_done = await writer.run(partial(change, checked_to=checked_to))


def newest_entry(db: apsw.Connection) -> int:
    """Returns the highest id in the tag history; 0 if it is empty."""
    return int(db.execute("SELECT coalesce(max(id), 0) FROM tag_history").get)
