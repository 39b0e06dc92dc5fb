"""Stores the descriptions of repositories in the metadata database (`SqliteDescriptions`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import apsw

from storage.content import Actor
from storage.descriptions import MAX_DESCRIPTION_BYTES, Description
from storage.errors import PreconditionFailed
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.access.audit_table import record
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase
from storage.names import RepositoryName

_DESCRIPTION: Final = """
SELECT d.text, d.revision, d.at, d.actor FROM repository r JOIN repository_description d ON d.repository = r.id
 WHERE r.name = ?1"""
_REVISION: Final = "SELECT revision FROM repository_description WHERE repository = ?"
_PUT: Final = """
INSERT INTO repository_description (repository, revision, text, at, actor) VALUES (?1, ?2, ?3, ?4, ?5)
    ON CONFLICT (repository) DO UPDATE SET revision = ?2, text = ?3, at = ?4, actor = ?5"""


class SqliteDescriptions:
    """Implements `storage.descriptions.Descriptions`, which describes the methods."""

    def __init__(
        self, db: apsw.Connection, writer: CommitThread | ImmutableDatabase, clock: Callable[[], float]
    ) -> None:
        """`db` runs the reads, and `writer` the writes. `clock` returns the time in seconds since 1970."""
        self._db = db
        self._writer = writer
        self._clock = clock

    async def find_description(self, repo: RepositoryName) -> Description | None:
        row: Any = self._db.execute(_DESCRIPTION, (repo,)).get
        return None if row is None else Description(*row)

    async def put_description(
        self, repo: RepositoryName, text: str, *, by: Actor, revision: int | None = None
    ) -> Description:
        assert len(text.encode("utf-8")) <= MAX_DESCRIPTION_BYTES
        now = self._clock()

        def put(db: apsw.Connection) -> Description:
            repository = lookups.repository_id(db, repo)
            current = db.execute(_REVISION, (repository,)).get or 0
            if revision not in (None, current):
                raise PreconditionFailed(
                    f"somebody has changed the description of {repo} meanwhile; read it again and repeat the change",
                    {"revision": current},
                )
            db.execute(_PUT, (repository, current + 1, text, now, by.name))
            record(db, by, now, "description.put", repo, {"revision": current + 1, "bytes": len(text.encode("utf-8"))})
            return Description(text, current + 1, now, by.name)

        return await self._writer.run(put)
