"""The inventory of a metadata database (`Inventory`), read with a connection of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw

from storage.errors import ManifestUnknown, NameUnknown
from storage.inventory import ContentTotals, RemovalPlan
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.database import connect
from storage.names import Digest, Reference, RepositoryName, Tag

_COUNTS = """
SELECT count(*), coalesce(sum(manifests), 0),
       (SELECT count(*) FROM tag t JOIN repository r ON r.id = t.repository WHERE r.name >= ?1 AND r.name < ?2)
  FROM repository WHERE manifests > 0 AND name >= ?1 AND name < ?2"""
_BLOBS = """
SELECT count(*), coalesce(sum(size), 0) FROM blob WHERE id IN (
       SELECT l.blob FROM blob_link l JOIN repository r ON r.id = l.repository WHERE r.name >= ?1 AND r.name < ?2)"""
_TAGS = """
SELECT r.name, t.name FROM repository r JOIN tag t ON t.repository = r.id
 WHERE r.name >= ?1 AND r.name < ?2 ORDER BY r.name, t.name"""
_CHILDREN = """
SELECT m.id FROM manifest_child c JOIN manifest m ON m.repository = c.repository AND m.digest = c.digest
 WHERE c.manifest = ?1"""
_REFERRERS = """
SELECT s.id FROM manifest m JOIN manifest s ON s.repository = m.repository AND s.subject = m.digest WHERE m.id = ?1"""
_HELD_BY = """
SELECT c.manifest FROM manifest m JOIN manifest_child c ON c.repository = m.repository AND c.digest = m.digest
 WHERE m.id = ?1"""
_FREED = """
SELECT coalesce(sum(b.size), 0) FROM blob b JOIN blob_link l ON l.blob = b.id AND l.repository = ?1
 WHERE NOT EXISTS (SELECT 1 FROM blob_link o WHERE o.blob = b.id AND o.repository <> ?1)
   AND NOT EXISTS (SELECT 1 FROM manifest_blob k WHERE k.repository = ?1 AND k.digest = b.digest
                   AND k.manifest NOT IN (SELECT value FROM json_each(?2)))
   AND EXISTS (SELECT 1 FROM manifest_blob g WHERE g.repository = ?1 AND g.digest = b.digest)"""


@contextmanager
def open_inventory(database: Path) -> Iterator[SqliteInventory]:
    """Opens the inventory of a database of this version. Raises apsw.Error."""
    db = connect(database, read_only=True)
    try:
        yield SqliteInventory(db)
    finally:
        db.close()


class SqliteInventory:
    """Made by `open_inventory`."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def totals_below(self, name: str) -> ContentTotals:
        span = (f"{name}/", f"{name}0")  # in byte order, "0" comes after "/"
        counts: tuple[Any, ...] = self._db.execute(_COUNTS, span).get
        blobs: tuple[Any, ...] = self._db.execute(_BLOBS, span).get
        return ContentTotals(*counts, *blobs)

    def tags_below(self, name: str) -> list[tuple[RepositoryName, Tag]]:
        rows = self._db.execute(_TAGS, (f"{name}/", f"{name}0")).fetchall()
        return [(RepositoryName(str(repo)), Tag(str(tag))) for repo, tag in rows]

    def plan_removal(self, repo: RepositoryName, reference: Reference) -> RemovalPlan:
        repository = lookups.repository_id(self._db, repo)
        if isinstance(reference, Digest):
            root = self._db.execute(
                "SELECT id FROM manifest WHERE repository = ? AND digest = ?", (repository, reference)
            ).get
        else:
            root = self._db.execute(
                "SELECT manifest FROM tag WHERE repository = ? AND name = ?", (repository, reference)
            ).get
        if root is None:
            raise ManifestUnknown(f"{repo} has no manifest {reference}")
        tags = self._tags(root)
        if isinstance(reference, Tag):
            if tags != [reference] or self._column(_HELD_BY, root):
                return RemovalPlan(repo, (reference,), (), 0)
            tags = [reference]
        return self._described(repo, repository, tags, self._along_with(root))

    def plan_removal_of_all(self, repo: RepositoryName) -> RemovalPlan:
        repository = lookups.repository_id(self._db, repo)
        gone = self._column("SELECT id FROM manifest WHERE repository = ?1 ORDER BY id DESC", repository)
        if not gone:
            raise NameUnknown(f"there is nothing in {repo}")
        tags = self._column("SELECT name FROM tag WHERE repository = ?1 ORDER BY name", repository)
        return self._described(repo, repository, [Tag(name) for name in tags], gone)

    def _along_with(self, root: int) -> list[int]:
        """Returns `root` and the manifests that only it refers to. Tagged manifests stay, and so do those that another
        index lists."""
        gone = [root]
        for number in gone:  # grows while it is iterated
            for below in [*self._column(_CHILDREN, number), *self._column(_REFERRERS, number)]:
                if below not in gone and not self._tags(below) and set(self._column(_HELD_BY, below)) <= set(gone):
                    gone.append(below)
        return gone

    def _described(self, repo: RepositoryName, repository: int, tags: Sequence[Tag], gone: list[int]) -> RemovalPlan:
        digests = [Digest(self._column("SELECT digest FROM manifest WHERE id = ?1", number)[0]) for number in gone]
        size: int = self._db.execute(_FREED, (repository, json.dumps(gone))).get
        return RemovalPlan(repo, tuple(tags), tuple(digests), size)

    def _tags(self, manifest: int) -> list[Tag]:
        return [Tag(name) for name in self._column("SELECT name FROM tag WHERE manifest = ?1 ORDER BY name", manifest)]

    def _column(self, sql: str, parameter: int) -> list[Any]:
        return [value for (value,) in self._db.execute(sql, (parameter,)).fetchall()]
