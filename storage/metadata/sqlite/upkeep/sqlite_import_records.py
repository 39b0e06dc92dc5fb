"""Reads and writes the records that imports from other registries need in the metadata database
(`SqliteImportRecords`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import apsw

from storage.imports import TagChange
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase
from storage.names import Digest, RepositoryName, Tag

_TAG_DIGEST: Final = """
SELECT m.digest FROM repository r JOIN tag t ON t.repository = r.id AND t.name = ?2 JOIN manifest m ON m.id = t.manifest
 WHERE r.name = ?1"""
_LAST_CHANGE: Final = """
SELECT h.digest, h.at, h.actor, h.user_agent FROM repository r JOIN tag_history h ON h.repository = r.id AND h.tag = ?2
 WHERE r.name = ?1 ORDER BY h.id DESC LIMIT 1"""
_BLOB_SIZE: Final = """
SELECT b.size FROM blob b
 WHERE b.digest = ? AND b.place <> '' AND EXISTS (SELECT 1 FROM blob_link l WHERE l.blob = b.id)"""
"""Leaves out damaged blobs, whose `place` is empty."""
_MANIFEST: Final = """
SELECT m.id FROM repository r JOIN manifest m ON m.repository = r.id AND m.digest = ?2 WHERE r.name = ?1"""
_SAVE_TAG_TIME: Final = """
UPDATE tag SET updated = ?3
 WHERE repository = (SELECT repository FROM manifest WHERE id = ?1) AND name = ?2 AND manifest = ?1 AND updated > ?3"""


class SqliteImportRecords:
    """Implements `storage.imports.ImportRecords`, which describes the methods. Reads on the event loop."""

    def __init__(self, db: apsw.Connection, writer: CommitThread | ImmutableDatabase) -> None:
        """Reads with `db` and changes through `writer`."""
        self._db = db
        self._writer = writer

    async def tag_digest(self, repo: RepositoryName, tag: Tag) -> Digest | None:
        digest: str | None = self._db.execute(_TAG_DIGEST, (repo, tag)).get
        return None if digest is None else Digest(digest)

    async def last_tag_change(self, repo: RepositoryName, tag: Tag) -> TagChange | None:
        row: Any = self._db.execute(_LAST_CHANGE, (repo, tag)).fetchone()
        if row is None:
            return None
        digest, at, actor, program = row
        return TagChange(None if digest is None else Digest(digest), at, actor, program)

    async def stored_size(self, digest: Digest) -> int | None:
        size: int | None = self._db.execute(_BLOB_SIZE, (digest,)).get
        return size

    async def save_times(
        self, repo: RepositoryName, digest: Digest, pushed: float | None, tags: Mapping[Tag, float]
    ) -> None:
        def save(db: apsw.Connection) -> None:
            manifest = db.execute(_MANIFEST, (repo, digest)).get
            if manifest is None:
                return
            if pushed is not None:
                db.execute("UPDATE manifest SET pushed = ?2 WHERE id = ?1 AND pushed > ?2", (manifest, pushed))
            for tag, set_at in tags.items():
                db.execute(_SAVE_TAG_TIME, (manifest, tag, set_at))

        # A power cut may lose these times, but no content.
        await self._writer.run(save, durable=False)
