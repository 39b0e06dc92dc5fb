"""Changes of blobs, their links and upload sessions.

Each function runs inside a transaction on the given connection; the caller commits the transaction. `now` and `before`
are times in seconds since 1970.

- A *link* is a row that lets a repository serve a blob. Several repositories may have links to the same blob. The
  column `needed` of a link is the time at which a client last added the blob to the repository or asked for the blob.
- The *collect queue* lists what garbage collection may have to remove: blobs without a link, and links without a
  *reference* (a manifest of the repository that refers to the blob). A link stays for a *grace period* after it was
  queued.
- Garbage collection calls the functions `drop_…`. Each of them deletes one row if the row is still unused.
- `place` is the key of the blob's bytes in the blob store.
- `boot` identifies the boot of the machine during which an upload's bytes were written. A restart of the machine may
  lose bytes that were not synced to the disk; a restart of the server does not.
- `repository` and `blob` are row ids. `repo` is the name of the repository, and `digest` is the digest of the blob. The
  column `repository` of the table `upload` is an exception: it contains the name.
- `by` is the actor (an account or a command) that the audit log names.
"""

from __future__ import annotations

from typing import Any

import apsw

from storage.content import Actor
from storage.errors import BlobUnknown, BlobUploadUnknown, blob_in_use_error
from storage.metadata.catalog import LinkPreview, QueuedLink, StaleUpload, UnlinkedBlob
from storage.metadata.sqlite.access.audit_table import record_content
from storage.metadata.sqlite.upkeep import deleted_manifests, event_tables, usage_tables
from storage.metadata.sqlite.upkeep.damage_changes import delete_blob_damage, on_blob_stored
from storage.names import Digest, RepositoryName, UploadID
from storage.outbox import EventAction
from storage.patterns import NameSet

MAX_MOUNT_SOURCES_SEARCHED = 1_000
"""Approximate limit of the repositories that `mount_blob` checks to find one that has the blob and that the client may
read."""
WHOLE_STORE = 0
"""In the collect queue, the entry of a blob without a link has this value in place of a repository's row id."""
_BLOB_IN_REPOSITORY = """
SELECT b.id, b.size, r.name
  FROM blob b JOIN blob_link l ON l.blob = b.id JOIN repository r ON r.id = l.repository
 WHERE b.digest = ? AND b.place <> ''"""
"""Reads, for a mount, the blob and the repositories that have the blob. Leaves out a damaged blob, whose `place` is
empty."""
_LINKED_BLOB = """
SELECT r.id, b.id FROM repository r JOIN blob b ON b.digest = ?2
  JOIN blob_link l ON l.repository = r.id AND l.blob = b.id
 WHERE r.name = ?1"""
_QUEUED_LINKS = """
SELECT q.repository, q.digest, coalesce(r.name, ''), CASE WHEN b.place <> '' THEN b.size ELSE 0 END, q.since
  FROM collect_queue q LEFT JOIN repository r ON r.id = q.repository LEFT JOIN blob b ON b.digest = q.digest
 WHERE q.since <= ?1 AND q.repository <> ?2 AND (q.since, q.repository, q.digest) > (?3, ?4, ?5)
 ORDER BY q.since, q.repository, q.digest LIMIT ?6"""
_UNLINKED_BLOBS = """
SELECT q.digest, CASE WHEN b.place <> '' THEN b.size ELSE 0 END,
       b.id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM blob_link l WHERE l.blob = b.id)
  FROM collect_queue q LEFT JOIN blob b ON b.digest = q.digest
 WHERE q.repository = ?1 AND q.digest > ?2 ORDER BY q.digest LIMIT ?3"""
_REFERRING_MANIFEST = """
SELECT m.digest FROM manifest_blob p JOIN manifest m ON m.id = p.manifest
 WHERE p.repository = ? AND p.digest = ? LIMIT 1"""


def make_repository(db: apsw.Connection, repo: RepositoryName, now: float) -> int:
    """Returns the repository's row id. Inserts the repository if it does not exist."""
    row_id = db.execute("SELECT id FROM repository WHERE name = ?", (repo,)).get
    if row_id is None:
        row_id = db.execute("INSERT INTO repository (name, created) VALUES (?, ?) RETURNING id", (repo, now)).get
    return int(row_id)


def is_referenced(db: apsw.Connection, repository: int, digest: Digest) -> bool:
    """Returns whether a manifest of the repository refers to the blob."""
    return (
        db.execute("SELECT 1 FROM manifest_blob WHERE repository = ? AND digest = ? LIMIT 1", (repository, digest)).get
        is not None
    )


def queue_for_collection(db: apsw.Connection, repository: int, digest: Digest, now: float) -> None:
    """Puts an entry into the collect queue: the blob if `repository` is `WHOLE_STORE`, otherwise the repository's link
    to the blob. If the entry is in the queue already, its grace period starts again at `now`."""
    db.execute(
        "INSERT INTO collect_queue (repository, digest, since) VALUES (?, ?, ?) "
        "ON CONFLICT (repository, digest) DO UPDATE SET since = excluded.since",
        (repository, digest, now),
    )


def remove_from_collect_queue(db: apsw.Connection, repository: int, digest: Digest) -> None:
    """Removes an entry from the collect queue, if there is one. `repository` may be `WHOLE_STORE`."""
    db.execute("DELETE FROM collect_queue WHERE repository = ? AND digest = ?", (repository, digest))


def add_link(
    db: apsw.Connection, repository: int, blob: int, digest: Digest, now: float, *, is_confirmed: bool = False
) -> None:
    """Adds the repository's link to the blob, or updates the link if it exists. Queues the link if no manifest of the
    repository refers to the blob yet. Raises QuotaExceeded if the blob does not fit into a quota.

    `is_confirmed`: whether a client has pushed the blob to this repository, or the mirror has downloaded the blob for
    this repository from the upstream (the registry that the repository mirrors). A confirmed link stays confirmed."""
    try:
        db.execute(
            "INSERT INTO blob_link (repository, blob, needed, confirmed) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (repository, blob) DO UPDATE "
            "SET needed = excluded.needed, confirmed = max(confirmed, excluded.confirmed)",
            (repository, blob, now, int(is_confirmed)),
        )
    except apsw.ConstraintError as error:
        raise usage_tables.link_refusal(db, error, repository, blob) from None
    if not is_referenced(db, repository, digest):
        queue_for_collection(db, repository, digest, now)


def add_blob(
    db: apsw.Connection,
    repo: RepositoryName,
    digest: Digest,
    size: int,
    place: str,
    upload: UploadID,
    by: Actor,
    now: float,
) -> bool:
    """Adds an uploaded blob to the repository, and deletes the upload session `upload`. Marks a damaged blob as healed,
    and returns whether it was damaged. Raises BlobUploadUnknown if there is no such session; QuotaExceeded if the blob
    does not fit into a quota."""
    end_upload(db, upload)
    event_tables.add_blob_event(db, EventAction.BLOB_PUSH, repo, digest, size, by, now)
    return add_blob_without_upload(db, repo, digest, size, place, now)


def add_blob_without_upload(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, size: int, place: str, now: float
) -> bool:
    """Adds to the repository a blob without an upload session, such as a mirrored blob. For an uploaded blob, call
    `add_blob`. The blob store must have the blob's bytes at `place`. Marks a damaged blob as healed, and returns
    whether it was damaged. Raises QuotaExceeded if the blob does not fit into a quota."""
    blob = db.execute(
        "INSERT INTO blob (digest, size, place, created) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (digest) DO UPDATE SET place = excluded.place RETURNING id",
        (digest, size, place, now),
    ).get
    add_link(db, make_repository(db, repo, now), blob, digest, now, is_confirmed=True)
    return on_blob_stored(db, repo, digest, now)


def confirm_blob(db: apsw.Connection, repo: RepositoryName, digest: Digest) -> None:
    """Marks the repository's link to the blob as confirmed, after the upstream has reported that its repository has the
    blob. Does nothing if there is no link."""
    db.execute(
        "UPDATE blob_link SET confirmed = 1 WHERE repository = (SELECT id FROM repository WHERE name = ?1) "
        "AND blob = (SELECT id FROM blob WHERE digest = ?2)",
        (repo, digest),
    )


def mount_blob(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, source: RepositoryName | NameSet, by: Actor, now: float
) -> int:
    """Gives `repo` a link to a blob that another repository has, and returns the blob's size in bytes. `source`: the
    other repository, or the set of all repositories that the client may read. Raises BlobUnknown if no source
    repository with the blob is found; QuotaExceeded if the blob does not fit into a quota."""
    if isinstance(source, NameSet):
        blob, size, source_name = _find_mount_source(db, digest, source)
    else:
        row: Any = db.execute(_BLOB_IN_REPOSITORY + " AND r.name = ?", (digest, source)).get
        if row is None:
            raise BlobUnknown(f"{source} has no blob {digest}")
        blob, size, source_name = row
    add_link(db, make_repository(db, repo, now), blob, digest, now)
    record_content(db, by, now, "blob.mount", repo, digest, {"from": source_name})
    event_tables.add_blob_event(db, EventAction.BLOB_MOUNT, repo, digest, size, by, now)
    return int(size)


def _find_mount_source(db: apsw.Connection, digest: Digest, names: NameSet) -> tuple[int, int, str]:
    """Returns the blob's row id, its size in bytes, and a repository of the set `names` that has the blob.

    Searches only a limited number of repositories, because other changes wait for this transaction. Raises BlobUnknown
    if it finds none."""
    # The higher `match_cost` is, the longer it takes to match a name.
    max_rows = MAX_MOUNT_SOURCES_SEARCHED // names.match_cost + 1
    rows: list[Any] = db.execute(_BLOB_IN_REPOSITORY + " LIMIT ?", (digest, max_rows)).fetchall()
    for blob, size, repository_name in rows:
        if repository_name in names:
            return blob, size, repository_name
    raise BlobUnknown(f"no repository has a blob {digest}")


def touch_blob(db: apsw.Connection, repo: RepositoryName, digest: Digest, now: float) -> None:
    """Records that the registry told a client at the time `now` that the repository has the blob. Garbage collection
    keeps the link for a grace period from this time, in which the client can push a manifest that refers to the blob.
    Raises BlobUnknown if the repository has no link to the blob."""
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
    """Removes the blob from the repository. Raises BlobUnknown if the repository has no link to the blob; Unsupported
    if a manifest of the repository refers to the blob and `even_if_referenced` is false."""
    row: Any = db.execute(_LINKED_BLOB, (repo, digest)).get
    if row is None:
        raise BlobUnknown(f"{repo} has no blob {digest}")
    repository, blob = row
    if not even_if_referenced and (referring := _referring_manifest(db, repository, digest)) is not None:
        raise blob_in_use_error(repo, digest, referring)
    remove_link(db, repository, blob, digest, now)
    record_content(db, by, now, "blob.delete", repo, digest)
    event_tables.add_blob_event(db, EventAction.BLOB_DELETE, repo, digest, 0, by, now)


def _referring_manifest(db: apsw.Connection, repository: int, digest: Digest) -> str | None:
    """Returns the digest of a manifest of the repository that refers to the blob; None if there is none."""
    referring: str | None = db.execute(_REFERRING_MANIFEST, (repository, digest)).get
    return referring


def remove_link(db: apsw.Connection, repository: int, blob: int, digest: Digest, now: float) -> bool:
    """Removes the repository's link to the blob. If it was the blob's last link, queues the blob. Returns False if the
    link does not exist."""
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
    """Stores a new upload session. `algorithm`: the hash algorithm of the blob's digest, such as `sha256`. `owner`:
    name of the actor that may continue the session; empty if every client may."""
    db.execute(
        "INSERT INTO upload (id, repository, algorithm, offset, boot, started, touched, owner) "
        "VALUES (?, ?, ?, 0, ?, ?, ?, ?)",
        (upload, repo, algorithm, boot, now, now, owner),
    )


def save_upload(db: apsw.Connection, upload: UploadID, offset: int, state: bytes | None, boot: str, now: float) -> None:
    """Stores the progress of an upload session: `offset` bytes have arrived. `state` is the state of the digest's
    computation after these bytes; None if it is not saved. Raises BlobUploadUnknown if there is no such session.

    If `offset` is smaller than the stored offset, the effect depends on `boot`:

    - Same boot as the stored one: changes nothing, because another process has continued the session and stored more
      bytes.
    - Different boot: stores `offset`, because the restart of the machine may have lost bytes."""
    db.execute(
        "UPDATE upload SET offset = ?2, state = ?3, boot = ?4, touched = ?5 "
        "WHERE id = ?1 AND (offset <= ?2 OR boot <> ?4)",
        (upload, offset, state, boot, now),
    )
    if db.changes() == 0 and db.execute("SELECT 1 FROM upload WHERE id = ?", (upload,)).get is None:
        raise BlobUploadUnknown()


def end_upload(db: apsw.Connection, upload: UploadID) -> None:
    """Deletes an upload session. Raises BlobUploadUnknown if there is no such session."""
    db.execute("DELETE FROM upload WHERE id = ?", (upload,))
    if db.changes() == 0:
        raise BlobUploadUnknown()


def drop_stale_upload(db: apsw.Connection, upload: UploadID, before: float) -> bool:
    """Deletes the upload session if it made no progress after `before`. Returns whether it deleted the session."""
    db.execute("DELETE FROM upload WHERE id = ? AND touched <= ?", (upload, before))
    return db.changes() > 0


def drop_link(db: apsw.Connection, entry: QueuedLink, before: float, now: float) -> bool:
    """Removes a queued link if it is still unused and its grace period is over. Returns whether it removed the link.

    - The link is no longer in the queue, or was queued again after the time `before`: changes nothing.
    - The link no longer exists, or a manifest of the repository refers to the blob: removes only the entry from the
      queue.
    - A client pushed, mounted or requested the blob after `before`: restarts the grace period at the time of the last
      use.
    - Otherwise: first removes from the table `deleted_manifest` the manifests of the repository that were deleted at
      the time `before` or earlier. A manifest in this table can be put back, and may then need the blob. Then removes
      the link and its entry. If there are too many such manifests for one transaction, removes some of them, and keeps
      the link and its entry for the next call."""
    if not _was_queued_before(db, entry.repository_id, entry.digest, before):
        return False
    link = _unreferenced_link(db, entry.repository_id, entry.digest)
    if link is None:
        remove_from_collect_queue(db, entry.repository_id, entry.digest)
        return False
    blob, last_used = link
    if last_used > before:
        queue_for_collection(db, entry.repository_id, entry.digest, last_used)
        return False
    if not deleted_manifests.drop_of_repository(db, entry.repository_id, before):
        return False
    return remove_link(db, entry.repository_id, blob, entry.digest, now)


def preview_link(db: apsw.Connection, entry: QueuedLink, before: float) -> LinkPreview:
    """Returns what `drop_link` would do.

    - `is_dropped`: whether `drop_link` would remove the link.
    - `frees_blob`: whether the blob would lose all its links if `drop_link` were called for each of them. To let a
      caller count each freed blob once, this is True only for the link whose repository has the highest row id."""
    link = _unreferenced_link(db, entry.repository_id, entry.digest)
    if not _was_queued_before(db, entry.repository_id, entry.digest, before) or link is None or link[1] > before:
        return LinkPreview(is_dropped=False, frees_blob=False)
    blob, _ = link
    has_later_link = db.execute(
        "SELECT 1 FROM blob_link WHERE blob = ? AND repository > ? LIMIT 1", (blob, entry.repository_id)
    ).get
    if has_later_link is not None:
        return LinkPreview(is_dropped=True, frees_blob=False)
    other_links: list[Any] = db.execute(
        "SELECT repository, needed FROM blob_link WHERE blob = ? AND repository < ?", (blob, entry.repository_id)
    ).fetchall()
    frees_blob = all(
        other_last_used <= before
        and _was_queued_before(db, repository, entry.digest, before)
        and not is_referenced(db, repository, entry.digest)
        for repository, other_last_used in other_links
    )
    return LinkPreview(is_dropped=True, frees_blob=frees_blob)


def _was_queued_before(db: apsw.Connection, repository: int, digest: Digest, before: float) -> bool:
    """Returns whether the link is in the collect queue and was last queued at the time `before` or earlier."""
    since = db.execute("SELECT since FROM collect_queue WHERE repository = ? AND digest = ?", (repository, digest)).get
    return since is not None and since <= before


def _unreferenced_link(db: apsw.Connection, repository: int, digest: Digest) -> tuple[int, float] | None:
    """Returns the row id of the blob and the link's column `needed`. Returns None if the repository has no link to the
    blob, or if a manifest of the repository refers to the blob."""
    row: Any = db.execute(
        "SELECT l.blob, l.needed FROM blob b JOIN blob_link l ON l.blob = b.id WHERE b.digest = ? AND l.repository = ?",
        (digest, repository),
    ).get
    return None if row is None or is_referenced(db, repository, digest) else row


def drop_blob(db: apsw.Connection, digest: Digest) -> str | None:
    """Removes the blob from the collect queue. If the blob still has no link, deletes the blob's row and returns the
    blob's `place`, so that the caller can delete the bytes there. The `place` of a damaged blob is empty. If the blob
    has a link again or has no row, returns None."""
    remove_from_collect_queue(db, WHOLE_STORE, digest)
    row = db.execute("SELECT id, place FROM blob WHERE digest = ?", (digest,)).get
    if row is None:
        return None
    blob, place = row
    if db.execute("SELECT 1 FROM blob_link WHERE blob = ? LIMIT 1", (blob,)).get is not None:
        return None
    db.execute("DELETE FROM blob WHERE id = ?", (blob,))
    if not place:
        delete_blob_damage(db, digest)
    return str(place)


def unlinked_blobs(db: apsw.Connection, limit: int, after: Digest | None) -> list[UnlinkedBlob]:
    """Returns at most `limit` of the blobs in the collect queue, sorted by digest. The list starts after the digest
    `after`; if `after` is None, with the first blob."""
    rows: list[Any] = db.execute(_UNLINKED_BLOBS, (WHOLE_STORE, after or "", limit)).fetchall()
    return [UnlinkedBlob(Digest(digest), size, bool(is_still_unlinked)) for digest, size, is_still_unlinked in rows]


def queued_links(db: apsw.Connection, before: float, limit: int, after: QueuedLink | None) -> list[QueuedLink]:
    """Returns at most `limit` links that were last queued at the time `before` or earlier, the oldest entry first. The
    list starts after the entry `after`; if `after` is None, with the oldest entry."""
    position = (after.queued_at, after.repository_id, after.digest) if after else (float("-inf"), WHOLE_STORE, "")
    rows: list[Any] = db.execute(_QUEUED_LINKS, (before, WHOLE_STORE, *position, limit)).fetchall()
    return [QueuedLink(repository, Digest(digest), name, size, since) for repository, digest, name, size, since in rows]


def stale_uploads(db: apsw.Connection, before: float, limit: int, after: StaleUpload | None) -> list[StaleUpload]:
    """Returns at most `limit` upload sessions without progress after the time `before`, the longest idle session first.
    The list starts after the session `after`; if `after` is None, with the longest idle session."""
    position = (after.last_progress, after.id) if after else (float("-inf"), "")
    rows: list[Any] = db.execute(
        "SELECT id, repository, touched FROM upload WHERE touched <= ? AND (touched, id) > (?, ?) "
        "ORDER BY touched, id LIMIT ?",
        (before, *position, limit),
    ).fetchall()
    return [StaleUpload(UploadID(upload), repository, touched) for upload, repository, touched in rows]
