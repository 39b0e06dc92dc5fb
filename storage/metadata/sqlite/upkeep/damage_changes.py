"""Changes that mark blobs and manifests as damaged or healed. Content is *damaged* if its stored bytes no longer have
its digest, or are missing. It is *healed* when the right bytes are stored again.

Each function runs inside a transaction on the given connection. The caller commits the transaction. `now` is the time
in seconds since 1970. `repository` is the row id of a repository, and `repo` is the name of a repository.

The *damage record* of a blob or manifest is its row in the table `damaged_blob` or `damaged_manifest`.

The *place* of a blob is the key of its bytes in the blob store (column `place` of the table `blob`). A damaged blob has
an empty place. In its damage record, two columns contain places:

- `former`: the place that the blob had before.
- `place`: the key under which the blob store keeps the damaged bytes aside (`quarantine_place` in this module).

The row of a damaged manifest has an empty `body` and the `size` 0. Its damage record keeps the former body and size.
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
"""When a blob is marked as damaged or healed, at most this many of its repositories get a line in the audit log. Only
these repositories get an event about the damage."""
_HOLDERS = """
SELECT r.name FROM blob b JOIN blob_link l ON l.blob = b.id JOIN repository r ON r.id = l.repository
 WHERE b.digest = ? LIMIT ?"""


def holders(db: apsw.Connection, digest: Digest, limit: int) -> list[RepositoryName]:
    """Returns at most `limit` repositories that have the blob."""
    rows: list[Any] = db.execute(_HOLDERS, (digest, limit)).fetchall()
    return [RepositoryName(name) for (name,) in rows]


def mark_blob_damaged(
    db: apsw.Connection, digest: Digest, former_place: str, reason: str, quarantine_place: str, now: float
) -> bool:
    """Marks the blob as damaged, and empties its place. If `former_place` is empty or is not the place of the blob,
    changes nothing and returns False. `quarantine_place`: the key under which the blob store keeps the damaged bytes
    aside; empty if there are no such bytes."""
    db.execute("UPDATE blob SET place = '' WHERE digest = ? AND place = ?", (digest, former_place))
    if not former_place or db.changes() == 0:
        return False
    _record_damage(db, digest, former_place, reason, quarantine_place, now)
    return True


def record_lost_place(db: apsw.Connection, digest: Digest, reason: str, now: float) -> None:
    """Stores a damage record for a blob that has an empty place but no damage record. The former place of the blob is
    unknown."""
    _record_damage(db, digest, "", reason, "", now)


def _record_damage(
    db: apsw.Connection, digest: Digest, former_place: str, reason: str, quarantine_place: str, now: float
) -> None:
    """Stores the damage record of a blob, writes lines in the audit log, and adds events."""
    db.execute(
        "INSERT INTO damaged_blob (digest, found, reason, place, former) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (digest) DO UPDATE SET found = excluded.found, reason = excluded.reason, place = excluded.place, "
        "former = excluded.former",
        (digest, now, reason, quarantine_place, former_place),
    )
    for repo in holders(db, digest, MAX_AUDIT_LINES):
        record_content(db, UPKEEP_ACTOR, now, "blob.damaged", repo, digest, {"reason": reason})
        _add_damage_event(db, repo, digest, BLOB_TYPE, reason, now)


def _add_damage_event(
    db: apsw.Connection, repo: RepositoryName, digest: Digest, media_type: str, reason: str, now: float
) -> None:
    """Adds an event about a damaged blob or manifest."""
    action = EventAction.QUARANTINE
    event_tables.add_event(
        db, NewEvent(action, repo, now, UPKEEP_ACTOR, digest=digest, media_type=media_type, reason=reason)
    )


def mark_blob_healed(db: apsw.Connection, digest: Digest, place: str, now: float) -> bool:
    """Marks a damaged blob as healed, and sets its place to `place`. Also sets the blob's column `created` to `now`,
    for the reason that `on_blob_stored` gives. If the blob is not damaged, changes nothing and returns False."""
    db.execute("UPDATE blob SET place = ?, created = ? WHERE digest = ? AND place = ''", (place, now, digest))
    if db.changes() == 0:
        return False
    db.execute("DELETE FROM damaged_blob WHERE digest = ?", (digest,))
    for repo in holders(db, digest, MAX_AUDIT_LINES):
        record_content(db, UPKEEP_ACTOR, now, "blob.healed", repo, digest)
    return True


def on_blob_stored(db: apsw.Connection, repo: RepositoryName, digest: Digest, now: float) -> bool:
    """Marks a blob as healed if it has a damage record. The caller has just stored the right bytes of the blob for
    `repo`, and has set the blob's place. If there is no damage record, changes nothing and returns False.

    Also sets the blob's column `created` to `now`, so that the next backup checks its copy of the blob: a backup checks
    each copy of a blob whose `created` is not before the last backup. The copy may be a hard link to the file with the
    damaged bytes."""
    db.execute("DELETE FROM damaged_blob WHERE digest = ?", (digest,))
    if db.changes() == 0:
        return False
    db.execute("UPDATE blob SET created = ? WHERE digest = ?", (now, digest))
    record_content(db, UPKEEP_ACTOR, now, "blob.healed", repo, digest)
    return True


def delete_blob_damage(db: apsw.Connection, digest: Digest) -> None:
    """Deletes the damage record of a blob."""
    db.execute("DELETE FROM damaged_blob WHERE digest = ?", (digest,))


def mark_manifest_damaged(db: apsw.Connection, manifest_id: int, now: float) -> DamagedManifest | None:
    """Hashes the body of a manifest. If the body does not have the manifest's digest, marks the manifest as damaged and
    returns it. Otherwise returns None. Also returns None if the manifest does not exist, or is already marked."""
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
    _add_damage_event(db, repo, expected_digest, media_type, reason, now)
    return DamagedManifest(repo, expected_digest, now, reason)


def heal_manifest(db: apsw.Connection, repository: int, manifest_id: int, manifest: Manifest, now: float) -> None:
    """Stores a damaged manifest again, and marks it as healed. Does not store the references of the manifest, because
    `mark_manifest_damaged` keeps them."""
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
    _record_healed_manifest(db, repository, manifest.digest, now)


def recheck_damaged_manifests(db: apsw.Connection, limit: int, now: float) -> int:
    """Hashes the former bodies of at most `limit` damaged manifests again, because faulty memory can make the hash of a
    right body wrong. Begins with the oldest damage. If a body has the right digest, marks the manifest as healed.
    Returns the number of healed manifests."""
    rows: list[Any] = db.execute(
        "SELECT repository, digest, size, body FROM damaged_manifest ORDER BY found LIMIT ?", (limit,)
    ).fetchall()
    healed_count = 0
    for repository, digest, size, body in rows:
        if digest_of(body, Digest(digest).algorithm) == digest:
            db.execute(
                "UPDATE manifest SET size = ?, body = ? WHERE repository = ? AND digest = ? AND size = 0",
                (size, body, repository, digest),
            )
            _record_healed_manifest(db, repository, Digest(digest), now)
            healed_count += 1
    return healed_count


def _record_healed_manifest(db: apsw.Connection, repository: int, digest: Digest, now: float) -> None:
    """Deletes the damage record of a manifest, and writes a line in the audit log."""
    delete_manifest_damage(db, repository, digest)
    name: Any = db.execute("SELECT name FROM repository WHERE id = ?", (repository,)).get
    record_content(db, UPKEEP_ACTOR, now, "manifest.healed", RepositoryName(name), digest)


def delete_manifest_damage(db: apsw.Connection, repository: int, digest: Digest) -> None:
    """Deletes the damage record of a manifest."""
    db.execute("DELETE FROM damaged_manifest WHERE repository = ? AND digest = ?", (repository, digest))
