"""Repairs problems that a consistency check found in the metadata database (`repair`). Each repair runs in a
transaction, which the caller commits.

A *link* is a row that lets a repository serve a blob. A *reference* is a row that records that a manifest refers to a
blob (table `manifest_blob`) or to another manifest (table `manifest_child`). The *collect queue* lists the links and
blobs that garbage collection may have to remove.

A repair loses no content:

- It never deletes a manifest.
- It deletes a link only if the link's blob or repository does not exist.
- It deletes a reference only if the manifest does not exist, or if its text does not contain the reference's digest.
- It puts a link or blob that becomes unused into the collect queue.

`Problem.item` is the digest or tag with the problem. `Problem.key` identifies the row with the problem by the values of
some columns. For a problem of a manifest, the first value is the manifest's row id. A second value can follow: the
table with the wrong references, or the digest of the missing blob or manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import apsw

from storage.consistency import Problem, ProblemCode
from storage.content import json_of_annotations
from storage.damage import UPKEEP_ACTOR
from storage.metadata.sqlite import blob_changes
from storage.metadata.sqlite.blob_changes import WHOLE_STORE
from storage.metadata.sqlite.upkeep import damage_changes, event_tables, manifest_checks, usage_checks
from storage.names import Digest
from storage.outbox import EventAction, NewEvent

_NEWEST_TARGET = """
SELECT m.id, m.digest, m.media_type, m.size, r.name
  FROM tag_history h JOIN manifest m ON m.repository = h.repository AND m.digest = h.digest
  JOIN repository r ON r.id = h.repository
 WHERE h.repository = ?1 AND h.tag = ?2 ORDER BY h.id DESC LIMIT 1"""
_UNUSED_UNQUEUED_LINK = """
SELECT 1 FROM blob_link l JOIN blob b ON b.id = l.blob
 WHERE l.repository = ?1 AND b.digest = ?2
   AND NOT EXISTS (SELECT 1 FROM manifest_blob p WHERE p.repository = ?1 AND p.digest = ?2)
   AND NOT EXISTS (SELECT 1 FROM collect_queue q WHERE q.repository = ?1 AND q.digest = ?2)"""


def repair(db: apsw.Connection, problem: Problem, now: float) -> str | None:
    """Repairs the problem. Returns an English text about what it did; None if the problem cannot be repaired. In the
    same transaction, the caller must first have checked that the problem still exists. `now`: in seconds since 1970."""
    repair_function = _REPAIRS.get(problem.code)
    return usage_checks.repair(db, problem) if repair_function is None else repair_function(db, problem, now)


def _queue_blob(db: apsw.Connection, problem: Problem, now: float) -> str:
    blob_changes.queue_for_collection(db, WHOLE_STORE, Digest(problem.item), now)
    return "queued it for garbage collection"


def _queue_link(db: apsw.Connection, problem: Problem, now: float) -> str:
    blob_changes.queue_for_collection(db, int(problem.key[0]), Digest(problem.item), now)
    return "queued it for garbage collection"


def _record_blob_without_place(db: apsw.Connection, problem: Problem, now: float) -> str:
    """Records the blob as damaged, because its row has no *place* (the key of the blob's bytes in the blob store)."""
    damage_changes.record_lost_place(db, Digest(problem.item), "its place was not recorded", now)
    return "recorded the blob as damaged; the next push stores it again"


def _mark_manifest_damaged(db: apsw.Connection, problem: Problem, now: float) -> str | None:
    """Marks the manifest as damaged, if its row has a valid digest."""
    if (
        not _stored_manifest(db, problem).is_digest_valid
        or damage_changes.mark_manifest_damaged(db, int(problem.key[0]), now) is None
    ):
        return None  # no push could heal a manifest whose row has no valid digest
    return "recorded the manifest as damaged; the registry does not serve it until a push stores it again"


def _drop_link_without_blob(db: apsw.Connection, problem: Problem, now: float) -> str:
    db.execute("DELETE FROM blob_link WHERE repository = ? AND blob = ?", problem.key)
    return "removed the link"


def _drop_link_without_repository(db: apsw.Connection, problem: Problem, now: float) -> str | None:
    repository, blob = int(problem.key[0]), int(problem.key[1])
    if db.execute("SELECT 1 FROM manifest WHERE repository = ? LIMIT 1", (repository,)).get is not None:
        return None  # a manifest with this repository id may refer to the blob
    digest = db.execute("SELECT digest FROM blob WHERE id = ?", (blob,)).get
    if digest is None:
        return _drop_link_without_blob(db, problem, now)
    blob_changes.remove_link(db, repository, blob, Digest(digest), now)
    return "removed the link"


def _drop_reference(db: apsw.Connection, problem: Problem, now: float) -> str:
    """Deletes a reference whose manifest does not exist. `problem.area` is the table. `problem.key` has the values of
    the columns `repository`, `digest` and `manifest`."""
    db.execute(f"DELETE FROM {problem.area} WHERE repository = ? AND digest = ? AND manifest = ?", problem.key)
    _queue_if_unused(db, int(problem.key[0]), [str(problem.key[1])], now)
    return "removed the reference"


def _queue_if_unused(db: apsw.Connection, repository: int, digests: Iterable[str], now: float) -> None:
    """Puts the repository's links to the blobs `digests` into the collect queue. Leaves out a link in two
    cases:

    - A manifest of the repository refers to the blob.
    - The link is already in the queue."""
    for digest in digests:
        if db.execute(_UNUSED_UNQUEUED_LINK, (repository, digest)).get is not None:
            blob_changes.queue_for_collection(db, repository, Digest(digest), now)


def _restore_tag(db: apsw.Connection, problem: Problem, now: float) -> str | None:
    """Points the tag at the newest manifest of the tag's history that still exists in the repository."""
    row: Any = db.execute(_NEWEST_TARGET, problem.key).get
    if row is None:
        return None
    manifest, digest, media_type, size, repo = row
    db.execute("UPDATE tag SET manifest = ? WHERE repository = ? AND name = ?", (manifest, *problem.key))
    tag, reason = str(problem.key[1]), "a repair: what the tag pointed at did not exist"
    event = NewEvent(EventAction.MOVE, repo, now, UPKEEP_ACTOR, tag, digest, None, media_type, size, reason)
    event_tables.add_event(db, event)
    return f"pointed the tag at {digest}, the newest manifest of its history that still exists"


def _recount_manifests(db: apsw.Connection, problem: Problem, now: float) -> str:
    db.execute(
        "UPDATE repository SET manifests = (SELECT count(*) FROM manifest m WHERE m.repository = ?1) WHERE id = ?1",
        problem.key,
    )
    return "counted the manifests again"


def _correct_fields(db: apsw.Connection, problem: Problem, now: float) -> str:
    stored = _stored_manifest(db, problem)
    db.execute("UPDATE manifest SET size = ? WHERE id = ?", (len(stored.body), stored.id))
    if (manifest := stored.manifest) is not None:
        annotations = json_of_annotations(manifest.annotations) if manifest.annotations else None
        db.execute(
            "UPDATE manifest SET subject = ?, artifact_type = ?, annotations = CAST(? AS TEXT) WHERE id = ?",
            (manifest.subject, manifest.artifact_type, annotations, stored.id),
        )
    return "corrected the stored fields"


def _correct_references(db: apsw.Connection, problem: Problem, now: float) -> str:
    stored, table = _stored_manifest(db, problem), str(problem.key[1])
    manifest = stored.manifest
    assert manifest is not None  # only a manifest that can be parsed can have this problem
    expected_digests = manifest_checks.expected_references(manifest)[table]
    stored_digests = manifest_checks.stored_references(db, table, stored)
    db.executemany(
        f"DELETE FROM {table} WHERE repository = ? AND digest = ? AND manifest = ?",
        [(stored.repository, digest, stored.id) for digest in stored_digests - expected_digests],
    )
    db.executemany(
        f"INSERT INTO {table} (repository, digest, manifest) VALUES (?, ?, ?)",
        [(stored.repository, digest, stored.id) for digest in expected_digests - stored_digests],
    )
    _queue_if_unused(db, stored.repository, stored_digests - expected_digests, now)
    return "corrected the stored references"


def _restore_link(db: apsw.Connection, problem: Problem, now: float) -> str | None:
    """Restores the repository's link to the blob, if the blob still exists."""
    stored, digest = _stored_manifest(db, problem), Digest(str(problem.key[1]))
    blob = db.execute("SELECT id FROM blob WHERE digest = ?", (digest,)).get
    if blob is None:
        return None
    blob_changes.add_link(db, stored.repository, int(blob), digest, now)
    return "restored the repository's link to the blob"


def _stored_manifest(db: apsw.Connection, problem: Problem) -> manifest_checks.StoredManifest:
    stored = manifest_checks.read(db, int(problem.key[0]))
    assert stored is not None  # the caller has checked that the problem still exists
    return stored


def set_size(db: apsw.Connection, digest: Digest, place: str, size: int) -> bool:
    """Sets the size of a blob in its row, in bytes, and corrects the counts of used space. Returns False, and changes
    nothing, if `place` is no longer the place in the row."""
    row: Any = db.execute("SELECT id, size FROM blob WHERE digest = ? AND place = ?", (digest, place)).get
    if row is not None:
        blob, old_size = row
        db.execute("UPDATE blob SET size = ? WHERE id = ?", (size, blob))
        usage_checks.correct_counted_size(db, blob, old_size, size)
    return row is not None


_REPAIRS: Final[Mapping[ProblemCode, Callable[[apsw.Connection, Problem, float], str | None]]] = {
    ProblemCode.BLOB_NOT_QUEUED: _queue_blob,
    ProblemCode.BLOB_PLACE: _record_blob_without_place,
    ProblemCode.LINK_WITHOUT_BLOB: _drop_link_without_blob,
    ProblemCode.LINK_WITHOUT_REPOSITORY: _drop_link_without_repository,
    ProblemCode.LINK_NOT_QUEUED: _queue_link,
    ProblemCode.MANIFEST_DIGEST: _mark_manifest_damaged,
    ProblemCode.MANIFEST_FIELDS: _correct_fields,
    ProblemCode.MANIFEST_REFERENCES: _correct_references,
    ProblemCode.MANIFEST_BLOB_MISSING: _restore_link,
    ProblemCode.REFERENCE_WITHOUT_MANIFEST: _drop_reference,
    ProblemCode.TAG_WITHOUT_MANIFEST: _restore_tag,
    ProblemCode.REPOSITORY_COUNT: _recount_manifests,
}
"""The function that repairs each kind of problem. `usage_checks.repair` repairs the problems of the counts of used
space. This module repairs no other kinds."""
