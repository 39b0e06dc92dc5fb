"""Finds and evicts images of mirrored content in the metadata database.

An *image* is a root manifest with its children and referrers. All these manifests are the *family* of the image.
Parameters named `manifest` and `repository` are row ids.

The table `cached_manifest` gives each mirrored manifest a `rank`, which is a time. An eviction checks the manifests in
the order of their ranks, earliest first. In these cases a manifest is not evicted, and gets a later rank:

- The manifest is not a root.
- The image was pulled after the time of the rank. A pull does not update the rank.
- The image must stay (`reason_to_keep`).

The cost of an eviction does not grow with the size of the store.

After the machine's clock was set back, ranks can be in the future. An eviction checks manifests with such ranks last.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Container, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

import apsw

from storage.cached_images import Cooldowns, DroppedLinks, EvictedImage, EvictionRules
from storage.content import Actor
from storage.future_times import CLOCK_MARGIN_SECONDS
from storage.metadata.sqlite.blob_changes import WHOLE_STORE, is_referenced, remove_link
from storage.metadata.sqlite.manifest_deletion import delete_manifest, delete_tag_portion
from storage.names import Digest, RepositoryName, Tag
from storage.outbox import EventAction
from storage.upstream_tags import Sighting

MAX_CHECKED_MANIFESTS: Final = 20
"""Largest number of manifests that one transaction checks."""
MAX_LINKS: Final = 200
"""Largest number of links that one transaction removes. A *link* is a row that lets a repository serve a blob."""
QUEUE_PAGE_ROWS: Final = 5000
"""Largest number of rows of the collect queue that one transaction reads. The queue lists the links and blobs that
garbage collection may have to remove. Reading this many rows takes about twenty milliseconds. The number is high
because most rows may be about links that are still used."""
LINKS_START: Final = (WHOLE_STORE, "\U0010ffff")
LINKS_END: Final = (2**63 - 1, "")
"""Two positions in the collect queue: all rows about links lie between them, and no row about a blob does. The queue
is sorted by the columns `repository` and `digest`. A row about a blob has `WHOLE_STORE`, which is 0, in the column
`repository`, so the rows about blobs come before the rows about links."""
_MANIFEST_ROW = """
SELECT m.repository, r.name, m.digest, m.subject FROM manifest m JOIN repository r ON r.id = m.repository
 WHERE m.id = ?"""
_LOWEST_RANK_BEFORE = "SELECT rank, manifest FROM cached_manifest WHERE upstream = ? AND rank < ? ORDER BY rank LIMIT 1"
_LOWEST_RANK_AFTER = "SELECT rank, manifest FROM cached_manifest WHERE upstream = ? AND rank > ? ORDER BY rank LIMIT 1"
_PARENTS = """
SELECT c.manifest FROM manifest m JOIN manifest_child c ON c.repository = m.repository AND c.digest = m.digest
 WHERE m.id = ?"""
"""The parents of a manifest: the image indexes that list it. An *image index* is a manifest that lists other manifests,
its children."""
_HAS_TAG = "SELECT 1 FROM tag WHERE manifest = ? LIMIT 1"
_STORED_SUBJECT = """
SELECT s.id FROM manifest m JOIN manifest s ON s.repository = m.repository AND s.digest = m.subject WHERE m.id = ?"""
_CHILDREN_AND_REFERRERS = """
SELECT m.id FROM manifest_child c JOIN manifest m ON m.repository = c.repository AND m.digest = c.digest
 WHERE c.manifest = ?1
 UNION
SELECT s.id FROM manifest m JOIN manifest s ON s.repository = m.repository AND s.subject = m.digest WHERE m.id = ?1"""
_LAST_PULLED = """
SELECT max(max(m.pushed, coalesce(p.last, 0))) FROM json_each(?) i
  JOIN manifest m ON m.id = i.value LEFT JOIN manifest_pull p ON p.manifest = m.id"""
_IS_FROZEN = """
SELECT 1 FROM json_each(?2) i JOIN manifest m ON m.id = i.value
  JOIN frozen_tag f ON f.repository = ?1 AND f.digest = m.digest LIMIT 1"""
_HAS_DIGEST = "SELECT 1 FROM json_each(?1) i JOIN manifest m ON m.id = i.value WHERE m.digest = ?2 LIMIT 1"
_MOVED_TAGS = """
SELECT DISTINCT u.tag FROM json_each(?2) i CROSS JOIN manifest m ON m.id = i.value
  CROSS JOIN upstream_tag u INDEXED BY upstream_tag_digest ON u.repository = ?1 AND u.digest = m.digest
 WHERE EXISTS (SELECT 1 FROM upstream_tag n
                WHERE n.repository = u.repository AND n.tag = u.tag AND n.since > u.since AND n.since > ?3)"""
"""The tags of the repository ?1 that have pointed at one of the manifests ?2 (JSON), and have moved to another manifest
after the time ?3. CROSS JOIN keeps SQLite from reading all tags of the repository."""
_IS_DOWNLOADING = """
SELECT 1 FROM json_each(?1) i JOIN manifest_blob g ON g.manifest = i.value
 WHERE g.digest IN (SELECT value FROM json_each(?2)) LIMIT 1"""
_LACKS_BLOB = """
SELECT 1 FROM json_each(?1) i JOIN manifest_blob g ON g.manifest = i.value
 WHERE NOT EXISTS (SELECT 1 FROM blob b JOIN blob_link l ON l.blob = b.id
                    WHERE b.digest = g.digest AND l.repository = g.repository) LIMIT 1"""
_LINKED_BLOBS = """
SELECT DISTINCT b.id, b.digest FROM json_each(?1) i JOIN manifest_blob g ON g.manifest = i.value
  JOIN blob b ON b.digest = g.digest JOIN blob_link l ON l.blob = b.id AND l.repository = g.repository"""
_UNLINKED_SIZE = "SELECT size FROM blob WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM blob_link WHERE blob = ?1)"
_END_OF_PAGE = """
SELECT repository, digest FROM collect_queue WHERE (repository, digest) > (?, ?)
 ORDER BY repository, digest LIMIT 1 OFFSET ?"""
_UNUSED_LINKS = """
SELECT q.repository, b.id, q.digest FROM collect_queue q CROSS JOIN usage_member m ON m.repository = q.repository
  CROSS JOIN usage_scope s ON s.id = m.scope CROSS JOIN blob b ON b.digest = q.digest
  CROSS JOIN blob_link l ON l.repository = q.repository AND l.blob = b.id
 WHERE (q.repository, q.digest) > (?5, ?6) AND (q.repository, q.digest) <= (?7, ?8)
   AND s.upstream IN (SELECT value FROM json_each(?1)) AND (l.needed <= ?2 OR l.needed > ?3)
   AND NOT EXISTS (SELECT 1 FROM manifest_blob g WHERE g.repository = q.repository AND g.digest = q.digest)
 ORDER BY q.repository, q.digest LIMIT ?4"""
"""The unused links between two positions in the collect queue. The tables `usage_member` and `usage_scope` give the
upstream of a repository. The column `needed` of a link is the time at which a client last used the blob in the
repository. CROSS JOIN makes SQLite begin with the collect queue, instead of reading all links of the store."""

UnusedLink = tuple[int, int, Digest]
"""An unused link: the row id of its repository, the row id of its blob, and the digest of its blob."""
QueuePosition = tuple[int, str]
"""A position in the collect queue: the columns `repository` and `digest` of a row."""


@dataclass(frozen=True, slots=True)
class Image:
    """An image.

    - `root`, `digest`: row id and digest of the root manifest.
    - `repository`, `name`: row id and stored name of the repository.
    - `family`: row ids of all manifests of the image, root first.
    - `removable`: row ids of the manifests that an eviction of the image deletes, root first. A child or referrer stays
      if it has a tag, if an index that stays lists it, or if its subject stays.
    - `last_pulled`: when a manifest of the family was last pulled or stored, in seconds since 1970."""

    root: int
    repository: int
    name: RepositoryName
    digest: Digest
    family: tuple[int, ...]
    removable: tuple[int, ...]
    last_pulled: float


def find_image(db: apsw.Connection, manifest: int, excluded_manifests: Set[int] = frozenset()) -> Image | None:
    """Returns the image whose root is `manifest`. `excluded_manifests`: row ids of manifests that count as not stored.
    Returns None in these cases:

    - The manifest is not stored.
    - The manifest is not a root: a stored index lists it, or its subject is stored."""
    row: Any = db.execute(_MANIFEST_ROW, (manifest,)).get
    if row is None or manifest in excluded_manifests:
        return None
    repository, name, digest, subject = row
    # No index may list a root, except indexes that count as not stored.
    if not _is_listed_only_by(db, manifest, excluded_manifests):
        return None
    if subject is not None and any(
        row_id not in excluded_manifests for row_id in _column(db, _STORED_SUBJECT, manifest)
    ):
        return None
    # A dictionary keeps the order and finds a key fast. An index can have ten thousand children.
    family, removable = {manifest: None}, {manifest: None}
    unvisited = deque(family)
    while unvisited:
        member = unvisited.popleft()
        for row_id in _column(db, _CHILDREN_AND_REFERRERS, member):
            if row_id in family or row_id in excluded_manifests:
                continue
            family[row_id] = None
            unvisited.append(row_id)
            if (
                member in removable
                and db.execute(_HAS_TAG, (row_id,)).get is None
                and _is_listed_only_by(db, row_id, removable, excluded_manifests)
            ):
                removable[row_id] = None
    last_pulled = db.execute(_LAST_PULLED, (json.dumps(list(family)),)).get
    return Image(
        manifest,
        repository,
        RepositoryName(name),
        Digest(digest),
        tuple(family),
        tuple(removable),
        float(last_pulled),
    )


def reason_to_keep(db: apsw.Connection, image: Image, rules: EvictionRules, now: float) -> str | None:
    """Returns the reason why the image must stay at the time `now`; None if it may be evicted. The reasons:

    - `kept`: a rule protects its repository.
    - `frozen`: a frozen tag points at one of its manifests. A *frozen* tag no longer follows the upstream.
    - `downloading`: one of its blobs is being downloaded.
    - `incomplete`: the image was pulled lately, and the repository lacks one of its blobs.
    - `served`: a cooldown holds back a newer image, and clients get this image instead (`_is_served_instead`)."""
    family = json.dumps(image.family)
    if rules.is_kept(image.name):
        return "kept"
    if db.execute(_IS_FROZEN, (image.name, family)).get is not None:
        return "frozen"
    if rules.downloads and db.execute(_IS_DOWNLOADING, (family, json.dumps(sorted(rules.downloads)))).get:
        return "downloading"
    is_pulled_lately = rules.recent_pull_after < image.last_pulled <= now + CLOCK_MARGIN_SECONDS
    if is_pulled_lately and db.execute(_LACKS_BLOB, (family,)).get is not None:
        return "incomplete"
    if rules.cooldowns is not None and _is_served_instead(db, image, rules.cooldowns, now):
        return "served"
    return None


def _is_served_instead(db: apsw.Connection, image: Image, cooldowns: Cooldowns, now: float) -> bool:
    """Returns whether clients get a manifest of this image because of a cooldown. If the upstream moves a tag to a new
    manifest, the mirror can hold the new manifest back for a time, the *cooldown*. During the cooldown, clients that
    pull the tag get an older manifest."""
    family = json.dumps(image.family)
    tag_rows: list[Any] = db.execute(_MOVED_TAGS, (image.name, family, now - cooldowns.longest)).fetchall()
    for (tag,) in tag_rows:
        rows: list[Any] = db.execute(
            "SELECT since, digest FROM upstream_tag WHERE repository = ? AND tag = ? ORDER BY since", (image.name, tag)
        ).fetchall()
        sightings = [Sighting(since, Digest(digest)) for since, digest in rows]
        served = cooldowns.digest_during_cooldown(image.name, Tag(tag), sightings)
        if served is not None and db.execute(_HAS_DIGEST, (family, served)).get is not None:
            return True
    return False


def evict_next(
    db: apsw.Connection, upstreams: Sequence[str], rules: EvictionRules, started: float, by: Actor, now: float
) -> EvictedImage | bool:
    """Implements `CachedImages.evict_next`. An eviction calls this function repeatedly. `started`: when the eviction
    began, in seconds since 1970. Returns one of these values:

    - The image that this call has evicted.
    - True: this call has evicted no image, but further images may be left to check.
    - False: no image is left to check."""
    for _ in range(MAX_CHECKED_MANIFESTS):
        next_check = _next_to_check(db, upstreams, started, now)
        if next_check is None:
            return False
        manifest, upstream, rank = next_check
        image = find_image(db, manifest)
        if image is not None and image.last_pulled > rank:
            _set_rank(db, manifest, image.last_pulled)
        elif image is None or reason_to_keep(db, image, rules, now) is not None:
            # The manifest is not a root, or the image must stay. The new rank keeps this eviction from checking the
            # manifest again.
            _set_rank(db, manifest, max(started, now))
        elif delete_tag_portion(db, image.name, image.digest, by, now, EventAction.EVICTION):
            # The image has too many tags for one transaction, so only some of its tags were deleted. The next call
            # continues with this image.
            return True
        else:
            return _evict(db, image, upstream, by, now)
    return True


def _next_to_check(
    db: apsw.Connection, upstreams: Sequence[str], started: float, now: float
) -> tuple[int, str, float] | None:
    """Returns the manifest that the eviction checks next, its upstream and its rank. Takes the earliest rank before
    `started`, or else the earliest rank in the future. Returns None if there is no such rank. This eviction has already
    checked the manifests with ranks between `started` and `now`."""
    future_start = max(started, now) + CLOCK_MARGIN_SECONDS
    for sql, bound in ((_LOWEST_RANK_BEFORE, started), (_LOWEST_RANK_AFTER, future_start)):
        candidates = []
        for upstream in upstreams:
            row: Any = db.execute(sql, (upstream, bound)).get
            if row is not None:
                candidates.append((row[0], row[1], upstream))
        if candidates:
            rank, manifest, upstream = min(candidates)
            return manifest, upstream, rank
    return None


def _set_rank(db: apsw.Connection, manifest: int, rank: float) -> None:
    db.execute("UPDATE cached_manifest SET rank = ? WHERE manifest = ?", (rank, manifest))


def _evict(db: apsw.Connection, image: Image, upstream: str, by: Actor, now: float) -> EvictedImage:
    """Deletes the removable manifests of the image and their tags. Also removes the repository's links to the blobs
    of these manifests, except to blobs that other manifests of the repository use."""
    tags = tuple(_tags(db, image.root))
    blobs: list[Any] = db.execute(_LINKED_BLOBS, (json.dumps(image.removable),)).fetchall()
    for manifest in image.removable:
        digest = db.execute("SELECT digest FROM manifest WHERE id = ?", (manifest,)).get
        # The manifest must not be restorable, because garbage collection keeps the blobs of restorable manifests. The
        # next pull fetches the manifest from the upstream again.
        delete_manifest(db, image.name, Digest(digest), by, now, restorable=False, action=EventAction.EVICTION)
    freed_bytes = 0
    for blob, digest in blobs:
        if not is_referenced(db, image.repository, Digest(digest)):
            remove_link(db, image.repository, blob, Digest(digest), now)
            freed_bytes += _unlinked_size(db, blob)
    for manifest in set(image.family) - set(image.removable):
        # The manifest may be a root now. If an earlier check has found that it was no root, its rank is the time of
        # that check (`evict_next`). With this late rank, the manifest would stay longer than images that were pulled
        # after it. So its rank becomes the time at which it was last pulled or stored.
        _set_rank(db, manifest, float(db.execute(_LAST_PULLED, (json.dumps([manifest]),)).get or now))
    return EvictedImage(upstream, image.name, image.digest, tags, len(image.removable), image.last_pulled, freed_bytes)


def _unlinked_size(db: apsw.Connection, blob: int) -> int:
    """Returns the size of the blob in bytes; 0 if a link to it exists."""
    size: Any = db.execute(_UNLINKED_SIZE, (blob,)).get
    return size or 0


def unused_links(
    db: apsw.Connection, upstreams: Sequence[str], unused_since: float, now: float, after: QueuePosition = LINKS_START
) -> tuple[list[UnusedLink], QueuePosition | None]:
    """Reads the next `QUEUE_PAGE_ROWS` rows of the collect queue after the position `after`. Returns two values:

    - The unused links in these rows, for repositories that mirror `upstreams`: at most `MAX_LINKS` links. To get
      further unused links of the same rows, remove the returned links, and call this function again with the same
      `after`.
    - The position to pass as `after` for the next rows; None if there are no more rows.

    A link is *unused* if no manifest of its repository refers to the blob, and no client has used the blob in the
    repository after the time `unused_since`. If the stored time of a use is in the future, the use does not count: the
    time was stored while the machine's clock was ahead (`storage.future_times`)."""
    future_start = now + CLOCK_MARGIN_SECONDS
    last_row: Any = db.execute(_END_OF_PAGE, (*after, QUEUE_PAGE_ROWS - 1)).get
    arguments = (json.dumps(list(upstreams)), unused_since, future_start, MAX_LINKS, *after, *(last_row or LINKS_END))
    rows: list[Any] = db.execute(_UNUSED_LINKS, arguments).fetchall()
    return [(repository, blob, Digest(digest)) for repository, blob, digest in rows], last_row


def drop_unused_links(
    db: apsw.Connection, links: Sequence[UnusedLink], unused_since: float, now: float
) -> DroppedLinks:
    """Removes each of the `links` if it is still unused (as `unused_links` defines it). Returns what was removed."""
    count = freed_bytes = 0
    for repository, blob, digest in links:
        last_used: Any = db.execute(
            "SELECT needed FROM blob_link WHERE repository = ? AND blob = ?", (repository, blob)
        ).get
        is_unused = last_used is not None and (last_used <= unused_since or last_used > now + CLOCK_MARGIN_SECONDS)
        if is_unused and not is_referenced(db, repository, digest):
            count += remove_link(db, repository, blob, digest, now)
            freed_bytes += _unlinked_size(db, blob)
    return DroppedLinks(count, freed_bytes)


def _is_listed_only_by(db: apsw.Connection, manifest: int, *allowed: Container[int]) -> bool:
    """Returns False if an index that is in none of the sets `allowed` (row ids) lists the manifest. Otherwise returns
    True, also if no index lists the manifest. Stops at the first index that is not allowed, because thousands can list
    one manifest."""
    cursor = db.execute(_PARENTS, (manifest,))
    try:
        return all(any(index in row_ids for row_ids in allowed) for (index,) in cursor)
    finally:
        cursor.close()


def _tags(db: apsw.Connection, manifest: int) -> list[Tag]:
    return [Tag(name) for name in _column(db, "SELECT name FROM tag WHERE manifest = ? ORDER BY name", manifest)]


def _column(db: apsw.Connection, sql: str, parameter: int) -> list[Any]:
    return [value for (value,) in db.execute(sql, (parameter,)).fetchall()]
