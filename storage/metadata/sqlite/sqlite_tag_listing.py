"""Reads lists of tags, with facts about their manifests, from the metadata database (`SqliteTagListing`).

SQLite filters the names of all tags of the repository, and sorts them by name or by the time of the push. This takes
some 30 ms for 100,000 tags, and does not hold the global interpreter lock. The orders by size and by version
(`storage.metadata.sqlite.version_lists`) are computed in Python. The facts are read only for the tags on one page.

- A *referrer* of a manifest is a manifest whose `subject` field has the digest of that manifest.
- A *referrer tag*, such as `sha256-….sig`, has the digest of a manifest in its name. The tag points, for example, at a
  signature of this manifest.
- The *tree* of a manifest contains the manifest itself, and all manifests that it lists directly or through other
  indexes.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import apsw

from storage.errors import ManifestUnknown
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.immutable_database import ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.version_lists import VersionListCache
from storage.names import Digest, RepositoryName, Tag
from storage.tag_listing import (
    BUNDLE_PREDICATE_ANNOTATION,
    BUNDLE_TYPE_PREFIX,
    MAX_PAGE_TAGS,
    MAX_READ_MANIFESTS,
    MAX_SORTED_BY_SIZE,
    MAX_TAGS_OF_MANIFEST,
    MAX_TREE_MANIFESTS,
    UNKNOWN_PREDICATE,
    ListedTag,
    ManifestFacts,
    TagCursor,
    TagOrder,
    TagPage,
    TagQuery,
)

_MAX_BLOB_ROWS: Final = 100_000
"""Largest number of references to blobs that one call reads to add up sizes. To read them takes about 0.2 s."""
_MAX_REFERRERS: Final = 20
"""For one manifest, at most this number of each of the following is read:

- its referrer tags;
- its referrers that are Sigstore bundles;
- the distinct artifact types of its referrers."""
_REFERRER_GLOB: Final = "sha256-" + 64 * "[0-9a-f]"
_MATCHES: Final = f"""
 WHERE repository = ?1 AND (?2 = '' OR instr(lower(name), ?2) > 0)
   AND (?3 OR NOT (name GLOB '{_REFERRER_GLOB}' OR name GLOB '{_REFERRER_GLOB}.?*'))"""
"""Condition on a tag. ?1: the row id of the tag's repository. ?2: a text in lower case that the tag's name must
contain, ignoring case; an empty text: any name matches. ?3: whether referrer tags match."""
_BY_NAME: Final = f"SELECT name FROM tag{_MATCHES} AND name > ?4 ORDER BY name LIMIT ?5"
_BY_NAME_DESCENDING: Final = f"SELECT name FROM tag{_MATCHES} AND (?4 = '' OR name < ?4) ORDER BY name DESC LIMIT ?5"
_PUSHED: Final = f"SELECT name, updated FROM tag{_MATCHES}"
_BY_PUSHED: Final = f"{_PUSHED} AND (?4 IS NULL OR (updated, name) > (?4, ?5)) ORDER BY updated, name LIMIT ?6"
_BY_PUSHED_DESCENDING: Final = (
    f"{_PUSHED} AND (?4 IS NULL OR (updated, name) < (?4, ?5)) ORDER BY updated DESC, name DESC LIMIT ?6"
)
_WITH_MANIFEST: Final = f"SELECT name, manifest FROM tag{_MATCHES} LIMIT ?4"
_TAG: Final = """
SELECT t.name, t.updated, t.manifest,
       (SELECT h.actor FROM tag_history h WHERE h.repository = t.repository AND h.tag = t.name
         ORDER BY h.id DESC LIMIT 1)
  FROM tag t WHERE t.repository = ?1 AND t.name = ?2"""
_MANIFEST: Final = "SELECT digest, media_type, size, artifact_type, pushed FROM manifest WHERE id = ?1"
_TREE: Final = """
WITH RECURSIVE tree (id) AS (
       SELECT ?1
        UNION
       SELECT m.id FROM tree t JOIN manifest_child c ON c.manifest = t.id
         JOIN manifest m ON m.repository = c.repository AND m.digest = c.digest
        LIMIT ?2)
SELECT json_group_array(id), count(*) FROM tree"""
"""Reads the tree of the manifest ?1, but at most ?2 manifests. Returns their row ids (a JSON array), and their
number."""
_PULLS: Final = """
SELECT max(iif(pulls > 0, last, NULL)), coalesce(sum(pulls), 0) FROM manifest_pull
 WHERE manifest IN (SELECT value FROM json_each(?1))"""
_BLOBS: Final = """
WITH named AS (
       SELECT g.repository, g.digest FROM json_each(?1) j JOIN manifest_blob g ON g.manifest = j.value LIMIT ?2),
     stored AS (
       SELECT DISTINCT b.id, b.size FROM named n JOIN blob b ON b.digest = n.digest AND b.place <> ''
         JOIN blob_link l ON l.repository = n.repository AND l.blob = b.id)
SELECT (SELECT count(*) FROM named), (SELECT coalesce(sum(size), 0) FROM stored)"""
"""Reads at most ?2 references to blobs. ?1: the row ids of the manifests that have the references (a JSON array).
Returns the number of references that were read, and the total size of the stored blobs. Several references to the same
blob count its size once. The column `place` is the key of a blob's bytes in the blob store. If the bytes were found
damaged or missing, `place` is empty, and the blob does not count as stored."""
_NEXT_TYPE: Final = """
SELECT min(artifact_type) FROM manifest WHERE repository = ?1 AND subject = ?2 AND artifact_type > ?3"""
_MAX_BUNDLE_ANNOTATION_BYTES: Final = 8 * 1024
"""The predicate type of a Sigstore bundle is read only if the bundle's annotations have at most this size."""
_BUNDLE_PREDICATES: Final = f"""
SELECT DISTINCT ifnull(json_extract(annotations, '$."{BUNDLE_PREDICATE_ANNOTATION}"'), '') FROM (
  SELECT iif(octet_length(annotations) <= {_MAX_BUNDLE_ANNOTATION_BYTES}, CAST(annotations AS TEXT),
              iif(annotations IS NULL, '{{}}', '{{"{BUNDLE_PREDICATE_ANNOTATION}": "{UNKNOWN_PREDICATE}"}}'))
           AS annotations
    FROM manifest WHERE repository = ?1 AND subject = ?2 AND artifact_type >= ?3 AND artifact_type < ?4
   LIMIT {_MAX_REFERRERS})
 ORDER BY 1"""
"""Returns the distinct predicate types of the Sigstore bundles whose subject is ?2. For a bundle without a predicate
type, returns an empty text. For a bundle whose annotations are too long, returns `UNKNOWN_PREDICATE`. A manifest is a
bundle if its artifact type is at least ?3 and below ?4."""
_REFERRER_TAGS: Final = f"""
SELECT substr(name, ?4) FROM tag WHERE repository = ?1 AND name > ?2 AND name < ?3 LIMIT {_MAX_REFERRERS}"""
_TAGS_OF: Final = f"SELECT name FROM tag WHERE manifest = ?1 ORDER BY name LIMIT {MAX_TAGS_OF_MANIFEST}"
_PRESENT_MANIFESTS: Final = """
SELECT m.digest, m.size FROM json_each(?2) j JOIN manifest m ON m.repository = ?1 AND m.digest = j.value
 WHERE m.size > 0"""
_PRESENT_BLOBS: Final = """
SELECT b.digest, b.size FROM json_each(?2) j JOIN blob b ON b.digest = j.value AND b.place <> ''
  JOIN blob_link l ON l.repository = ?1 AND l.blob = b.id"""


class SqliteTagListing:
    """Implements `storage.tag_listing.TagListing`, which describes the methods."""

    def __init__(self, scans: ScanThread | ImmutableScans) -> None:
        """`scans` runs the lookups. It must not be the thread that looks up rows for clients of `/v2`, so that these
        clients do not wait for lists."""
        self._scans = scans
        self._versions = VersionListCache()

    async def page(self, repo: RepositoryName, query: TagQuery, after: TagCursor | None, limit: int) -> TagPage:
        assert 0 < limit <= MAX_PAGE_TAGS
        return await self._scans.run(lambda db: self._page(db, repo, query, after, limit))

    async def tag(self, repo: RepositoryName, tag: Tag) -> ListedTag:
        def read(db: apsw.Connection) -> ListedTag:
            repository = lookups.repository_id(db, repo)
            listed = _FactsReader(db, repository).tag(tag)
            if listed is None:
                raise ManifestUnknown(f"{repo} has no tag {tag}")
            return listed

        return await self._scans.run(read)

    async def manifest(self, repo: RepositoryName, digest: Digest) -> ManifestFacts:
        def read(db: apsw.Connection) -> ManifestFacts:
            repository = lookups.repository_id(db, repo)
            sql = "SELECT id FROM manifest WHERE repository = ? AND digest = ?"
            row_id = db.execute(sql, (repository, digest)).get
            facts = None if row_id is None else _FactsReader(db, repository).manifest(row_id, with_tags=True)
            if facts is None:
                raise ManifestUnknown(f"{repo} has no manifest {digest}")
            return facts

        return await self._scans.run(read)

    async def stored_sizes(
        self, repo: RepositoryName, manifests: Collection[Digest], blobs: Collection[Digest] = ()
    ) -> Mapping[Digest, int]:
        def read(db: apsw.Connection) -> Mapping[Digest, int]:
            repository = lookups.repository_id(db, repo)
            rows: list[Any] = []
            for sql, digests in ((_PRESENT_MANIFESTS, manifests), (_PRESENT_BLOBS, blobs)):
                if digests:
                    rows += db.execute(sql, (repository, json.dumps(list(digests)))).fetchall()
            return {Digest(digest): size for digest, size in rows}

        return await self._scans.run(read)

    def _page(
        self, db: apsw.Connection, repo: RepositoryName, query: TagQuery, after: TagCursor | None, limit: int
    ) -> TagPage:
        repository = lookups.repository_id(db, repo)
        reader = _FactsReader(db, repository)
        order = query.order
        if order is TagOrder.VERSION:
            positions = [TagCursor(name) for name in self._versions.page(db, repository, query, after, limit + 1)]
        elif order is TagOrder.PUSHED:
            positions = _by_push(db, repository, query, after, limit + 1)
        elif order is TagOrder.SIZE and (sizes := _sorted_sizes(db, repository, query, reader)) is not None:
            positions = _by_size(sizes, query, after, limit + 1)
        else:
            if order is TagOrder.SIZE:  # too many tags or manifests; `_sorted_sizes` may have used up `reader`'s limits
                reader = _FactsReader(db, repository)
            order = TagOrder.NAME
            positions = _by_name(db, repository, query, after, limit + 1)
        # Leaves out tags that were deleted after their names were read.
        listed_tags = [tag for position in positions[:limit] if (tag := reader.tag(position.name)) is not None]
        return TagPage(listed_tags, order, positions[limit - 1] if len(positions) > limit else None)


def _match_values(repository: int, query: TagQuery) -> tuple[object, ...]:
    """Returns the values of the parameters ?1 to ?3 in `_MATCHES`."""
    return repository, query.text.lower(), query.includes_referrer_tags


def _by_name(
    db: apsw.Connection, repository: int, query: TagQuery, after: TagCursor | None, limit: int
) -> list[TagCursor]:
    sql = _BY_NAME_DESCENDING if query.is_descending else _BY_NAME
    values = (*_match_values(repository, query), after.name if after else "", limit)
    return [TagCursor(name) for (name,) in _rows(db, sql, *values)]


def _by_push(
    db: apsw.Connection, repository: int, query: TagQuery, after: TagCursor | None, limit: int
) -> list[TagCursor]:
    sql = _BY_PUSHED_DESCENDING if query.is_descending else _BY_PUSHED
    position = (after.sort_value, after.name) if after else (None, "")
    return [
        TagCursor(name, pushed) for name, pushed in _rows(db, sql, *_match_values(repository, query), *position, limit)
    ]


def _sorted_sizes(
    db: apsw.Connection, repository: int, query: TagQuery, reader: _FactsReader
) -> list[tuple[int, str]] | None:
    """Returns the sizes and names of the matching tags, the smallest first. Returns None if more than
    `MAX_SORTED_BY_SIZE` tags match, or if their trees have too many manifests (`can_read_more_manifests`)."""
    rows = _rows(db, _WITH_MANIFEST, *_match_values(repository, query), MAX_SORTED_BY_SIZE + 1)
    if len(rows) > MAX_SORTED_BY_SIZE:
        return None
    sizes = []
    for name, manifest in rows:
        sizes.append((reader.stored_bytes(manifest) or 0, name))
        if not reader.can_read_more_manifests:
            return None
    return sorted(sizes)


def _by_size(sizes: Sequence[tuple[int, str]], query: TagQuery, after: TagCursor | None, limit: int) -> list[TagCursor]:
    ordered = [(size, name) for size, name in (reversed(sizes) if query.is_descending else sizes)]
    if after is not None:
        position = (after.sort_value, after.name)
        ordered = [key for key in ordered if (key < position if query.is_descending else key > position)]
    return [TagCursor(name, size) for size, name in ordered[:limit]]


class _FactsReader:
    """Reads facts about the tags and manifests of one repository, for one call. One reader reads at most
    `_MAX_BLOB_ROWS` references to blobs, and at most `MAX_READ_MANIFESTS` manifests of trees."""

    def __init__(self, db: apsw.Connection, repository: int) -> None:
        self._db = db
        self._repository = repository
        self._remaining_blob_rows = _MAX_BLOB_ROWS
        self._remaining_manifests = MAX_READ_MANIFESTS
        # Results of `_tree`, `stored_bytes` and `manifest`, by row id of the manifest
        self._trees: dict[int, tuple[str, bool]] = {}
        self._sizes: dict[int, int | None] = {}
        self._manifests: dict[int, ManifestFacts | None] = {}

    @property
    def can_read_more_manifests(self) -> bool:
        """Whether fewer than `MAX_READ_MANIFESTS` manifests of trees were read so far."""
        return self._remaining_manifests > 0

    def tag(self, name: str) -> ListedTag | None:
        """Returns a tag with its facts; None if the tag does not exist."""
        row: Any = self._db.execute(_TAG, (self._repository, name)).get
        if row is None:
            return None
        _, pushed, row_id, actor = row
        if row_id not in self._manifests:
            self._manifests[row_id] = self.manifest(row_id)
        manifest = self._manifests[row_id]
        return None if manifest is None else ListedTag(Tag(name), pushed, actor, manifest)

    def manifest(self, row_id: int, *, with_tags: bool = False) -> ManifestFacts | None:
        """Returns the facts about a manifest; None if the manifest does not exist."""
        row: Any = self._db.execute(_MANIFEST, (row_id,)).get
        if row is None:
            return None
        digest, media_type, size, artifact_type, pushed = row
        last_pulled, pulls = self._db.execute(_PULLS, (self._tree(row_id)[0],)).get
        return ManifestFacts(
            digest=Digest(digest),
            media_type=media_type,
            size=size,
            artifact_type=artifact_type,
            stored_at=pushed,
            last_pulled=last_pulled,
            pulls=pulls,
            stored_bytes=self.stored_bytes(row_id),
            referrer_types=self._referrer_types(digest),
            bundle_predicates=self._bundle_predicates(digest),
            referrer_suffixes=self._referrer_suffixes(digest),
            tags=tuple(Tag(name) for (name,) in _rows(self._db, _TAGS_OF, row_id)) if with_tags else (),
        )

    def stored_bytes(self, row_id: int) -> int | None:
        """Returns the total size of the stored blobs of a manifest's tree; None if the tree exceeds a limit."""
        if row_id not in self._sizes:
            self._sizes[row_id] = self._read_stored_bytes(row_id)
        return self._sizes[row_id]

    def _read_stored_bytes(self, row_id: int) -> int | None:
        tree, is_complete = self._tree(row_id)
        if not is_complete:
            return None
        rows, size = self._db.execute(_BLOBS, (tree, self._remaining_blob_rows + 1)).get
        if rows > self._remaining_blob_rows:
            return None
        self._remaining_blob_rows -= rows
        return int(size)

    def _tree(self, row_id: int) -> tuple[str, bool]:
        """Returns the row ids of the manifests in a manifest's tree, as a JSON array, and whether this array is
        complete."""
        if row_id not in self._trees:
            limit = min(MAX_TREE_MANIFESTS, self._remaining_manifests)
            # `limit + 1` is at least 1, so `ids` always contains `row_id`.
            ids, count = self._db.execute(_TREE, (row_id, limit + 1)).get
            self._trees[row_id] = ids, count <= limit
            self._remaining_manifests -= min(count, limit)
        return self._trees[row_id]

    def _referrer_types(self, digest: str) -> tuple[str, ...]:
        """Returns at most `_MAX_REFERRERS` distinct artifact types of a manifest's referrers. Finds each type with one
        lookup in a database index, and does not read all referrers."""
        types: list[str] = []
        while len(types) < _MAX_REFERRERS:
            values = (self._repository, digest, types[-1] if types else "")
            artifact_type = self._db.execute(_NEXT_TYPE, values).get
            if artifact_type is None:
                break
            types.append(artifact_type)
        return tuple(types)

    def _bundle_predicates(self, digest: str) -> tuple[str, ...]:
        types = BUNDLE_TYPE_PREFIX, f"{BUNDLE_TYPE_PREFIX}\U0010ffff"
        return tuple(
            predicate for (predicate,) in _rows(self._db, _BUNDLE_PREDICATES, self._repository, digest, *types)
        )

    def _referrer_suffixes(self, digest: str) -> tuple[str, ...]:
        """Returns the texts after the digest in the names of the manifest's referrer tags, such as `.sig`."""
        prefix = digest.replace(":", "-", 1)
        # Finds the names that begin with `{prefix}.`: in byte order, "/" follows ".".
        rows = _rows(self._db, _REFERRER_TAGS, self._repository, f"{prefix}.", f"{prefix}/", len(prefix) + 1)
        return tuple(suffix for (suffix,) in rows)


def _rows(db: apsw.Connection, sql: str, *values: object) -> list[Any]:
    return db.execute(sql, values).fetchall()
