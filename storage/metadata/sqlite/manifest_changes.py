"""Changes of manifests and tags: functions of a connection inside a transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

import apsw

from storage.content import Actor, Condition, Manifest, json_of_annotations
from storage.errors import ManifestBlobUnknown, ManifestUnknown, PreconditionFailed
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.access.audit_table import record_content
from storage.metadata.sqlite.blob_changes import make_repository
from storage.names import Digest, RepositoryName, Tag

_MISSING_BLOBS = """
SELECT value FROM json_each(?2)
 WHERE NOT EXISTS (
       SELECT 1 FROM blob b JOIN blob_link l ON l.blob = b.id WHERE b.digest = value AND l.repository = ?1)"""
_MISSING_MANIFESTS = """
SELECT value FROM json_each(?2)
 WHERE NOT EXISTS (SELECT 1 FROM manifest m WHERE m.repository = ?1 AND m.digest = value)"""

_RECORD_DELETED = """
INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent)
SELECT ?1, name, NULL, ?3, ?4, ?5, ?6, ?7 FROM tag WHERE manifest = ?2 ORDER BY name"""
_QUEUE_LET_GO = """
INSERT INTO collect_queue (repository, digest, since)
SELECT ?1, g.digest, ?3 FROM manifest_blob g
 WHERE g.manifest = ?2
   AND NOT EXISTS (SELECT 1 FROM manifest_blob o
                    WHERE o.repository = ?1 AND o.digest = g.digest AND o.manifest <> ?2)
    ON CONFLICT (repository, digest) DO UPDATE SET since = excluded.since"""
"""Queues the blobs that only this manifest refers to."""


def put_manifest(
    db: apsw.Connection,
    repo: RepositoryName,
    manifest: Manifest,
    tags: Sequence[Tag],
    by: Actor,
    now: float,
    *,
    sparse: bool,
    condition: Condition | None,
) -> None:
    repository = make_repository(db, repo, now)
    if condition and tags:
        _check_condition(db, repository, tags[0], condition)
    if not sparse:
        _check_complete(db, repository, manifest)
    number, new = _store(db, repository, manifest, now)
    if new and not tags:
        record_content(db, by, now, "manifest.put", repo, manifest.digest)
    for tag in tags:
        _point(db, repository, tag, number, manifest.digest, by, now)


def _check_condition(db: apsw.Connection, repository: int, tag: Tag, condition: Condition) -> None:
    current = db.execute(
        "SELECT m.digest FROM tag t JOIN manifest m ON m.id = t.manifest WHERE t.repository = ? AND t.name = ?",
        (repository, tag),
    ).get
    if not condition.holds(None if current is None else Digest(current)):
        raise PreconditionFailed(
            f"{tag} points at {current or 'nothing'} now; fetch it again and retry", {"tag": tag, "current": current}
        )


def _check_complete(db: apsw.Connection, repository: int, manifest: Manifest) -> None:
    foreign = manifest.foreign
    blobs = {d.digest for d in manifest.blobs if d.digest not in foreign}
    children = {d.digest for d in manifest.manifests}
    absent = _missing(db, _MISSING_MANIFESTS, repository, children)
    no_blobs = set(_missing(db, _MISSING_BLOBS, repository, manifest.blob_children & set(absent)))
    missing = _missing(db, _MISSING_BLOBS, repository, blobs) + [
        digest for digest in absent if digest not in manifest.blob_children or digest in no_blobs
    ]
    if missing:
        raise ManifestBlobUnknown(
            f"the manifest refers to content the repository does not have: {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            [{"digest": digest} for digest in missing[:100]],
        )


def _listed(digests: Iterable[Digest]) -> str:
    """Returns the digests as sorted JSON for `json_each`; no digest needs escaping. One statement for all of them runs
    without the interpreter's lock."""
    return '["' + '","'.join(sorted(digests)) + '"]'


def _missing(db: apsw.Connection, sql: str, repository: int, wanted: Set[Digest]) -> list[Digest]:
    if not wanted:
        return []
    rows: list[Any] = db.execute(sql, (repository, _listed(wanted))).fetchall()
    return [Digest(digest) for (digest,) in rows]


def _store(db: apsw.Connection, repository: int, manifest: Manifest, now: float) -> tuple[int, bool]:
    """Stores the manifest. Returns its number, and whether it is new to the repository."""
    have = db.execute(
        "SELECT id, media_type FROM manifest WHERE repository = ? AND digest = ?", (repository, manifest.digest)
    ).get
    if have is not None:
        number, media_type = have
        if media_type != manifest.media_type:
            db.execute("UPDATE manifest SET media_type = ? WHERE id = ?", (manifest.media_type, number))
        return int(number), False
    number = db.execute(
        "INSERT INTO manifest "
        "(repository, digest, media_type, size, subject, artifact_type, annotations, pushed, body) "
        "VALUES (?, ?, ?, ?, ?, ?, CAST(? AS TEXT), ?, ?) RETURNING id",
        (
            repository,
            manifest.digest,
            manifest.media_type,
            len(manifest.body),
            manifest.subject,
            manifest.artifact_type,
            json_of_annotations(manifest.annotations) if manifest.annotations else None,
            now,
            manifest.body,
        ),
    ).get
    _refer(db, "manifest_blob", repository, number, {d.digest for d in manifest.blobs} | manifest.blob_children)
    _refer(db, "manifest_child", repository, number, {d.digest for d in manifest.manifests})
    db.execute("UPDATE repository SET manifests = manifests + 1 WHERE id = ?", (repository,))
    return int(number), True


def _refer(db: apsw.Connection, table: str, repository: int, manifest: int, digests: Set[Digest]) -> None:
    if digests:
        db.execute(
            f"INSERT INTO {table} (repository, digest, manifest) SELECT ?1, value, ?2 FROM json_each(?3)",
            (repository, manifest, _listed(digests)),
        )


def _point(
    db: apsw.Connection, repository: int, tag: Tag, manifest: int, digest: Digest, by: Actor, now: float
) -> None:
    before = db.execute("SELECT manifest FROM tag WHERE repository = ? AND name = ?", (repository, tag)).get
    db.execute(
        "INSERT INTO tag (repository, name, manifest, updated) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (repository, name) DO UPDATE SET manifest = excluded.manifest, updated = excluded.updated",
        (repository, tag, manifest, now),
    )
    if before != manifest:
        _record(db, repository, tag, digest, by, now)


def _record(db: apsw.Connection, repository: int, tag: str, digest: Digest | None, by: Actor, now: float) -> None:
    db.execute(
        "INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (repository, tag, digest, now, by.name, by.address, by.request_id, by.user_agent),
    )


def delete_tag(db: apsw.Connection, repo: RepositoryName, tag: Tag, by: Actor, now: float) -> None:
    repository = lookups.repository_id(db, repo)
    db.execute("DELETE FROM tag WHERE repository = ? AND name = ?", (repository, tag))
    if db.changes() == 0:
        raise ManifestUnknown(f"{repo} has no tag {tag}")
    _record(db, repository, tag, None, by, now)


def delete_manifest(db: apsw.Connection, repo: RepositoryName, digest: Digest, by: Actor, now: float) -> None:
    repository = lookups.repository_id(db, repo)
    number = db.execute("SELECT id FROM manifest WHERE repository = ? AND digest = ?", (repository, digest)).get
    if number is None:
        raise ManifestUnknown(f"{repo} has no manifest {digest}")
    db.execute(_RECORD_DELETED, (repository, number, now, by.name, by.address, by.request_id, by.user_agent))
    db.execute("DELETE FROM tag WHERE manifest = ?", (number,))
    db.execute(_QUEUE_LET_GO, (repository, number, now))
    db.execute("DELETE FROM manifest_blob WHERE manifest = ?", (number,))
    db.execute("DELETE FROM manifest_child WHERE manifest = ?", (number,))
    db.execute("DELETE FROM manifest WHERE id = ?", (number,))
    db.execute("UPDATE repository SET manifests = manifests - 1 WHERE id = ?", (repository,))
    record_content(db, by, now, "manifest.delete", repo, digest)
