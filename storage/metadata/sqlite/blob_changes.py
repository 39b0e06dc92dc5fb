"""Changes of blobs, their links and upload sessions: functions of a connection inside a transaction."""

from __future__ import annotations

from typing import Any

import apsw

from storage.content import Actor
from storage.errors import BlobUnknown, BlobUploadUnknown, blob_in_use
from storage.metadata.catalog import QueuedLink
from storage.metadata.sqlite.access.audit_table import record_content
from storage.names import Digest, RepositoryName, UploadID
from storage.patterns import NameSet

HOLDERS_LOOKED_AT = 1_000
"""Most repositories with a blob that are searched for one that it may be mounted from."""
EVERYWHERE = 0
"""Repository number in the collect queue for a blob that no repository has any more."""
_HELD = """
SELECT b.id, b.size, r.name
  FROM blob b JOIN blob_link l ON l.blob = b.id JOIN repository r ON r.id = l.repository
 WHERE b.digest = ?"""

_LINKED = """
SELECT r.id, b.id FROM repository r JOIN blob b ON b.digest = ?2
  JOIN blob_link l ON l.repository = r.id AND l.blob = b.id
 WHERE r.name = ?1"""
_REFERRING = """
SELECT m.digest FROM manifest_blob p JOIN manifest m ON m.id = p.manifest
 WHERE p.repository = ? AND p.digest = ? LIMIT 1"""


def make_repository(db: apsw.Connection, repo: RepositoryName, now: float) -> int:
    """Returns the repository's number; inserts the repository if it is missing."""
    number = db.execute("SELECT id FROM repository WHERE name = ?", (repo,)).get
    if number is None:
        number = db.execute("INSERT INTO repository (name, created) VALUES (?, ?) RETURNING id", (repo, now)).get
    return int(number)


def is_referred(db: apsw.Connection, repository: int, digest: Digest) -> bool:
    """Returns whether a manifest of the repository refers to the blob."""
    return (
        db.execute("SELECT 1 FROM manifest_blob WHERE repository = ? AND digest = ? LIMIT 1", (repository, digest)).get
        is not None
    )


def queue(db: apsw.Connection, repository: int, digest: Digest, now: float) -> None:
    db.execute(
        "INSERT INTO collect_queue (repository, digest, since) VALUES (?, ?, ?) "
        "ON CONFLICT (repository, digest) DO UPDATE SET since = excluded.since",
        (repository, digest, now),
    )


def unqueue(db: apsw.Connection, repository: int, digest: Digest) -> None:
    db.execute("DELETE FROM collect_queue WHERE repository = ? AND digest = ?", (repository, digest))


def link(
    db: apsw.Connection, repository: int, blob: int, digest: Digest, now: float, *, confirmed: bool = False
) -> None:
    """Adds the blob to the repository. Until a manifest refers to it, the collector may remove it after its grace.
    `confirmed`: see `confirm_blob`."""
    db.execute(
        "INSERT INTO blob_link (repository, blob, needed, confirmed) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (repository, blob) DO UPDATE "
        "SET needed = excluded.needed, confirmed = max(confirmed, excluded.confirmed)",
        (repository, blob, now, int(confirmed)),
    )
    if not is_referred(db, repository, digest):
        queue(db, repository, digest, now)


def add_blob(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, size: int, place: str, upload: UploadID, now: float
) -> None:
    end_upload(db, upload)
    adopt_blob(db, repo, digest, size, place, now)


def adopt_blob(db: apsw.Connection, repo: RepositoryName, digest: Digest, size: int, place: str, now: float) -> None:
    blob = db.execute(
        "INSERT INTO blob (digest, size, place, created) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (digest) DO UPDATE SET place = excluded.place RETURNING id",
        (digest, size, place, now),
    ).get
    link(db, make_repository(db, repo, now), blob, digest, now, confirmed=True)


def confirm_blob(db: apsw.Connection, repo: RepositoryName, digest: Digest) -> None:
    """Marks the repository's right to the blob as proven by its upstream. Does nothing if it does not have the blob."""
    db.execute(
        "UPDATE blob_link SET confirmed = 1 WHERE repository = (SELECT id FROM repository WHERE name = ?1) "
        "AND blob = (SELECT id FROM blob WHERE digest = ?2)",
        (repo, digest),
    )


def mount_blob(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor, now: float
) -> int:
    if isinstance(source, NameSet):
        blob, size, holder = _held_within(db, digest, source)
    else:
        row: Any = db.execute(_HELD + " AND r.name = ?", (digest, source)).get
        if row is None:
            raise BlobUnknown(f"{source} has no blob {digest}")
        blob, size, holder = row
    link(db, make_repository(db, repo, now), blob, digest, now)
    record_content(db, by, now, "blob.mount", repo, digest, {"from": holder})
    return int(size)


def _held_within(db: apsw.Connection, digest: Digest, names: NameSet) -> tuple[int, int, str]:
    """Returns the blob's number and size, and a repository of the set that has it. Searches a limited number: other
    changes wait for this transaction, and a client whose mount fails uploads the blob. Raises BlobUnknown."""
    most = HOLDERS_LOOKED_AT // names.match_cost + 1
    rows: list[Any] = db.execute(_HELD + " LIMIT ?", (digest, most)).fetchall()
    for blob, size, holder in rows:
        if holder in names:
            return blob, size, holder
    raise BlobUnknown(f"no repository has a blob {digest}")


def need_blob(db: apsw.Connection, repo: RepositoryName, digest: Digest, now: float) -> None:
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
    row: Any = db.execute(_LINKED, (repo, digest)).get
    if row is None:
        raise BlobUnknown(f"{repo} has no blob {digest}")
    number, blob = row
    if not even_if_referenced and (referring := _referring(db, number, digest)) is not None:
        raise blob_in_use(repo, digest, referring)
    unlink(db, number, blob, digest, now)
    record_content(db, by, now, "blob.delete", repo, digest)


def _referring(db: apsw.Connection, repository: int, digest: Digest) -> str | None:
    """Returns the digest of a manifest that refers to the blob."""
    found: str | None = db.execute(_REFERRING, (repository, digest)).get
    return found


def unlink(db: apsw.Connection, repository: int, blob: int, digest: Digest, now: float) -> bool:
    """Removes the blob from the repository, and queues it for deletion if no other has it. Returns False if it was not
    there."""
    db.execute("DELETE FROM blob_link WHERE repository = ? AND blob = ?", (repository, blob))
    if db.changes() == 0:
        return False
    unqueue(db, repository, digest)
    if db.execute("SELECT 1 FROM blob_link WHERE blob = ? LIMIT 1", (blob,)).get is None:
        queue(db, EVERYWHERE, digest, now)
    return True


def start_upload(
    db: apsw.Connection, upload: UploadID, repo: RepositoryName, algorithm: str, boot: str, owner: str, now: float
) -> None:
    db.execute(
        "INSERT INTO upload (id, repository, algorithm, offset, boot, started, touched, owner) "
        "VALUES (?, ?, ?, 0, ?, ?, ?, ?)",
        (upload, repo, algorithm, boot, now, now, owner),
    )


def save_upload(db: apsw.Connection, upload: UploadID, offset: int, state: bytes | None, boot: str, now: float) -> None:
    """Keeps the larger offset, since an owner that lost the session may save late; a new run of the machine overwrites
    it. Raises BlobUploadUnknown."""
    db.execute(
        "UPDATE upload SET offset = ?2, state = ?3, boot = ?4, touched = ?5 "
        "WHERE id = ?1 AND (offset <= ?2 OR boot <> ?4)",
        (upload, offset, state, boot, now),
    )
    if db.changes() == 0 and db.execute("SELECT 1 FROM upload WHERE id = ?", (upload,)).get is None:
        raise BlobUploadUnknown()


def end_upload(db: apsw.Connection, upload: UploadID) -> None:
    db.execute("DELETE FROM upload WHERE id = ?", (upload,))
    if db.changes() == 0:
        raise BlobUploadUnknown()


def drop_upload(db: apsw.Connection, upload: UploadID, before: float) -> bool:
    db.execute("DELETE FROM upload WHERE id = ? AND touched <= ?", (upload, before))
    return db.changes() > 0


def drop_link(db: apsw.Connection, entry: QueuedLink, before: float, now: float) -> bool:
    since = db.execute(
        "SELECT since FROM collect_queue WHERE repository = ? AND digest = ?", (entry.repository, entry.digest)
    ).get
    if since is None or since > before:
        return False  # it left the queue, or was queued again, so that its grace has started again
    row = db.execute(
        "SELECT l.blob, l.needed FROM blob b JOIN blob_link l ON l.blob = b.id WHERE b.digest = ? AND l.repository = ?",
        (entry.digest, entry.repository),
    ).get
    if row is None or is_referred(db, entry.repository, entry.digest):
        unqueue(db, entry.repository, entry.digest)
        return False
    blob, needed = row
    if needed > before:
        queue(db, entry.repository, entry.digest, needed)
        return False
    return unlink(db, entry.repository, blob, entry.digest, now)


def drop_blob(db: apsw.Connection, digest: Digest) -> str | None:
    unqueue(db, EVERYWHERE, digest)
    row = db.execute("SELECT id, place FROM blob WHERE digest = ?", (digest,)).get
    if row is None:
        return None
    blob, place = row
    if db.execute("SELECT 1 FROM blob_link WHERE blob = ? LIMIT 1", (blob,)).get is not None:
        return None
    db.execute("DELETE FROM blob WHERE id = ?", (blob,))
    return str(place)


def unlinked_blobs(db: apsw.Connection, limit: int) -> list[Digest]:
    found: list[Any] = db.execute(
        "SELECT digest FROM collect_queue WHERE repository = ? LIMIT ?", (EVERYWHERE, limit)
    ).fetchall()
    return [Digest(digest) for (digest,) in found]


def queued_links(db: apsw.Connection, before: float, limit: int) -> list[QueuedLink]:
    rows = db.execute(
        "SELECT repository, digest FROM collect_queue WHERE since <= ? AND repository <> ? ORDER BY since LIMIT ?",
        (before, EVERYWHERE, limit),
    )
    found: list[Any] = rows.fetchall()
    return [QueuedLink(repository, Digest(digest)) for repository, digest in found]


def stale_uploads(db: apsw.Connection, before: float, limit: int) -> list[UploadID]:
    rows = db.execute("SELECT id FROM upload WHERE touched <= ? ORDER BY touched LIMIT ?", (before, limit))
    found: list[Any] = rows.fetchall()
    return [UploadID(upload) for (upload,) in found]
