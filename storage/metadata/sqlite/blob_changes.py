"""Changes of blobs, their links and upload sessions.

Each function runs inside a transaction on the given connection; the caller commits it. `now` and `before` are times in
seconds since 1970.

- A *link* is a row that lets a repository serve a blob. Several repositories may have links to the same blob.
- The *collect queue* holds what garbage collection has to look at: links of blobs to which no manifest of the
  repository refers, and blobs without any link. Collection removes a link after a grace period.
- `place` is the key under which the blob store finds the blob's bytes.
- `boot` identifies the boot of the machine during which an upload's bytes were written. Bytes that were not synced
  survive a restart of the server, but not one of the machine.
"""

from __future__ import annotations

from typing import Any

import apsw

from storage.content import Actor
from storage.errors import BlobUnknown, BlobUploadUnknown, blob_in_use
from storage.metadata.catalog import QueuedLink
from storage.metadata.sqlite.access.audit_table import record_content
from storage.names import Digest, RepositoryName, UploadID
from storage.patterns import NameSet

MAX_MOUNT_SOURCES_SEARCHED = 1_000
"""Most repositories that are searched for one from which the client may mount a blob."""
WHOLE_STORE = 0
"""Repository id in the collect queue for a blob without any link."""
_BLOB_IN_REPOSITORY = """
SELECT b.id, b.size, r.name
  FROM blob b JOIN blob_link l ON l.blob = b.id JOIN repository r ON r.id = l.repository
 WHERE b.digest = ?"""

_LINKED_BLOB = """
SELECT r.id, b.id FROM repository r JOIN blob b ON b.digest = ?2
  JOIN blob_link l ON l.repository = r.id AND l.blob = b.id
 WHERE r.name = ?1"""
_REFERRING_MANIFEST = """
SELECT m.digest FROM manifest_blob p JOIN manifest m ON m.id = p.manifest
 WHERE p.repository = ? AND p.digest = ? LIMIT 1"""


def make_repository(db: apsw.Connection, repo: RepositoryName, now: float) -> int:
    """Returns the repository's row id; inserts the repository if it is missing."""
    row_id = db.execute("SELECT id FROM repository WHERE name = ?", (repo,)).get
    if row_id is None:
        row_id = db.execute("INSERT INTO repository (name, created) VALUES (?, ?) RETURNING id", (repo, now)).get
    return int(row_id)


def is_referenced(db: apsw.Connection, repository: int, digest: Digest) -> bool:
    """Returns whether a manifest of the repository refers to the blob. `repository`: the repository's row id."""
    return (
        db.execute("SELECT 1 FROM manifest_blob WHERE repository = ? AND digest = ? LIMIT 1", (repository, digest)).get
        is not None
    )


def queue_for_collection(db: apsw.Connection, repository: int, digest: Digest, now: float) -> None:
    """Queues a repository's link to a blob, or with `WHOLE_STORE` the blob itself. If it is queued already, its grace
    period starts again at `now`."""
    db.execute(
        "INSERT INTO collect_queue (repository, digest, since) VALUES (?, ?, ?) "
        "ON CONFLICT (repository, digest) DO UPDATE SET since = excluded.since",
        (repository, digest, now),
    )


def remove_from_collect_queue(db: apsw.Connection, repository: int, digest: Digest) -> None:
    db.execute("DELETE FROM collect_queue WHERE repository = ? AND digest = ?", (repository, digest))


def add_link(
    db: apsw.Connection, repository: int, blob: int, digest: Digest, now: float, *, confirmed: bool = False
) -> None:
    """Links the blob (row id `blob`) to the repository. Queues the link if no manifest of the repository refers to the
    blob yet. `confirmed`: the blob was pushed to this repository or fetched for it from its upstream; a link that was
    confirmed once stays so."""
    db.execute(
        "INSERT INTO blob_link (repository, blob, needed, confirmed) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (repository, blob) DO UPDATE "
        "SET needed = excluded.needed, confirmed = max(confirmed, excluded.confirmed)",
        (repository, blob, now, int(confirmed)),
    )
    if not is_referenced(db, repository, digest):
        queue_for_collection(db, repository, digest, now)


def add_blob(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, size: int, place: str, upload: UploadID, now: float
) -> None:
    """Adds an uploaded blob to the repository, and deletes its upload session. Raises BlobUploadUnknown."""
    end_upload(db, upload)
    adopt_blob(db, repo, digest, size, place, now)


def adopt_blob(db: apsw.Connection, repo: RepositoryName, digest: Digest, size: int, place: str, now: float) -> None:
    """Adds a blob without an upload session to the repository. Its bytes must be in the blob store already."""
    blob = db.execute(
        "INSERT INTO blob (digest, size, place, created) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (digest) DO UPDATE SET place = excluded.place RETURNING id",
        (digest, size, place, now),
    ).get
    add_link(db, make_repository(db, repo, now), blob, digest, now, confirmed=True)


def confirm_blob(db: apsw.Connection, repo: RepositoryName, digest: Digest) -> None:
    """Stores that the repository's upstream registry also has the blob in this repository. Does nothing if the
    repository has no link to the blob."""
    db.execute(
        "UPDATE blob_link SET confirmed = 1 WHERE repository = (SELECT id FROM repository WHERE name = ?1) "
        "AND blob = (SELECT id FROM blob WHERE digest = ?2)",
        (repo, digest),
    )


def mount_blob(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor, now: float
) -> int:
    """Links a blob of another repository to `repo`, and returns the blob's size in bytes. `source`: the other
    repository, or the set of repositories that the client may read. Raises BlobUnknown."""
    if isinstance(source, NameSet):
        blob, size, holder = _find_mount_source(db, digest, source)
    else:
        row: Any = db.execute(_BLOB_IN_REPOSITORY + " AND r.name = ?", (digest, source)).get
        if row is None:
            raise BlobUnknown(f"{source} has no blob {digest}")
        blob, size, holder = row
    add_link(db, make_repository(db, repo, now), blob, digest, now)
    record_content(db, by, now, "blob.mount", repo, digest, {"from": holder})
    return int(size)


def _find_mount_source(db: apsw.Connection, digest: Digest, names: NameSet) -> tuple[int, int, str]:
    """Returns the blob's row id, its size in bytes, and a repository of the set `names` that has the blob.

    Searches a limited number of repositories, because other changes wait for this transaction; a client whose mount
    fails uploads the blob instead. Raises BlobUnknown if the search finds none."""
    max_rows = MAX_MOUNT_SOURCES_SEARCHED // names.match_cost + 1  # `match_cost`: relative cost of matching a name
    rows: list[Any] = db.execute(_BLOB_IN_REPOSITORY + " LIMIT ?", (digest, max_rows)).fetchall()
    for blob, size, holder in rows:
        if holder in names:
            return blob, size, holder
    raise BlobUnknown(f"no repository has a blob {digest}")


def need_blob(db: apsw.Connection, repo: RepositoryName, digest: Digest, now: float) -> None:
    """Stores that a client now relies on the blob being in the repository, so that collection keeps the link for
    another grace period. Raises BlobUnknown."""
    db.execute(
        "UPDATE blob_link SET needed = max(needed, ?3) WHERE repository = (SELECT id FROM repository WHERE name = ?1) "
        "AND blob = (SELECT id FROM blob WHERE digest = ?2)",
        (repo, digest, now),
    )
    if db.changes() == 0:
        raise BlobUnknown(f"{repo} has no blob {digest}")


def delete_blob(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, by: Actor, now: float, *, even_if_referenced: bool
) -> None:
    """Removes the blob from the repository. Raises BlobUnknown; Unsupported if a manifest of the repository refers
    to the blob, unless `even_if_referenced`."""
    row: Any = db.execute(_LINKED_BLOB, (repo, digest)).get
    if row is None:
        raise BlobUnknown(f"{repo} has no blob {digest}")
    repository, blob = row
    if not even_if_referenced and (referring := _referring_manifest(db, repository, digest)) is not None:
        raise blob_in_use(repo, digest, referring)
    remove_link(db, repository, blob, digest, now)
    record_content(db, by, now, "blob.delete", repo, digest)


def _referring_manifest(db: apsw.Connection, repository: int, digest: Digest) -> str | None:
    """Returns the digest of a manifest of the repository that refers to the blob; None if there is none."""
    found: str | None = db.execute(_REFERRING_MANIFEST, (repository, digest)).get
    return found


def remove_link(db: apsw.Connection, repository: int, blob: int, digest: Digest, now: float) -> bool:
    """Removes the repository's link to the blob (row id `blob`), and queues the blob if that was its last link. Returns
    False if the repository had no link."""
    db.execute("DELETE FROM blob_link WHERE repository = ? AND blob = ?", (repository, blob))
    if db.changes() == 0:
        return False
    remove_from_collect_queue(db, repository, digest)
    if db.execute("SELECT 1 FROM blob_link WHERE blob = ? LIMIT 1", (blob,)).get is None:
        queue_for_collection(db, WHOLE_STORE, digest, now)
    return True


def start_upload(
    db: apsw.Connection, upload: UploadID, repo: RepositoryName, algorithm: str, boot: str, owner: str, now: float
) -> None:
    """Stores a new upload session. `algorithm`: of the digest that is computed. `owner`: name of the actor that may
    continue the session; empty if anybody may."""
    db.execute(
        "INSERT INTO upload (id, repository, algorithm, offset, boot, started, touched, owner) "
        "VALUES (?, ?, ?, 0, ?, ?, ?, ?)",
        (upload, repo, algorithm, boot, now, now, owner),
    )


def save_upload(db: apsw.Connection, upload: UploadID, offset: int, state: bytes | None, boot: str, now: float) -> None:
    """Stores the progress of an upload session: `state` is the digest's state after `offset` bytes.

    A smaller offset from the same boot is ignored, because a process that lost the session may save late. After a
    reboot a smaller offset is stored, because bytes may have been lost. Raises BlobUploadUnknown."""
    db.execute(
        "UPDATE upload SET offset = ?2, state = ?3, boot = ?4, touched = ?5 "
        "WHERE id = ?1 AND (offset <= ?2 OR boot <> ?4)",
        (upload, offset, state, boot, now),
    )
    if db.changes() == 0 and db.execute("SELECT 1 FROM upload WHERE id = ?", (upload,)).get is None:
        raise BlobUploadUnknown()


def end_upload(db: apsw.Connection, upload: UploadID) -> None:
    """Deletes an upload session. Raises BlobUploadUnknown."""
    db.execute("DELETE FROM upload WHERE id = ?", (upload,))
    if db.changes() == 0:
        raise BlobUploadUnknown()


def drop_upload(db: apsw.Connection, upload: UploadID, before: float) -> bool:
    """Deletes an upload session that made no progress after `before`. Returns whether it deleted one."""
    db.execute("DELETE FROM upload WHERE id = ? AND touched <= ?", (upload, before))
    return db.changes() > 0


def drop_link(db: apsw.Connection, entry: QueuedLink, before: float, now: float) -> bool:
    """Removes a queued link whose grace period is over: it was queued before `before`, no manifest refers to the blob,
    and no client relied on the blob since. Returns whether it removed the link. Otherwise updates the queue: removes
    the entry if the link is gone or in use, or restarts its grace period."""
    since = db.execute(
        "SELECT since FROM collect_queue WHERE repository = ? AND digest = ?", (entry.repository, entry.digest)
    ).get
    if since is None or since > before:
        return False  # the link is not queued any more, or it was queued again and its grace period is not over
    row = db.execute(
        "SELECT l.blob, l.needed FROM blob b JOIN blob_link l ON l.blob = b.id WHERE b.digest = ? AND l.repository = ?",
        (entry.digest, entry.repository),
    ).get
    if row is None or is_referenced(db, entry.repository, entry.digest):
        remove_from_collect_queue(db, entry.repository, entry.digest)
        return False
    blob, needed = row
    if needed > before:
        queue_for_collection(db, entry.repository, entry.digest, needed)
        return False
    return remove_link(db, entry.repository, blob, entry.digest, now)


def drop_blob(db: apsw.Connection, digest: Digest) -> str | None:
    """Deletes the row of a blob without links and returns the blob's place, where the caller deletes the bytes. Returns
    None if there is no such row or a repository has a link again. Takes the blob off the queue in either case."""
    remove_from_collect_queue(db, WHOLE_STORE, digest)
    row = db.execute("SELECT id, place FROM blob WHERE digest = ?", (digest,)).get
    if row is None:
        return None
    blob, place = row
    if db.execute("SELECT 1 FROM blob_link WHERE blob = ? LIMIT 1", (blob,)).get is not None:
        return None
    db.execute("DELETE FROM blob WHERE id = ?", (blob,))
    return str(place)


def unlinked_blobs(db: apsw.Connection, limit: int) -> list[Digest]:
    """Returns at most `limit` queued blobs that have no link."""
    found: list[Any] = db.execute(
        "SELECT digest FROM collect_queue WHERE repository = ? LIMIT ?", (WHOLE_STORE, limit)
    ).fetchall()
    return [Digest(digest) for (digest,) in found]


def queued_links(db: apsw.Connection, before: float, limit: int) -> list[QueuedLink]:
    """Returns at most `limit` links that were queued before `before`, oldest first."""
    rows = db.execute(
        "SELECT repository, digest FROM collect_queue WHERE since <= ? AND repository <> ? ORDER BY since LIMIT ?",
        (before, WHOLE_STORE, limit),
    )
    found: list[Any] = rows.fetchall()
    return [QueuedLink(repository, Digest(digest)) for repository, digest in found]


def stale_uploads(db: apsw.Connection, before: float, limit: int) -> list[UploadID]:
    """Returns at most `limit` upload sessions without progress after `before`, oldest first."""
    rows = db.execute("SELECT id FROM upload WHERE touched <= ? ORDER BY touched LIMIT ?", (before, limit))
    found: list[Any] = rows.fetchall()
    return [UploadID(upload) for (upload,) in found]
