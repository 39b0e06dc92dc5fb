"""Counts the content of the metadata database, and plans removals of tags and manifests (`SqliteInventory`).

A server may use the database at the same time, through another connection. In this module, an *index* is an image
index, not an index of the database.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import apsw

from storage.errors import ManifestUnknown, NameUnknown, StorageFailed
from storage.inventory import ContentTotals, OpenUploads, RemovalPlan, StoreFigures
from storage.jobs import JobState
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.upkeep import outbox_limits, usage_tables
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.upstream_records import CLOCK_TOLERANCE_SECONDS

_COUNT_CONTENT = """
SELECT count(*), coalesce(sum(manifests), 0),
       (SELECT count(*) FROM tag t JOIN repository r ON r.id = t.repository WHERE r.name >= ?1 AND r.name < ?2)
  FROM repository WHERE manifests > 0 AND name >= ?1 AND name < ?2"""
_COUNT_BLOBS = """
SELECT count(*), coalesce(sum(size), 0) FROM blob WHERE id IN (
       SELECT l.blob FROM blob_link l JOIN repository r ON r.id = l.repository WHERE r.name >= ?1 AND r.name < ?2)"""
_TAGS = """
SELECT r.name, t.name FROM repository r JOIN tag t ON t.repository = r.id
 WHERE r.name >= ?1 AND r.name < ?2 ORDER BY r.name, t.name"""
_CHILDREN = """
SELECT m.id FROM manifest_child c JOIN manifest m ON m.repository = c.repository AND m.digest = c.digest
 WHERE c.manifest = ?1"""
"""Row ids of the *children* of an index: the manifests that the index lists. ?1: the row id of the index."""
_REFERRERS = """
SELECT s.id FROM manifest m JOIN manifest s ON s.repository = m.repository AND s.subject = m.digest WHERE m.id = ?1"""
"""Row ids of the *referrers* of a manifest: the manifests whose `subject` is this manifest. ?1: the row id of the
manifest."""
_NEXT_INDEX = """
SELECT c.manifest FROM manifest m JOIN manifest_child c ON c.repository = m.repository AND c.digest = m.digest
 WHERE m.id = ?1 AND c.manifest > ?2 ORDER BY c.manifest LIMIT 1"""
"""The lowest row id above ?2 of an index that lists a manifest. ?1: the row id of the manifest."""
_FREED_BYTES = """
SELECT coalesce(sum(b.size), 0) FROM blob b JOIN blob_link l ON l.blob = b.id AND l.repository = ?1
 WHERE NOT EXISTS (SELECT 1 FROM blob_link o WHERE o.blob = b.id AND o.repository <> ?1)
   AND NOT EXISTS (SELECT 1 FROM manifest_blob k WHERE k.repository = ?1 AND k.digest = b.digest
                   AND k.manifest NOT IN (SELECT value FROM json_each(?2)))
   AND EXISTS (SELECT 1 FROM manifest_blob g WHERE g.repository = ?1 AND g.digest = b.digest)"""
"""Total size in bytes of the blobs that only the removed manifests use. Leaves out blobs that another repository has.
?1: the row id of the repository. ?2: the row ids of the removed manifests, as a JSON list."""


_FIGURES = """
SELECT (SELECT count(*) FROM repository WHERE manifests > 0), (SELECT coalesce(sum(manifests), 0) FROM repository),
       (SELECT count(*) FROM tag), count(*), coalesce(sum(size), 0), (SELECT count(*) FROM upload),
       (SELECT count(*) FROM damaged_blob), (SELECT count(*) FROM damaged_manifest)
  FROM blob"""
_REMAINING_REQUESTS = """
SELECT upstream, remaining FROM upstream_allowance WHERE remaining IS NOT NULL AND at > ?1 AND at <= ?2
 ORDER BY upstream"""
"""Number of requests that each upstream still allows, from its last report. Reports up to the time ?1 are left out as
too old. ?2 is the present time plus a tolerance. Reports after the time ?2 are left out, because a time in the future
is wrong."""
REMAINING_VALID_SECONDS = 3600.0
"""Age in seconds at which a report of the remaining requests is too old."""


@contextmanager
def open_inventory(database: Path) -> Iterator[SqliteInventory]:
    """Opens the inventory of a database file for a `with` block. The caller must check the version of the tables first.
    If SQLite fails to open the database, or to read it inside the block, raises StorageFailed."""
    try:
        with closing(connect(database, read_only=True)) as db:
            yield SqliteInventory(db)
    except apsw.Error as error:
        raise StorageFailed(f"cannot read {database}: {error}") from error


class SqliteInventory:
    """Implements `storage.inventory.Inventory`. The methods raise apsw.Error, which `open_inventory` converts to
    StorageFailed."""

    def __init__(self, db: apsw.Connection) -> None:
        """`db`: a connection to the database, which the caller closes."""
        self._db = db

    def figures(self, now: float) -> StoreFigures:
        """Returns the figures of the whole database. `now`: in seconds since 1970."""
        row: tuple[Any, ...] = self._db.execute(_FIGURES).get
        repositories, manifests, tags, blobs, blob_bytes, uploads, damaged_blobs, damaged_manifests = row
        running = (JobState.RUNNING.value,)
        return StoreFigures(
            repositories=repositories,
            manifests=manifests,
            tags=tags,
            blobs=blobs,
            blob_bytes=blob_bytes,
            uploads=uploads,
            damaged_blobs=damaged_blobs,
            damaged_manifests=damaged_manifests,
            running_jobs=dict(
                self._db.execute("SELECT kind, count(*) FROM job WHERE state = ?1 GROUP BY kind", running)
            ),
            scopes=usage_tables.read_scopes(self._db),
            remaining_requests=dict(
                self._db.execute(_REMAINING_REQUESTS, (now - REMAINING_VALID_SECONDS, now + CLOCK_TOLERANCE_SECONDS))
            ),
            backlogs=outbox_limits.backlog(self._db),
        )

    def totals_below(self, name: str) -> ContentTotals:
        """Counts the content of the repositories whose names begin with `name` and a slash."""
        name_range = _range_below(name)
        counts: tuple[Any, ...] = self._db.execute(_COUNT_CONTENT, name_range).get
        blobs: tuple[Any, ...] = self._db.execute(_COUNT_BLOBS, name_range).get
        return ContentTotals(*counts, *blobs)

    def tags_below(self, name: str) -> list[tuple[RepositoryName, Tag]]:
        """Returns the tags of the repositories whose names begin with `name` and a slash, sorted."""
        rows = self._db.execute(_TAGS, _range_below(name)).fetchall()
        return [(RepositoryName(str(repo)), Tag(str(tag))) for repo, tag in rows]

    def count_uploads(self) -> OpenUploads:
        """Counts the open upload sessions and their bytes, and finds the session that has been idle longest."""
        count, received, idle_since = self._db.execute(
            "SELECT count(*), coalesce(sum(offset), 0), min(touched) FROM upload"
        ).get
        return OpenUploads(count, received, idle_since)

    def plan_removal(self, repo: RepositoryName, reference: Reference) -> RemovalPlan:
        """Plans the removal of a tag, or of a manifest by its digest. Changes nothing.

        - The removal of a tag also removes its manifest, unless the manifest has other tags or an index lists it.
        - The removal of a manifest also removes its tags, children and referrers. A child or referrer stays if it has a
          tag, or if an index that stays lists it.

        Raises NameUnknown, ManifestUnknown."""
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
        if isinstance(reference, Tag) and (tags != [reference] or self._next_index(root)):
            return RemovalPlan(repo, (reference,), manifests=(), freed_bytes=0)
        return self._plan(repo, repository, tags, self._with_dependents(root))

    def plan_removal_of_all(self, repo: RepositoryName) -> RemovalPlan:
        """Plans the removal of all tags and manifests of the repository. Changes nothing. Raises NameUnknown if there
        are no manifests."""
        repository = lookups.repository_id(self._db, repo)
        # The newest manifest comes first. Clients usually push the children of an index before the index, so an index
        # usually comes before its children. If the removal ends early, an index that stays usually has all children.
        removed_ids = self._column("SELECT id FROM manifest WHERE repository = ?1 ORDER BY id DESC", repository)
        if not removed_ids:
            raise NameUnknown(f"there is nothing in {repo}")
        tags = self._column("SELECT name FROM tag WHERE repository = ?1 ORDER BY name", repository)
        return self._plan(repo, repository, [Tag(name) for name in tags], removed_ids)

    def _with_dependents(self, root: int) -> list[int]:
        """Returns the row ids of the manifests to remove: `root` and, recursively, its children and referrers. Leaves
        out a child or referrer that has a tag, or that an index outside the result lists."""
        # The loop adds a child or referrer to `removed` if it has no tag, and if `removed` has all its indexes, which
        # are the indexes that list it. The loop looks at the indexes of a manifest in the order of their row ids. At
        # the first index that is not in `removed`, the manifest begins to wait for this index. When this index is added
        # to `removed`, the loop continues at this index, and does not look at the earlier indexes again. A manifest
        # that still waits at the end stays.
        removed: dict[int, None] = {}  # keeps the order
        waiting: dict[int, list[int]] = {}  # maps an index to the manifests that wait for it
        # Maps each manifest found so far to a row id: all indexes of the manifest up to this row id are in `removed`.
        checked_up_to = {root: 0}
        pending = deque([root])
        while pending:
            manifest = pending.popleft()
            if manifest != root:
                index = self._next_index(manifest, checked_up_to[manifest])
                while index is not None and index in removed:
                    checked_up_to[manifest] = index
                    index = self._next_index(manifest, index)
                if index is not None:
                    waiting.setdefault(index, []).append(manifest)
                    continue
                if self._has_tag(manifest):
                    continue
            removed[manifest] = None
            pending += waiting.pop(manifest, ())
            for dependent in [*self._column(_CHILDREN, manifest), *self._column(_REFERRERS, manifest)]:
                if dependent not in checked_up_to:
                    checked_up_to[dependent] = 0
                    pending.append(dependent)
        return list(removed)

    def _next_index(self, manifest: int, after: int = 0) -> int | None:
        """Returns the lowest row id above `after` of an index that lists the manifest; None if there is no such
        index."""
        row_ids = self._column(_NEXT_INDEX, manifest, after)
        return row_ids[0] if row_ids else None

    def _has_tag(self, manifest: int) -> bool:
        return bool(self._column("SELECT 1 FROM tag WHERE manifest = ?1 LIMIT 1", manifest))

    def _plan(self, repo: RepositoryName, repository: int, tags: Sequence[Tag], to_remove: list[int]) -> RemovalPlan:
        """Returns the plan. `to_remove`: the row ids of the manifests to remove."""
        digests = [Digest(self._column("SELECT digest FROM manifest WHERE id = ?1", row_id)[0]) for row_id in to_remove]
        freed_bytes: int = self._db.execute(_FREED_BYTES, (repository, json.dumps(to_remove))).get
        return RemovalPlan(repo, tuple(tags), tuple(digests), freed_bytes)

    def _tags(self, manifest: int) -> list[Tag]:
        """Returns the tags that point at the manifest."""
        return [Tag(name) for name in self._column("SELECT name FROM tag WHERE manifest = ?1 ORDER BY name", manifest)]

    def _column(self, sql: str, *parameters: int) -> list[Any]:
        """Returns the values of a query's only column."""
        return [value for (value,) in self._db.execute(sql, parameters).fetchall()]


def _range_below(name: str) -> tuple[str, str]:
    """Returns the range of the names that begin with `name` and a slash. The second bound is excluded."""
    return f"{name}/", f"{name}0"  # in byte order, "0" follows "/"
