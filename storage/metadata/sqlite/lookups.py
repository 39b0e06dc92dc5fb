"""Lookups in the metadata: functions of a connection.

Each reads its statements to their end, so that none leaves a read transaction open.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

import apsw

from storage.content import Descriptor, Manifest, Page, StoredAnnotations
from storage.errors import BlobUnknown, BlobUploadUnknown, ManifestUnknown, NameUnknown
from storage.manifest_parser import MAX_TYPE_LENGTH
from storage.metadata.catalog import BlobRow, UploadRow
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import NameSet

PAGE_BYTES = 1024 * 1024
"""Approximate size of a page of referrers in bytes; a page may be larger by one referrer."""
ANNOTATIONS_BYTES = 1024 * 1024
"""Largest annotations of a manifest, in bytes of JSON, that lists show. A referrer with larger ones is listed without
any: most clients read an index of 4 MiB at most, so a larger one would hide all other referrers."""
WORK = 200_000
"""Work limit of a page of repositories, in characters of names that are read: about a tenth of a second."""
SEEK = 100
"""Cost of a statement, in the same unit."""
LOOK = 10
"""Cost of a name beside its characters."""
FIND = 2
"""Cost per character of finding the next name in the set: the name is read twice more."""
FIRST_BATCH, LARGEST_BATCH = 4, 512
"""Names that are read at once: more after a batch with many matches, fewer after one with few."""
REFERRERS_LOOKED_AT = 5_000
"""Most referrers that are read for one page."""

_BLOB = """
SELECT b.size, b.place, l.needed,
       EXISTS (SELECT 1 FROM collect_queue q WHERE q.repository = r.id AND q.digest = b.digest)
  FROM repository r JOIN blob b ON b.digest = ?2 JOIN blob_link l ON l.repository = r.id AND l.blob = b.id
 WHERE r.name = ?1"""
_BY_TAG = """
  FROM repository r JOIN tag t ON t.repository = r.id AND t.name = ?2 JOIN manifest m ON m.id = t.manifest
 WHERE r.name = ?1"""
_BY_DIGEST = """
  FROM repository r JOIN manifest m ON m.repository = r.id AND m.digest = ?2
 WHERE r.name = ?1"""
_DESCRIPTOR = "SELECT m.media_type, m.digest, m.size"
_DESCRIPTORS = (_DESCRIPTOR + _BY_TAG, _DESCRIPTOR + _BY_DIGEST)
LARGE = 64 * 1024
"""Size in bytes from which concurrent readers of a manifest share one copy."""
_MANIFEST = f"SELECT iif(m.size <= {LARGE}, m.body, NULL), m.media_type, m.digest, m.id"
_MANIFESTS = tuple(_MANIFEST + where for where in (_BY_TAG, _BY_DIGEST))
_LISTED = "SELECT name FROM repository WHERE manifests > 0 AND name >= ? ORDER BY name LIMIT ?"
_REFERRER = f"""
SELECT m.digest, m.media_type, m.size,
       iif(octet_length(m.artifact_type) <= {4 * MAX_TYPE_LENGTH}, m.artifact_type, NULL),
       iif(octet_length(m.annotations) <= {ANNOTATIONS_BYTES}, octet_length(m.annotations), 0), m.id
  FROM repository r JOIN manifest m ON m.repository = r.id
 WHERE r.name = ?1 AND m.subject = ?2 AND m.digest > ?3"""
"""Leaves out types and annotations that are too long, which earlier versions accepted."""
_REFERRERS = _REFERRER + " ORDER BY m.digest LIMIT ?4"
_REFERRERS_OF_TYPE = _REFERRER + " AND m.artifact_type = ?5 ORDER BY m.digest LIMIT ?4"
_ANNOTATIONS = "SELECT CAST(annotations AS BLOB) FROM manifest WHERE id = ?"


def repository_id(db: apsw.Connection, repo: RepositoryName) -> int:
    """Returns the repository's number. Raises NameUnknown."""
    number = db.execute("SELECT id FROM repository WHERE name = ?", (repo,)).get
    if number is None:
        raise NameUnknown(f"there is no repository {repo}")
    return int(number)


def is_known_repository(db: apsw.Connection, repo: RepositoryName) -> bool:
    return db.execute("SELECT 1 FROM repository WHERE name = ?", (repo,)).get is not None


def blob(db: apsw.Connection, repo: RepositoryName, digest: Digest) -> BlobRow:
    row = db.execute(_BLOB, (repo, digest)).get
    if row is None:
        raise BlobUnknown(f"{repo} has no blob {digest}")
    size, place, needed, fleeting = row
    return BlobRow(digest, size, place, bool(fleeting), needed)


def upload(db: apsw.Connection, repo: RepositoryName, wanted: UploadID) -> UploadRow:
    row = db.execute(
        "SELECT algorithm, offset, state, boot, owner FROM upload WHERE id = ? AND repository = ?", (wanted, repo)
    ).get
    if row is None:
        raise BlobUploadUnknown()
    return UploadRow(wanted, repo, *row)


def _one(db: apsw.Connection, by_either: Sequence[str], repo: RepositoryName, reference: Reference) -> tuple[Any, ...]:
    row: tuple[Any, ...] | None = db.execute(by_either[isinstance(reference, Digest)], (repo, reference)).get
    if row is None:
        raise ManifestUnknown(f"{repo} has no manifest {reference}")
    return row


def _digest(text: str) -> Digest:
    """Returns a digest from the database without checking it again."""
    return str.__new__(Digest, text)


def manifest_descriptor(db: apsw.Connection, repo: RepositoryName, reference: Reference) -> Descriptor:
    """Returns the descriptor without artifact type and annotations, which may be large and are not needed here."""
    media_type, digest, size = _one(db, _DESCRIPTORS, repo, reference)
    return Descriptor(media_type, _digest(digest), size)


def manifest(
    db: apsw.Connection, repo: RepositoryName, reference: Reference, large: MutableMapping[Digest, Manifest]
) -> Manifest:
    """Returns the manifest. `large`: large manifests that are in memory now."""
    body, media_type, digest, number = _one(db, _MANIFESTS, repo, reference)
    if body is not None:
        return Manifest(body, media_type, _digest(digest))
    found = large.get(digest)
    if found is None or found.media_type != media_type:
        body = db.execute("SELECT body FROM manifest WHERE id = ?", (number,)).get
        found = large[digest] = Manifest(body, media_type, _digest(digest))
    return found


def repositories(db: apsw.Connection, after: str | None, limit: int, within: NameSet) -> Page[RepositoryName]:
    first = "" if after is None else after + "\0"
    if within.has_every_name:
        names = [_name(row[0]) for row in _rows(db, first, limit + 1)]
        return Page(names[:limit], len(names) > limit)
    return _Walk(db, limit, within).page(first)


def _rows(db: apsw.Connection, first: str, most: int) -> list[Any]:
    return db.execute(_LISTED, (first, most)).fetchall()


def _name(text: str) -> RepositoryName:
    """Returns a name from the database without checking it again."""
    return str.__new__(RepositoryName, text)


class _Walk:
    """Walks through the repositories of a set for one page, and skips ranges of names that are outside the set. Ends
    the page once it has cost `WORK`, even if it has few items."""

    def __init__(self, db: apsw.Connection, limit: int, within: NameSet) -> None:
        self._db = db
        self._limit = limit
        self._within = within
        self._weight = within.match_cost
        self._found: list[RepositoryName] = []
        self._left = WORK

    def page(self, first: str) -> Page[RepositoryName]:
        """Returns the page that starts at `first`."""
        start = self._within.seek(first)
        batch = FIRST_BATCH
        while start is not None:
            rows: list[str] = [row[0] for row in _rows(self._db, start, batch)]
            self._left -= SEEK
            at, beyond = 0, start
            while at < len(rows):
                name = rows[at]
                self._left -= LOOK + len(name) * self._weight
                if name in self._within:
                    if len(self._found) == self._limit:
                        return Page(self._found, more=True)
                    self._found.append(_name(name))
                    beyond = name + "\0"
                else:
                    self._left -= FIND * len(name) * self._weight
                    following = self._within.seek(name + "\0")
                    if following is None:
                        return Page(self._found)
                    beyond = following
                if self._left <= 0:
                    return Page(self._found, more=True, next_after=name)
                at = bisect_left(rows, beyond, at + 1)
            if len(rows) < batch:
                return Page(self._found)
            passed_over = beyond > rows[-1] + "\0"
            batch = FIRST_BATCH if passed_over else min(2 * batch, LARGEST_BATCH)
            start = beyond
        return Page(self._found)


def tags(db: apsw.Connection, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
    number = repository_id(db, repo)
    rows = db.execute(
        "SELECT name FROM tag WHERE repository = ? AND name > ? ORDER BY name LIMIT ?", (number, after or "", limit + 1)
    ).fetchall()
    return Page([str.__new__(Tag, name) for (name,) in rows[:limit]], len(rows) > limit)


def referrers(
    db: apsw.Connection,
    repo: RepositoryName,
    subject: Digest,
    artifact_type: str | None,
    after: str | None,
    limit: int,
    looked_at: int = REFERRERS_LOOKED_AT,
    size: int = PAGE_BYTES,
) -> Page[Descriptor]:
    """Returns a page of referrers, limited by their number, and approximately by their bytes."""
    found: list[Descriptor] = []
    taken = 0
    asked = (repo, subject, after or "", looked_at + 1)
    if artifact_type is None:
        rows: list[Any] = db.execute(_REFERRERS, asked).fetchall()
    else:
        rows = db.execute(_REFERRERS_OF_TYPE, (*asked, artifact_type)).fetchall()
    place: str | None = None
    for digest, media_type, length, kind, annotated, number in rows[:looked_at]:
        taken += annotated + len(kind or "") + 256
        if len(found) == limit or (taken > size and (found or size < PAGE_BYTES)):
            return Page(found, more=True)
        text = db.execute(_ANNOTATIONS, (number,)).get if annotated else None
        annotations = StoredAnnotations(text) if text else None
        found.append(Descriptor(media_type, _digest(digest), length, kind, annotations))
        place = digest
    return Page(found, more=len(rows) > looked_at, next_after=place if len(rows) > looked_at else None)


def known(db: apsw.Connection, table: str, column: str, values: Iterable[str]) -> set[str]:
    """Returns the values that occur in the column."""
    sql = f"SELECT 1 FROM {table} WHERE {column} = ?"
    return {value for value in values if db.execute(sql, (value,)).get is not None}
