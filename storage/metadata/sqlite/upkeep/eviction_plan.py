"""Plans an eviction of mirrored images without changing anything (`plan_eviction`), and counts images
(`summarize_images`).

The caller runs both functions in the thread for long lookups. Times are in seconds since 1970.

Every mirrored manifest has a *rank*, a time that determines the order of eviction
(`storage.metadata.sqlite.upkeep.cached_image_tables`). The rank of an image is the rank of its root manifest. A pull
does not change the rank. If the last pull of an image is later than its rank, an eviction keeps the image for now and
stores the time of the pull as the new rank. `plan_eviction` follows the same order, but keeps the new ranks in memory.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Sequence
from typing import Any

import apsw

from storage.cached_images import CacheSummary, EvictedImage, EvictionRules
from storage.metadata.sqlite.upkeep.cached_image_tables import Image, find_image, reason_to_keep
from storage.names import Tag

_NEXT_BY_RANK = """
SELECT rank, manifest FROM cached_manifest
 WHERE upstream = ?1 AND (rank, manifest) > (?2, ?3) ORDER BY rank, manifest LIMIT 200"""
_REFERENCES = """
SELECT g.repository, b.id, b.digest, b.size FROM json_each(?1) i CROSS JOIN manifest_blob g ON g.manifest = i.value
  CROSS JOIN blob b ON b.digest = g.digest
  CROSS JOIN blob_link l ON l.blob = b.id AND l.repository = g.repository
  CROSS JOIN usage_member m ON m.repository = g.repository
  CROSS JOIN usage_scope s ON s.id = m.scope WHERE s.name = ?2"""
"""The blobs to which the manifests ?1 (a JSON array of row ids) refer: one row for each reference. Leaves out manifests
outside the usage scope ?2, and blobs that the manifest's repository does not have. A *usage scope* is a set of
repositories whose disk usage is counted. With CROSS JOIN, SQLite begins with the manifests and does not read all
repositories of the scope."""
_REFERENCE_COUNT = "SELECT count(*) FROM manifest_blob WHERE repository = ? AND digest = ?"
_HOLDER_COUNT = """
SELECT count(*) FROM usage_scope s CROSS JOIN blob_link l ON l.blob = ?2
  CROSS JOIN usage_member m ON m.scope = s.id AND m.repository = l.repository
 WHERE s.name = ?1
   AND EXISTS (SELECT 1 FROM manifest_blob g WHERE g.repository = l.repository AND g.digest = ?3)"""
"""Returns the number of *holders* of the blob with the row id ?2 and the digest ?3: repositories of the usage scope ?1
that have both the blob and a manifest that refers to it."""
_SUMMARY = """
SELECT count(*), min(max(m.pushed, coalesce(p.last, 0))) FROM cached_manifest c JOIN manifest m ON m.id = c.manifest
  LEFT JOIN manifest_pull p ON p.manifest = m.id
 WHERE c.upstream = ?1
   AND NOT EXISTS (SELECT 1 FROM manifest_child i WHERE i.repository = m.repository AND i.digest = m.digest)
   AND (m.subject IS NULL
        OR NOT EXISTS (SELECT 1 FROM manifest s WHERE s.repository = m.repository AND s.digest = m.subject))"""
"""Returns the number of root manifests of the upstream ?1, and the earliest of their last uses. The last use of a
manifest is the time at which it was last pulled or stored. A *root manifest* is a manifest that no stored index lists
and whose subject is not stored. Each image has exactly one root manifest."""


def plan_eviction(
    db: apsw.Connection,
    upstreams: Sequence[str],
    rules: EvictionRules,
    bytes_to_free: int,
    usage_scope: str,
    now: float,
) -> list[EvictedImage]:
    """Returns the images that an eviction at the time `now` would evict, in order. The eviction would end when it has
    freed `bytes_to_free` bytes of the usage scope named `usage_scope`. If evictions cannot free so many bytes, returns
    all images that may be evicted. `rules`: which images must stay."""
    planned_images: list[EvictedImage] = []
    planned_manifests: set[int] = set()
    references = _BlobReferences(db, usage_scope)
    # A heap of the images with a new rank. Each entry has the new rank, the row id of the root manifest, and the
    # upstream.
    postponed: list[tuple[float, int, str]] = []
    freed_bytes = 0
    for rank, manifest, upstream in _manifests_by_rank(db, upstreams, postponed):
        if freed_bytes >= bytes_to_free:
            break
        # The result is None if the manifest is not the root of an image, or if its deletion is already planned.
        image = find_image(db, manifest, planned_manifests)
        if image is not None and image.last_pulled > rank:
            heapq.heappush(postponed, (image.last_pulled, manifest, upstream))
        elif image is not None and reason_to_keep(db, image, rules, now) is None:
            planned_manifests.update(image.removable)
            size = references.remove(image.removable)
            freed_bytes += size
            planned_images.append(_evicted_image(db, image, upstream, size))
    return planned_images


def _manifests_by_rank(
    db: apsw.Connection, upstreams: Sequence[str], postponed: list[tuple[float, int, str]]
) -> Iterator[tuple[float, int, str]]:
    """Yields the rank, row id and upstream of each stored manifest and each entry of the heap `postponed`, lowest
    rank first. The caller may add entries to the heap during the iteration."""
    stored = heapq.merge(*(_stored_manifests(db, upstream) for upstream in upstreams))
    next_stored = next(stored, None)
    while next_stored is not None or postponed:
        if postponed and (next_stored is None or postponed[0] < next_stored):
            yield heapq.heappop(postponed)
        elif next_stored is not None:
            current, next_stored = next_stored, next(stored, None)
            yield current


def _stored_manifests(db: apsw.Connection, upstream: str) -> Iterator[tuple[float, int, str]]:
    """Yields the rank, row id and upstream of each manifest of one upstream, lowest rank first. Reads the manifests in
    pages, so that no statement stays open."""
    rank, manifest = float("-inf"), 0
    while True:
        rows: list[Any] = db.execute(_NEXT_BY_RANK, (upstream, rank, manifest)).fetchall()
        if not rows:
            return
        for rank, manifest in rows:
            yield rank, manifest, upstream


class _BlobReferences:
    """Counts the remaining references to each blob of a usage scope while a plan removes manifests. Reads the count for
    a blob from the database only once, because thousands of images can share the blob."""

    def __init__(self, db: apsw.Connection, usage_scope: str) -> None:
        self._db = db
        self._usage_scope = usage_scope
        self._manifest_counts: dict[tuple[int, str], int] = {}
        """How many manifests of a repository still refer to a blob. The key is the repository's row id and the blob's
        digest."""
        self._holder_counts: dict[str, int] = {}
        """How many holders (`_HOLDER_COUNT`) a blob still has. The key is the blob's digest."""

    def remove(self, manifests: Sequence[int]) -> int:
        """Subtracts the references of `manifests` from the counts. Returns the total size, in bytes, of the blobs that
        lose their last reference in the scope. Pass each manifest only once."""
        freed_bytes = 0
        references: list[Any] = self._db.execute(_REFERENCES, (json.dumps(manifests), self._usage_scope)).fetchall()
        for repository, blob, digest, size in references:
            key = (repository, digest)
            if key not in self._manifest_counts:
                self._manifest_counts[key] = int(self._db.execute(_REFERENCE_COUNT, key).get)
            self._manifest_counts[key] -= 1
            if self._manifest_counts[key]:
                continue
            if digest not in self._holder_counts:
                self._holder_counts[digest] = int(
                    self._db.execute(_HOLDER_COUNT, (self._usage_scope, blob, digest)).get
                )
            self._holder_counts[digest] -= 1
            if not self._holder_counts[digest]:
                freed_bytes += size
        return freed_bytes


def _evicted_image(db: apsw.Connection, image: Image, upstream: str, size: int) -> EvictedImage:
    rows: list[Any] = db.execute("SELECT name FROM tag WHERE manifest = ? ORDER BY name", (image.root,)).fetchall()
    tags = tuple(Tag(name) for (name,) in rows)
    return EvictedImage(upstream, image.name, image.digest, tags, len(image.removable), image.last_pulled, size)


def summarize_images(db: apsw.Connection, upstream: str) -> CacheSummary:
    """Returns the number of images of an upstream, and the earliest of their last pulls. If the root manifest of an
    image was stored later than it was last pulled, the time of storing counts."""
    row: Any = db.execute(_SUMMARY, (upstream,)).get
    return CacheSummary(*row)
