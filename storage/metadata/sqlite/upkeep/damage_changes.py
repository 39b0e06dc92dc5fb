"""Changes that mark blobs and manifests as damaged or healed. Content is *damaged* if its stored bytes no longer have
its digest, or are missing. It is *healed* when the right bytes are stored again.

Each function runs inside a transaction on the given connection; the caller commits it. The `place` of a blob is the key
of its bytes in the blob store. A damaged blob has an empty `place` in its row, and a row in the table `damaged_blob`.
There, the column `former` has the place that the blob had before. The column `place` of that table means something
else: the key under which the blob store keeps the damaged bytes aside (`quarantine_place` in this module).

A damaged manifest has an empty `body` and the `size` 0, and the table `damaged_manifest` keeps its former body and
size. `now` is the time in seconds since 1970.
"""

from __future__ import annotations

from typing import Any

import apsw

from storage.content import BLOB_TYPE, Manifest, digest_of, json_of_annotations
from storage.damage import UPKEEP_ACTOR, DamagedManifest
from storage.metadata.sqlite.access.audit_table import record_content
from storage.metadata.sqlite.upkeep import event_tables
from storage.names import Digest, RepositoryName
from storage.outbox import EventAction, NewEvent

MAX_AUDIT_LINES = 20
"""Largest number of repositories that get a line in the audit log about one damaged blob."""
_HOLDERS = """
SELECT r.name FROM blob b JOIN blob_link l ON l.blob = b.id JOIN repository r ON r.id = l.repository
 WHERE b.digest = ? LIMIT ?"""


def holders(db: apsw.Connection, digest: Digest, limit: int) -> list[RepositoryName]:
    """Returns at most `limit` repositories that have the blob."""
    rows: list[Any] = db.execute(_HOLDERS, (digest, limit)).fetchall()
    return [RepositoryName(name) for (name,) in rows]


def mark_blob(
    db: apsw.Connection, digest: Digest, former_place: str, reason: str, quarantine_place: str, now: float
) -> bool:
    """Marks the blob as damaged if its place before this call is `former_place`. Afterwards the blob has no place.
    `quarantine_place`: the key under which the blob store keeps the damaged bytes aside; empty if there are none.
    Returns whether the blob was marked."""
    db.execute("UPDATE blob SET place = '' WHERE digest = ? AND place = ?", (digest, former_place))
    if not former_place or db.changes() == 0:
        return False
    _record_damage(db, digest, former_place, reason, quarantine_place, now)
    return True


def record_lost_place(db: apsw.Connection, digest: Digest, reason: str, now: float) -> None:
    """Records damage of a blob whose row already has no place. The place of the blob's bytes is then unknown."""
    _record_damage(db, digest, "", reason, "", now)


def _record_damage(
    db: apsw.Connection, digest: Digest, former_place: str, reason: str, quarantine_place: str, now: float
) -> None:
    """Stores the record of damage of a blob whose row has no place, writes lines in the audit log, and adds events."""
    db.execute(
        "INSERT INTO damaged_blob (digest, found, reason, place, former) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (digest) DO UPDATE SET found = excluded.found, reason = excluded.reason, place = excluded.place, "
        "former = excluded.former",
        (digest, now, reason, quarantine_place, former_place),
    )
    for repo in holders(db, digest, MAX_AUDIT_LINES):
        record_content(db, UPKEEP_ACTOR, now, "blob.damaged", repo, digest, {"reason": reason})
        _add_event(db, repo, digest, BLOB_TYPE, reason, now)


def _add_event(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, media_type: str, reason: str, now: float
) -> None:
    """Adds the event of a damaged blob or manifest."""
    action = EventAction.QUARANTINE
    event_tables.add(db, NewEvent(action, repo, now, UPKEEP_ACTOR, digest=digest, media_type=media_type, reason=reason))


def mark_blob_healed(db: apsw.Connection, digest: Digest, place: str, now: float) -> bool:
    """Marks a damaged blob as healed, with its right bytes at `place`. Returns False if it is not damaged. Also sets
    the time when the blob was created to `now`, as `note_stored_blob` does."""
    db.execute("UPDATE blob SET place = ?, created = ? WHERE digest = ? AND place = ''", (place, now, digest))
    if db.changes() == 0:
        return False
    db.execute("DELETE FROM damaged_blob WHERE digest = ?", (digest,))
    for repo in holders(db, digest, MAX_AUDIT_LINES):
        record_content(db, UPKEEP_ACTOR, now, "blob.healed", repo, digest)
    return True


def note_stored_blob(db: apsw.Connection, repo: RepositoryName, digest: Digest, now: float) -> bool:
    """Deletes the record of damage of a blob whose right bytes were just stored for `repo`. Returns whether there was a
    record. If so, also sets the time when the blob was created to `now`, because the file of the blob in a backup may
    be a hard link to the damaged bytes. The next backup checks the files of blobs that were created since the last
    one."""
    db.execute("DELETE FROM damaged_blob WHERE digest = ?", (digest,))
    if db.changes() == 0:
        return False
    db.execute("UPDATE blob SET created = ? WHERE digest = ?", (now, digest))
    record_content(db, UPKEEP_ACTOR, now, "blob.healed", repo, digest)
    return True


def forget_blob(db: apsw.Connection, digest: Digest) -> None:
    """Deletes the record of damage of a blob that is deleted."""
    db.execute("DELETE FROM damaged_blob WHERE digest = ?", (digest,))


def mark_manifest(db: apsw.Connection, manifest_id: int, now: float) -> DamagedManifest | None:
    """Hashes the manifest's body, and marks the manifest as damaged if the body has another digest. Returns None if the
    body has the right digest, or if the manifest was deleted or marked before."""
    row: Any = db.execute(
        "SELECT m.repository, r.name, m.digest, m.media_type, m.size, m.body "
        "FROM manifest m JOIN repository r ON r.id = m.repository WHERE m.id = ? AND m.size > 0",
        (manifest_id,),
    ).get
    if row is None:
        return None
    repository, name, digest, media_type, size, body = row
    repo, expected_digest = RepositoryName(name), Digest(digest)
    actual_digest = digest_of(body, expected_digest.algorithm)
    if actual_digest == expected_digest:
        return None
    reason = f"its stored body has the digest {actual_digest}"
    db.execute("UPDATE manifest SET size = 0, body = x'' WHERE id = ?", (manifest_id,))
    db.execute(
        "INSERT OR REPLACE INTO damaged_manifest (repository, digest, found, reason, size, body) "
        "VALUES (?, ?, ?, ?, ?, ?)",
        (repository, digest, now, reason, size, body),
    )
    record_content(db, UPKEEP_ACTOR, now, "manifest.damaged", repo, expected_digest, {"reason": reason})
    _add_event(db, repo, expected_digest, media_type, reason, now)
    return DamagedManifest(repo, expected_digest, now, reason)


def heal_manifest(db: apsw.Connection, repository: int, manifest_id: int, manifest: Manifest, now: float) -> None:
    """Stores the body of a damaged manifest again. Does not store the references of the manifest: these are still
    stored, and a manifest with the same digest has the same references."""
    db.execute(
        "UPDATE manifest SET media_type = ?, size = ?, subject = ?, artifact_type = ?, annotations = CAST(? AS TEXT), "
        "body = ? WHERE id = ?",
        (
            manifest.media_type,
            len(manifest.body),
            manifest.subject,
            manifest.artifact_type,
            json_of_annotations(manifest.annotations) if manifest.annotations else None,
            manifest.body,
            manifest_id,
        ),
    )
    _note_healed_manifest(db, repository, manifest.digest, now)


def restore_manifests(db: apsw.Connection, limit: int, now: float) -> int:
    """Hashes again the bodies of at most `limit` damaged manifests, oldest damage first, and puts back those that have
    the right digest after all: because of faulty memory, a right body can get a wrong hash. Returns the number of
    restored manifests."""
    rows: list[Any] = db.execute(
        "SELECT repository, digest, size, body FROM damaged_manifest ORDER BY found LIMIT ?", (limit,)
    ).fetchall()
    restored = 0
    for repository, digest, size, body in rows:
        if digest_of(body, Digest(digest).algorithm) == digest:
            db.execute(
                "UPDATE manifest SET size = ?, body = ? WHERE repository = ? AND digest = ? AND size = 0",
                (size, body, repository, digest),
            )
            _note_healed_manifest(db, repository, Digest(digest), now)
            restored += 1
    return restored


def _note_healed_manifest(db: apsw.Connection, repository: int, digest: Digest, now: float) -> None:
    """Deletes the record of damage of a manifest, and writes a line in the audit log."""
    forget_manifest(db, repository, digest)
    name: Any = db.execute("SELECT name FROM repository WHERE id = ?", (repository,)).get
    record_content(db, UPKEEP_ACTOR, now, "manifest.healed", RepositoryName(name), digest)


def forget_manifest(db: apsw.Connection, repository: int, digest: Digest) -> None:
    """Deletes the record of damage of a manifest."""
    db.execute("DELETE FROM damaged_manifest WHERE repository = ? AND digest = ?", (repository, digest))
