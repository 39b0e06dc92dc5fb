"""Reads of the metadata, as functions of a connection. Each is one statement, read to its end: none leaves a read
transaction open that it has begun."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import apsw

from storage.content import Descriptor, Manifest, Page
from storage.errors import BlobUnknown, BlobUploadUnknown, ManifestUnknown, NameUnknown
from storage.metadata.catalog import BlobRow, UploadRow
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import Names

PAGE_BYTES = 1024 * 1024
"""Annotations in one page of referrers, about."""
MISSES = 8
"""Names outside a set that are looked at, one after the other, before what they have in common is passed over."""

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
_DESCRIPTOR = "SELECT m.media_type, m.digest, m.size, m.artifact_type, m.annotations"
_DESCRIPTORS = (_DESCRIPTOR + _BY_TAG, _DESCRIPTOR + _BY_DIGEST)
_MANIFESTS = tuple("SELECT m.body, m.media_type, m.digest" + where for where in (_BY_TAG, _BY_DIGEST))
_LISTED = "SELECT name FROM repository WHERE manifests > 0 AND name >= ? AND name < ? ORDER BY name"
_REFERRERS = (
    _DESCRIPTOR
    + """
  FROM repository r JOIN manifest m ON m.repository = r.id
 WHERE r.name = ?1 AND m.subject = ?2 AND m.digest > ?3 AND (?4 IS NULL OR m.artifact_type = ?4)
 ORDER BY m.digest LIMIT ?5"""
)


def repository_id(db: apsw.Connection, repo: RepositoryName) -> int:
    """Raises NameUnknown."""
    number = db.execute("SELECT id FROM repository WHERE name = ?", (repo,)).get
    if number is None:
        raise NameUnknown(f"there is no repository {repo}")
    return int(number)


def known_repository(db: apsw.Connection, repo: RepositoryName) -> bool:
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


def _descriptor(row: tuple[Any, ...]) -> Descriptor:
    media_type, digest, size, artifact_type, annotations = row
    return Descriptor(media_type, _digest(digest), size, artifact_type, json.loads(annotations or "null"))


def _digest(text: str) -> Digest:
    """A digest from the database: it was checked when it came."""
    return str.__new__(Digest, text)


def manifest_descriptor(db: apsw.Connection, repo: RepositoryName, reference: Reference) -> Descriptor:
    return _descriptor(_one(db, _DESCRIPTORS, repo, reference))


def manifest(db: apsw.Connection, repo: RepositoryName, reference: Reference) -> Manifest:
    body, media_type, digest = _one(db, _MANIFESTS, repo, reference)
    return Manifest(body, media_type, _digest(digest))


def repositories(db: apsw.Connection, after: str | None, limit: int, within: Names) -> Page[RepositoryName]:
    first = "" if after is None else after + "\0"
    with closing(_listed(db, first, within)) as names:
        found = [str.__new__(RepositoryName, name) for name in islice(names, limit + 1)]
    return Page(found[:limit], len(found) > limit)


def _listed(db: apsw.Connection, first: str, within: Names) -> Generator[str]:
    """Those of the set from `first` on. Where no name can be in it, none is looked at, or only a few."""
    for part in within.ranges_from(first):
        start: str | None = part.start
        while start is not None:
            rows = db.execute(_LISTED, (start, part.stop))
            start, missed = None, 0
            try:
                for (name,) in rows:
                    if part.whole or name in within:
                        missed = 0
                        yield name
                    elif (missed := missed + 1) == MISSES:
                        start = within.beyond(name)
                        break
            finally:
                rows.close()


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
) -> Page[Descriptor]:
    found: list[Descriptor] = []
    taken = 0
    rows = db.execute(_REFERRERS, (repo, subject, after or "", artifact_type, limit + 1))
    try:
        for row in rows:
            if len(found) == limit or (found and taken > PAGE_BYTES):
                return Page(found, more=True)
            found.append(_descriptor(row))
            taken += len(row[4] or "") + 256
    finally:
        rows.close()
    return Page(found)


def known(db: apsw.Connection, table: str, column: str, values: Iterable[str]) -> set[str]:
    """Those of `values` that stand in a column."""
    sql = f"SELECT 1 FROM {table} WHERE {column} = ?"
    return {value for value in values if db.execute(sql, (value,)).get is not None}
