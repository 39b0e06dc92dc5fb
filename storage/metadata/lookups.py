"""Reads of the metadata, as functions of a connection. Each is one statement, read to its end: none leaves a read
transaction open that it has begun."""

from __future__ import annotations

from collections.abc import Generator, Iterable, MutableMapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import apsw

from storage.content import Descriptor, Manifest, Page, StoredAnnotations
from storage.errors import BlobUnknown, BlobUploadUnknown, ManifestUnknown, NameUnknown
from storage.metadata.catalog import BlobRow, UploadRow
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.parsing import TYPE_LENGTH
from storage.patterns import Names

PAGE_BYTES = 1024 * 1024
"""One page of referrers, about: a page may be larger by one referrer."""
ANNOTATIONS_BYTES = 1024 * 1024
"""JSON of one manifest's annotations that lists show. Beyond, a referrer stands there without any: an index that no
client takes (most read 4 MiB at most) would hide all the others."""
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
_DESCRIPTOR = "SELECT m.media_type, m.digest, m.size"
_DESCRIPTORS = (_DESCRIPTOR + _BY_TAG, _DESCRIPTOR + _BY_DIGEST)
LARGE = 64 * 1024
"""Bytes of a manifest from which on those who want the same one share it."""
_MANIFEST = f"SELECT iif(m.size <= {LARGE}, m.body, NULL), m.media_type, m.digest, m.id"
_MANIFESTS = tuple(_MANIFEST + where for where in (_BY_TAG, _BY_DIGEST))
_LISTED = "SELECT name FROM repository WHERE manifests > 0 AND name >= ? AND name < ? ORDER BY name"
_REFERRER = f"""
SELECT m.media_type, m.digest, m.size,
       iif(octet_length(m.artifact_type) <= {4 * TYPE_LENGTH}, m.artifact_type, NULL),
       iif(octet_length(m.annotations) <= {ANNOTATIONS_BYTES}, CAST(m.annotations AS BLOB), NULL)
  FROM repository r JOIN manifest m ON m.repository = r.id
 WHERE r.name = ?1 AND m.subject = ?2 AND m.digest > ?3"""
"""Types and annotations of any length came in with earlier versions; they are left where they are."""
_REFERRERS = _REFERRER + " ORDER BY m.digest LIMIT ?4"
_REFERRERS_OF_TYPE = _REFERRER + " AND m.artifact_type = ?5 ORDER BY m.digest LIMIT ?4"


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


def _referrer(row: tuple[Any, ...]) -> Descriptor:
    media_type, digest, size, artifact_type, annotations = row
    known = StoredAnnotations(annotations) if annotations else None
    return Descriptor(media_type, _digest(digest), size, artifact_type, known)


def _digest(text: str) -> Digest:
    """A digest from the database: it was checked when it came."""
    return str.__new__(Digest, text)


def manifest_descriptor(db: apsw.Connection, repo: RepositoryName, reference: Reference) -> Descriptor:
    """Without artifact type and annotations, which may be large and which nobody asks for here."""
    media_type, digest, size = _one(db, _DESCRIPTORS, repo, reference)
    return Descriptor(media_type, _digest(digest), size)


def manifest(
    db: apsw.Connection, repo: RepositoryName, reference: Reference, large: MutableMapping[Digest, Manifest]
) -> Manifest:
    """`large`: large ones that somebody has at the moment."""
    body, media_type, digest, number = _one(db, _MANIFESTS, repo, reference)
    if body is not None:
        return Manifest(body, media_type, _digest(digest))
    found = large.get(digest)
    if found is None or found.media_type != media_type:
        body = db.execute("SELECT body FROM manifest WHERE id = ?", (number,)).get
        found = large[digest] = Manifest(body, media_type, _digest(digest))
    return found


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
    asked = (repo, subject, after or "", limit + 1)
    if artifact_type is None:
        rows = db.execute(_REFERRERS, asked)
    else:
        rows = db.execute(_REFERRERS_OF_TYPE, (*asked, artifact_type))
    try:
        for row in rows:
            if len(found) == limit or taken > PAGE_BYTES:
                return Page(found, more=True)
            found.append(_referrer(row))
            taken += len(row[4] or "") + len(row[3] or "") + 256
    finally:
        rows.close()
    return Page(found)


def known(db: apsw.Connection, table: str, column: str, values: Iterable[str]) -> set[str]:
    """Those of `values` that stand in a column."""
    sql = f"SELECT 1 FROM {table} WHERE {column} = ?"
    return {value for value in values if db.execute(sql, (value,)).get is not None}
