"""The records that imports need, in the metadata database (`SqliteImportRecords`). An *import* copies content from
another registry (the *old registry*) into this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Any, Final

import apsw

from storage.imports import LastTagChange
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep.sqlite_pulls import add_imported_pull_row
from storage.names import Digest, RepositoryName, Tag
from storage.retention import RETENTION_ACTOR

_TAG_DIGEST: Final = """
SELECT m.digest FROM repository r JOIN tag t ON t.repository = r.id AND t.name = ?2 JOIN manifest m ON m.id = t.manifest
 WHERE r.name = ?1"""
_LAST_CHANGE: Final = """
SELECT h.digest, h.at, h.actor, h.user_agent FROM repository r JOIN tag_history h ON h.repository = r.id AND h.tag = ?2
 WHERE r.name = ?1 ORDER BY h.id DESC LIMIT 1"""
_BLOB_SIZE: Final = """
SELECT b.size FROM blob b
 WHERE b.digest = ? AND b.place <> '' AND EXISTS (SELECT 1 FROM blob_link l WHERE l.blob = b.id)"""
"""The size of a blob, unless the blob is damaged (its `place` is empty) or no repository has it."""
_MANIFEST: Final = """
SELECT m.id FROM repository r JOIN manifest m ON m.repository = r.id AND m.digest = ?2 WHERE r.name = ?1"""
_HAS_POINTED_AT: Final = """
SELECT EXISTS (SELECT 1 FROM tag_history h
                WHERE h.repository = (SELECT id FROM repository WHERE name = ?1) AND h.tag = ?2 AND h.digest = ?3)"""
_DELETED_BY: Final = """
SELECT DISTINCT substr(part, 2) FROM audit
 WHERE target = ?1 AND action = 'manifest.delete' AND actor = ?2 AND outcome = 'ok'"""
"""The digests of the manifests that an actor deleted from a repository. The column `part` has `@`, followed by the
digest."""
_SET_PUSH_TIME_BACK: Final = """
UPDATE tag
   SET updated = min(updated, max(?3, coalesce((
       SELECT h.at FROM tag_history h WHERE h.repository = tag.repository AND h.tag = tag.name
        ORDER BY h.id DESC LIMIT 1 OFFSET 1), ?3)))
 WHERE repository = (SELECT repository FROM manifest WHERE id = ?1) AND name = ?2 AND manifest = ?1 AND updated > ?3
   AND updated <= (SELECT h.at FROM tag_history h WHERE h.repository = tag.repository AND h.tag = tag.name
                    ORDER BY h.id DESC LIMIT 1)"""
"""Sets the push time (`updated`) of an imported tag back to the later of these two times:

- the time at which the tag was set at the old registry (?3)
- the time of the tag's last change in this registry before the import, if there is one

In the tag's history, the newest entry is the import. The second newest entry is the last change before the import.

A push time later than the newest entry stays as it is: a client has pushed the same manifest again, which adds no
entry."""


class SqliteImportRecords:
    """Implements `storage.imports.ImportRecords`, which describes the methods. Short reads run on the event loop.
    Reads of many rows run in the thread for long lookups."""

    def __init__(
        self,
        db: apsw.Connection,
        writer: CommitThread | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        clock: Callable[[], float],
    ) -> None:
        """Reads with `db` and `scans`, and changes through `writer`. `clock` returns the time in seconds since 1970."""
        self._db = db
        self._writer = writer
        self._scans = scans
        self._clock = clock

    async def tag_digest(self, repo: RepositoryName, tag: Tag) -> Digest | None:
        digest: str | None = self._db.execute(_TAG_DIGEST, (repo, tag)).get
        return None if digest is None else Digest(digest)

    async def last_tag_change(self, repo: RepositoryName, tag: Tag) -> LastTagChange | None:
        row: Any = self._db.execute(_LAST_CHANGE, (repo, tag)).fetchone()
        if row is None:
            return None
        digest, at, actor, program = row  # `program`: the user agent
        return LastTagChange(None if digest is None else Digest(digest), at, actor, program)

    async def has_pointed_at(self, repo: RepositoryName, tag: Tag, digest: Digest) -> bool:
        return await self._scans.run(lambda db: bool(db.execute(_HAS_POINTED_AT, (repo, tag, digest)).get))

    async def deleted_by_retention(self, repo: RepositoryName) -> Set[Digest]:
        def read(db: apsw.Connection) -> set[Digest]:
            rows: list[Any] = db.execute(_DELETED_BY, (repo, RETENTION_ACTOR.name)).fetchall()
            return {Digest(digest) for (digest,) in rows}

        return await self._scans.run(read)

    async def stored_size(self, digest: Digest) -> int | None:
        size: int | None = self._db.execute(_BLOB_SIZE, (digest,)).get
        return size

    async def record_import(
        self, repo: RepositoryName, digest: Digest, tags: Mapping[Tag, float] | None = None
    ) -> None:
        def save(db: apsw.Connection) -> None:
            manifest = db.execute(_MANIFEST, (repo, digest)).get
            if manifest is None:
                return
            add_imported_pull_row(db, manifest, self._clock())
            for tag, set_at in (tags or {}).items():
                db.execute(_SET_PUSH_TIME_BACK, (manifest, tag, set_at))

        # A power cut may lose these times, but no content. The next import records them again.
        await self._writer.run(save, durable=False)
