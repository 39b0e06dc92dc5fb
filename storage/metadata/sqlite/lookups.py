"""Lookups of repositories, manifests, tags, blobs, uploads and referrers.

Each function takes a connection, and reads all rows of its statements, so that no statement keeps a read transaction
open. A *link* is a row that lets a repository serve a blob. The *referrers* of a manifest are the manifests that have
its digest in their field `subject`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any, TypeVar

import apsw

from storage.content import Descriptor, JsonAnnotations, Manifest, Page
from storage.errors import BlobUnknown, BlobUploadUnknown, ManifestUnknown, NameUnknown
from storage.manifest_parser import MAX_TYPE_LENGTH
from storage.metadata.catalog import BlobRow, UploadRow
from storage.names import Digest, Reference, RepositoryName, Tag, UploadID
from storage.patterns import NameSet

S = TypeVar("S", bound=str)
REFERRER_PAGE_BYTES = 1024 * 1024
"""Approximate size of a full page of referrers in bytes. A page is larger only if it consists of one large referrer."""
MAX_ANNOTATIONS_BYTES = 1024 * 1024
"""A page of referrers lists a manifest without its annotations if they have more bytes of JSON than this. Most clients
refuse a page of more than 4 MiB."""
PAGE_COST_LIMIT = 200_000
"""Reading a page of repositories ends at this cost, after about 0.1 s. Matching one character of a repository's name
against the simplest set of names costs 1."""
STATEMENT_COST = 100
"""Cost of an SQL statement."""
NAME_COST = 10
"""Cost of reading a name, without matching its characters."""
SKIP_COST_FACTOR = 2
"""If the reader has read a name that is not in the set, it calls `NameSet.seek`, which returns a text. The reader reads
on at the first name that is equal to this text or sorts after it, and misses no name of the set. If `NameSet.seek`
returns None, no name of the set is left. The call costs this many times as much as matching the characters of the name
that was read."""
MIN_BATCH_NAMES, MAX_BATCH_NAMES = 4, 512
"""Smallest and largest number of names that one statement reads.

- The first statement for a page reads the smallest number of names.
- If the next statement begins directly after the last name that was read, it reads twice as many names as the statement
  before, but at most the largest number.
- If the next statement begins further on, because no name of the set lies in between, it reads the smallest number of
  names again."""
MAX_REFERRERS_READ = 5_000
"""Largest number of referrers that are read for one page."""

_BLOB = """
SELECT b.size, b.place, l.needed,
       EXISTS (SELECT 1 FROM collect_queue q WHERE q.repository = r.id AND q.digest = b.digest)
  FROM repository r JOIN blob b ON b.digest = ?2 JOIN blob_link l ON l.repository = r.id AND l.blob = b.id
 WHERE r.name = ?1"""
"""The column `needed` of a link is the time at which a client last added or requested the blob."""
_BY_TAG = """
  FROM repository r JOIN tag t ON t.repository = r.id AND t.name = ?2 JOIN manifest m ON m.id = t.manifest
 WHERE r.name = ?1"""
_BY_DIGEST = """
  FROM repository r JOIN manifest m ON m.repository = r.id AND m.digest = ?2
 WHERE r.name = ?1"""
_DESCRIPTOR_COLUMNS = "SELECT m.media_type, m.digest, m.size"
_DESCRIPTOR_STATEMENTS = (_DESCRIPTOR_COLUMNS + _BY_TAG, _DESCRIPTOR_COLUMNS + _BY_DIGEST)
"""Statements that read a descriptor: the first by tag, the second by digest."""
LARGE_MANIFEST_BYTES = 64 * 1024
"""Size of a manifest in bytes above which concurrent readers share one copy of it in memory."""
_MANIFEST_COLUMNS = f"SELECT iif(m.size <= {LARGE_MANIFEST_BYTES}, m.body, NULL), m.media_type, m.digest, m.id"
_MANIFEST_STATEMENTS = (_MANIFEST_COLUMNS + _BY_TAG, _MANIFEST_COLUMNS + _BY_DIGEST)
"""Statements that read a manifest: the first by tag, the second by digest. They read no body of a large manifest."""
_REPOSITORY_NAMES = "SELECT name FROM repository WHERE manifests > 0 AND name >= ? ORDER BY name LIMIT ?"
_SELECT_REFERRERS = f"""
SELECT m.digest, m.media_type, m.size,
       iif(octet_length(m.artifact_type) <= {4 * MAX_TYPE_LENGTH}, m.artifact_type, NULL),
       iif(octet_length(m.annotations) <= {MAX_ANNOTATIONS_BYTES}, octet_length(m.annotations), 0), m.id
  FROM repository r JOIN manifest m ON m.repository = r.id
 WHERE r.name = ?1 AND m.subject = ?2 AND m.digest > ?3 AND m.size > 0"""
"""Returns NULL instead of an artifact type that is too long (a character has at most 4 bytes). Returns the length 0 for
annotations that are too large. (Earlier versions of this registry accepted such manifests.) Leaves out damaged
manifests, whose size is 0."""
_ALL_REFERRERS = _SELECT_REFERRERS + " ORDER BY m.digest LIMIT ?4"
_REFERRERS_OF_TYPE = _SELECT_REFERRERS + " AND m.artifact_type = ?5 ORDER BY m.digest LIMIT ?4"
_ANNOTATIONS = "SELECT CAST(annotations AS BLOB) FROM manifest WHERE id = ?"


def repository_id(db: apsw.Connection, repo: RepositoryName) -> int:
    """Returns the repository's row id. Raises NameUnknown."""
    row_id = db.execute("SELECT id FROM repository WHERE name = ?", (repo,)).get
    if row_id is None:
        raise NameUnknown(f"there is no repository {repo}")
    return int(row_id)


def is_known_repository(db: apsw.Connection, repo: RepositoryName) -> bool:
    """Returns whether the repository ever had content, even if all of it was deleted."""
    return db.execute("SELECT 1 FROM repository WHERE name = ?", (repo,)).get is not None


def blob(db: apsw.Connection, repo: RepositoryName, digest: Digest) -> BlobRow:
    """Returns a blob of the repository. Raises BlobUnknown if the repository has no link to the blob. Also raises
    BlobUnknown if the blob is damaged, so that clients upload it again."""
    row = db.execute(_BLOB, (repo, digest)).get
    if row is None:
        raise BlobUnknown(f"{repo} has no blob {digest}")
    size, place, last_used, is_queued_for_collection = row
    if not place:  # `place` is the key of the bytes in the blob store, and empty if the blob is damaged
        raise BlobUnknown(
            f"the stored bytes of {digest} were damaged and are not served any more; push the image again to restore it"
        )
    return BlobRow(digest, size, place, is_queued_for_collection=bool(is_queued_for_collection), last_used=last_used)


def upload(db: apsw.Connection, repo: RepositoryName, upload_id: UploadID) -> UploadRow:
    """Returns the upload session. Raises BlobUploadUnknown if the repository has no such session. The column
    `boot` serves to find out whether a reboot may have lost bytes of the upload (`BlobStore.boot`)."""
    row = db.execute(
        "SELECT algorithm, offset, state, boot, owner FROM upload WHERE id = ? AND repository = ?", (upload_id, repo)
    ).get
    if row is None:
        raise BlobUploadUnknown()
    return UploadRow(upload_id, repo, *row)


def _manifest_row(
    db: apsw.Connection, sql_by_tag_and_by_digest: Sequence[str], repo: RepositoryName, reference: Reference
) -> tuple[Any, ...]:
    """Returns the row of a manifest. Runs the first of the two statements if `reference` is a tag, and the second if it
    is a digest. Raises ManifestUnknown."""
    sql = sql_by_tag_and_by_digest[isinstance(reference, Digest)]  # False is the index 0, True is 1
    row: tuple[Any, ...] | None = db.execute(sql, (repo, reference)).get
    if row is None:
        raise ManifestUnknown(f"{repo} has no manifest {reference}")
    return row


def _digest(text: str) -> Digest:
    """Makes a digest from a text in the database. Skips the checks of `Digest`: only checked digests are stored."""
    return str.__new__(Digest, text)


def damaged_manifest_error(digest: str) -> ManifestUnknown:
    """Returns the error for a damaged manifest, which has an empty body and the size 0."""
    return ManifestUnknown(
        f"the stored manifest {digest} was damaged and is not served any more; push the image again to restore it"
    )


def manifest_descriptor(db: apsw.Connection, repo: RepositoryName, reference: Reference) -> Descriptor:
    """Returns the descriptor of a manifest: its media type, digest and size, without its artifact type and annotations.
    Raises ManifestUnknown."""
    media_type, digest, size = _manifest_row(db, _DESCRIPTOR_STATEMENTS, repo, reference)
    if not size:
        raise damaged_manifest_error(digest)
    return Descriptor(media_type, _digest(digest), size)


def manifest(
    db: apsw.Connection, repo: RepositoryName, reference: Reference, large_manifests: MutableMapping[Digest, Manifest]
) -> Manifest:
    """Returns the manifest. Raises ManifestUnknown.

    `large_manifests`: the manifests in use that are larger than `LARGE_MANIFEST_BYTES`, by digest. Returns a large
    manifest from this mapping, so that concurrent readers share one copy. If the mapping lacks the manifest, first
    reads it from the database and adds it to the mapping."""
    body, media_type, digest, manifest_id = _manifest_row(db, _MANIFEST_STATEMENTS, repo, reference)
    if body is not None:
        if not body:
            raise damaged_manifest_error(digest)
        return Manifest(body, media_type, _digest(digest))
    shared = large_manifests.get(digest)
    if shared is None or shared.media_type != media_type:
        body = db.execute("SELECT body FROM manifest WHERE id = ?", (manifest_id,)).get
        shared = large_manifests[digest] = Manifest(body, media_type, _digest(digest))
    return shared


def repository_page(
    db: apsw.Connection, after: str | None, limit: int, within: NameSet, *, cost_limit: int = PAGE_COST_LIMIT
) -> Page[RepositoryName]:
    """Returns a page of the names of repositories, in order. Leaves out repositories without manifests, and names that
    are not in the set `within`. The page starts with the first name that sorts after `after`; if `after` is None, with
    the first of all names.

    The page has at most `limit` names. It ends earlier if reading it has cost `cost_limit`; then `Page.more` is true.
    To read the next page, pass `Page.next_after` as `after`, or the page's last name if `next_after` is None."""
    start = "" if after is None else after + "\0"
    if within.has_every_name:
        names = [_repository_name(name) for name in _names_from(db, start, limit + 1)]
        return Page(names[:limit], len(names) > limit)
    return _RepositoryPageReader(db, limit, within, cost_limit).read(start)


def _names_from(db: apsw.Connection, start: str, limit: int) -> list[str]:
    """Returns at most `limit` names of repositories that have manifests, in order, from the first name that is equal to
    `start` or sorts after it."""
    rows: list[Any] = db.execute(_REPOSITORY_NAMES, (start, limit)).fetchall()
    return [name for (name,) in rows]


def _repository_name(text: str) -> RepositoryName:
    """Makes a name from a text in the database. Skips the checks of `RepositoryName`: only checked names are stored."""
    return str.__new__(RepositoryName, text)


class _RepositoryPageReader:
    """Reads one page of the repositories whose names are in the set `within`. Skips ranges of names outside the set.
    Ends the page when reading it has cost `cost_limit`, even if the page has few names or none."""

    def __init__(self, db: apsw.Connection, limit: int, within: NameSet, cost_limit: int) -> None:
        self._db = db
        self._limit = limit
        self._within = within
        self._cost_per_character = within.match_cost
        self._names: list[RepositoryName] = []
        self._remaining_cost = cost_limit

    def read(self, start: str) -> Page[RepositoryName]:
        """Returns the page. Its first name is the first one in the set that is equal to `start` or sorts after it."""
        next_name = self._within.seek(start)  # no name of the set lies between `start` and this text
        batch_size = MIN_BATCH_NAMES
        while next_name is not None:
            names = _names_from(self._db, next_name, batch_size)
            self._remaining_cost -= STATEMENT_COST
            index = 0
            while index < len(names):
                name = names[index]
                self._remaining_cost -= NAME_COST + len(name) * self._cost_per_character
                if name in self._within:
                    if len(self._names) == self._limit:
                        return Page(self._names, more=True)
                    self._names.append(_repository_name(name))
                    next_name = name + "\0"  # the text that follows `name` in order
                else:
                    self._remaining_cost -= SKIP_COST_FACTOR * len(name) * self._cost_per_character
                    next_in_set = self._within.seek(name + "\0")
                    if next_in_set is None:
                        return Page(self._names)
                    next_name = next_in_set
                if self._remaining_cost <= 0:
                    return Page(self._names, more=True, next_after=name)
                index = bisect_left(names, next_name, index + 1)  # skips names of the batch that are outside the set
            if len(names) < batch_size:
                return Page(self._names)
            has_skipped = next_name > names[-1] + "\0"
            batch_size = MIN_BATCH_NAMES if has_skipped else min(2 * batch_size, MAX_BATCH_NAMES)
        return Page(self._names)


def tag_page(db: apsw.Connection, repo: RepositoryName, after: str | None, limit: int) -> Page[Tag]:
    """Returns a page of at most `limit` tags of the repository, in order. The page starts with the first tag that sorts
    after `after`; if `after` is None, with the first of all tags. Raises NameUnknown if there is no such repository."""
    repository = repository_id(db, repo)
    rows = db.execute(
        "SELECT name FROM tag WHERE repository = ? AND name > ? ORDER BY name LIMIT ?",
        (repository, after or "", limit + 1),
    ).fetchall()
    return Page([str.__new__(Tag, name) for (name,) in rows[:limit]], len(rows) > limit)


def referrer_page(
    db: apsw.Connection,
    repo: RepositoryName,
    subject: Digest,
    artifact_type: str | None,
    after: str | None,
    limit: int,
    max_read: int = MAX_REFERRERS_READ,
    max_page_bytes: int = REFERRER_PAGE_BYTES,
) -> Page[Descriptor]:
    """Returns a page of the manifests whose subject is `subject`, in the order of their digests. The page starts with
    the first digest that sorts after `after`; if `after` is None, with the first of all digests. With `artifact_type`,
    the page has only manifests of that type.

    The page has at most `limit` referrers and approximately `max_page_bytes` bytes. At most `max_read` rows are read.
    If the first referrer alone is larger than `max_page_bytes`, the page depends on `max_page_bytes`:

    - Less than `REFERRER_PAGE_BYTES`: the page is empty, and its `more` is true. To get the referrer, the caller can
      call this function again with `REFERRER_PAGE_BYTES`.
    - `REFERRER_PAGE_BYTES` or more: the page has only this referrer, and is larger than `max_page_bytes`. So there is a
      page for every referrer."""
    descriptors: list[Descriptor] = []
    page_bytes = 0
    parameters = (repo, subject, after or "", max_read + 1)
    if artifact_type is None:
        rows: list[Any] = db.execute(_ALL_REFERRERS, parameters).fetchall()
    else:
        rows = db.execute(_REFERRERS_OF_TYPE, (*parameters, artifact_type)).fetchall()
    last_digest: str | None = None
    for digest, media_type, size, referrer_type, annotations_bytes, manifest_id in rows[:max_read]:
        page_bytes += annotations_bytes + len(referrer_type or "") + 256  # 256: the other fields as JSON
        if len(descriptors) == limit or (
            page_bytes > max_page_bytes and (descriptors or max_page_bytes < REFERRER_PAGE_BYTES)
        ):
            return Page(descriptors, more=True)
        text = db.execute(_ANNOTATIONS, (manifest_id,)).get if annotations_bytes else None
        annotations = JsonAnnotations(text) if text else None
        descriptors.append(Descriptor(media_type, _digest(digest), size, referrer_type, annotations))
        last_digest = digest
    has_more = len(rows) > max_read
    return Page(descriptors, more=has_more, next_after=last_digest if has_more else None)


def existing_values(db: apsw.Connection, table: str, column: str, values: Iterable[S]) -> set[S]:
    """Returns those of `values` that the column `column` of the table `table` contains."""
    sql = f"SELECT 1 FROM {table} WHERE {column} = ?"
    return {value for value in values if db.execute(sql, (value,)).get is not None}
