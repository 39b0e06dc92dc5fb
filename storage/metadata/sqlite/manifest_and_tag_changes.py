"""Changes of manifests and tags.

Each function runs inside a transaction on the given connection. `storage.metadata.sqlite.commit_thread.CommitThread`
commits the transaction afterwards; then the change is durable.

- `by` is the client for which the change is made, `now` the time in seconds since 1970.
- `repo` is the name of a repository, `repository` its row id.
- The *tag history* records each change of a tag. It is a part of the audit log.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

import apsw

from storage.content import Actor, Condition, Manifest, json_of_annotations
from storage.errors import ManifestBlobUnknown, ManifestUnknown, PreconditionFailed
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.access.audit_table import record_content
from storage.metadata.sqlite.blob_changes import make_repository
from storage.metadata.sqlite.upkeep.damage_changes import forget_manifest, heal_manifest
from storage.names import Digest, RepositoryName, Tag

_BLOBS_NOT_IN_REPOSITORY = """
SELECT value FROM json_each(?2)
 WHERE NOT EXISTS (
       SELECT 1 FROM blob b JOIN blob_link l ON l.blob = b.id WHERE b.digest = value AND l.repository = ?1
          AND b.place <> '')"""
_MANIFESTS_NOT_IN_REPOSITORY = """
SELECT value FROM json_each(?2)
 WHERE NOT EXISTS (SELECT 1 FROM manifest m WHERE m.repository = ?1 AND m.digest = value AND m.size > 0)"""
"""Both statements count damaged content (an empty `place`, the size 0) as missing, so that clients push it again."""

_RECORD_DELETED_TAGS = """
INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent)
SELECT ?1, name, NULL, ?3, ?4, ?5, ?6, ?7 FROM tag WHERE manifest = ?2 ORDER BY name"""
_QUEUE_UNREFERENCED_BLOBS = """
INSERT INTO collect_queue (repository, digest, since)
SELECT ?1, g.digest, ?3 FROM manifest_blob g
 WHERE g.manifest = ?2
   AND NOT EXISTS (SELECT 1 FROM manifest_blob o
                    WHERE o.repository = ?1 AND o.digest = g.digest AND o.manifest <> ?2)
    ON CONFLICT (repository, digest) DO UPDATE SET since = excluded.since"""
"""Queues for garbage collection the blobs to which only this manifest of the repository refers."""


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
    """Stores the manifest and points the tags at it. Creates the repository if it is missing.

    `condition` (from the header `If-Match` or `If-None-Match`) must hold for the first tag; otherwise raises
    PreconditionFailed. Without tags it is ignored. `sparse`: accepts the manifest even if the repository lacks content
    that it refers to. If `sparse` is false, raises ManifestBlobUnknown for such a manifest."""
    repository = make_repository(db, repo, now)
    if condition and tags:
        _check_condition(db, repository, tags[0], condition)
    if not sparse:
        _check_complete(db, repository, manifest)
    manifest_id, is_new = _store_manifest(db, repository, manifest, now)
    if is_new and not tags:  # with tags, the lines that `_store_tag` adds to the tag history name the manifest
        record_content(db, by, now, "manifest.put", repo, manifest.digest)
    for tag in tags:
        _store_tag(db, repository, tag, manifest_id, manifest.digest, by, now)


def _check_condition(db: apsw.Connection, repository: int, tag: Tag, condition: Condition) -> None:
    """Raises PreconditionFailed unless the condition holds for the digest that the tag points at now. If there is no
    such tag, the condition must hold for None."""
    current = db.execute(
        "SELECT m.digest FROM tag t JOIN manifest m ON m.id = t.manifest WHERE t.repository = ? AND t.name = ?",
        (repository, tag),
    ).get
    if not condition.holds(None if current is None else Digest(current)):
        raise PreconditionFailed(
            f"{tag} points at {current or 'nothing'} now; fetch it again and retry", {"tag": tag, "current": current}
        )


def _check_complete(db: apsw.Connection, repository: int, manifest: Manifest) -> None:
    """Raises ManifestBlobUnknown if the repository lacks content that the manifest refers to. It may lack foreign
    layers, which clients fetch from elsewhere.

    The children of an index are the entries of its list `manifests`. The repository must have each child as a manifest.
    But a child in `manifest.blob_children` has a media type other than that of a manifest, so the repository may have
    it as a blob instead."""
    foreign = manifest.foreign
    blobs = {d.digest for d in manifest.blobs if d.digest not in foreign}
    children = {d.digest for d in manifest.manifests}
    not_manifests = _missing(db, _MANIFESTS_NOT_IN_REPOSITORY, repository, children)
    may_be_blobs = manifest.blob_children & set(not_manifests)
    not_blobs = set(_missing(db, _BLOBS_NOT_IN_REPOSITORY, repository, may_be_blobs))
    missing = _missing(db, _BLOBS_NOT_IN_REPOSITORY, repository, blobs) + [
        digest for digest in not_manifests if digest not in may_be_blobs or digest in not_blobs
    ]
    if missing:
        raise ManifestBlobUnknown(
            f"the manifest refers to content the repository does not have: {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            [{"digest": digest} for digest in missing[:100]],
        )


def _json_array(digests: Iterable[Digest]) -> str:
    """Returns the digests as a sorted JSON array, for SQLite's function `json_each`. With it, one statement handles all
    digests, and SQLite runs without Python's global interpreter lock."""
    # No character of a digest needs escaping in JSON.
    return '["' + '","'.join(sorted(digests)) + '"]'


def _missing(db: apsw.Connection, sql: str, repository: int, digests: Set[Digest]) -> list[Digest]:
    """Returns the `digests` that the repository lacks. `sql`: `_BLOBS_NOT_IN_REPOSITORY` or
    `_MANIFESTS_NOT_IN_REPOSITORY`, for digests of blobs or of manifests."""
    if not digests:
        return []
    rows: list[Any] = db.execute(sql, (repository, _json_array(digests))).fetchall()
    return [Digest(digest) for (digest,) in rows]


def _store_manifest(db: apsw.Connection, repository: int, manifest: Manifest, now: float) -> tuple[int, bool]:
    """Stores the manifest, and the digests that it refers to. If the repository already has the manifest, only updates
    its media type, or, if the manifest is damaged, stores its body again. Returns the manifest's row id, and True if
    the manifest is new to the repository."""
    existing = db.execute(
        "SELECT id, media_type, size FROM manifest WHERE repository = ? AND digest = ?", (repository, manifest.digest)
    ).get
    if existing is not None:
        manifest_id, media_type, size = existing
        if not size:
            heal_manifest(db, repository, manifest_id, manifest, now)
        elif media_type != manifest.media_type:
            db.execute("UPDATE manifest SET media_type = ? WHERE id = ?", (manifest.media_type, manifest_id))
        return int(manifest_id), False
    manifest_id = db.execute(
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
    # A child that may be a blob or a manifest is stored as both, so that neither is removed while this manifest refers
    # to it.
    blobs = {d.digest for d in manifest.blobs} | manifest.blob_children
    _store_references(db, "manifest_blob", repository, manifest_id, blobs)
    _store_references(db, "manifest_child", repository, manifest_id, {d.digest for d in manifest.manifests})
    db.execute("UPDATE repository SET manifests = manifests + 1 WHERE id = ?", (repository,))
    return int(manifest_id), True


def _store_references(db: apsw.Connection, table: str, repository: int, manifest_id: int, digests: Set[Digest]) -> None:
    """Inserts a row into `table` for each of `digests`, to which the manifest with the row id `manifest_id` refers."""
    if digests:
        db.execute(
            f"INSERT INTO {table} (repository, digest, manifest) SELECT ?1, value, ?2 FROM json_each(?3)",
            (repository, manifest_id, _json_array(digests)),
        )


def _store_tag(
    db: apsw.Connection, repository: int, tag: Tag, manifest_id: int, digest: Digest, by: Actor, now: float
) -> None:
    """Points the tag at the manifest. Records this in the tag history, unless the tag pointed at it already."""
    previous = db.execute("SELECT manifest FROM tag WHERE repository = ? AND name = ?", (repository, tag)).get
    db.execute(
        "INSERT INTO tag (repository, name, manifest, updated) VALUES (?, ?, ?, ?) "
        "ON CONFLICT (repository, name) DO UPDATE SET manifest = excluded.manifest, updated = excluded.updated",
        (repository, tag, manifest_id, now),
    )
    if previous != manifest_id:
        _record_tag(db, repository, tag, digest, by, now)


def _record_tag(db: apsw.Connection, repository: int, tag: str, digest: Digest | None, by: Actor, now: float) -> None:
    """Adds a line to the tag history. `digest`: what the tag points at now; None if the tag was deleted."""
    db.execute(
        "INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (repository, tag, digest, now, by.name, by.address, by.request_id, by.user_agent),
    )


def delete_tag(db: apsw.Connection, repo: RepositoryName, tag: Tag, by: Actor, now: float) -> None:
    """Deletes the tag; its manifest stays. Raises NameUnknown if there is no such repository, ManifestUnknown if it has
    no such tag."""
    repository = lookups.repository_id(db, repo)
    db.execute("DELETE FROM tag WHERE repository = ? AND name = ?", (repository, tag))
    if db.changes() == 0:
        raise ManifestUnknown(f"{repo} has no tag {tag}")
    _record_tag(db, repository, tag, digest=None, by=by, now=now)


def delete_manifest(db: apsw.Connection, repo: RepositoryName, digest: Digest, by: Actor, now: float) -> None:
    """Deletes the manifest and all its tags. Queues for garbage collection the blobs to which no other manifest of the
    repository refers. Raises NameUnknown if there is no such repository, ManifestUnknown if it has no such manifest."""
    repository = lookups.repository_id(db, repo)
    manifest_id = db.execute("SELECT id FROM manifest WHERE repository = ? AND digest = ?", (repository, digest)).get
    if manifest_id is None:
        raise ManifestUnknown(f"{repo} has no manifest {digest}")
    db.execute(_RECORD_DELETED_TAGS, (repository, manifest_id, now, by.name, by.address, by.request_id, by.user_agent))
    db.execute("DELETE FROM tag WHERE manifest = ?", (manifest_id,))
    db.execute(_QUEUE_UNREFERENCED_BLOBS, (repository, manifest_id, now))
    db.execute("DELETE FROM manifest_blob WHERE manifest = ?", (manifest_id,))
    db.execute("DELETE FROM manifest_child WHERE manifest = ?", (manifest_id,))
    db.execute("DELETE FROM manifest WHERE id = ?", (manifest_id,))
    forget_manifest(db, repository, digest)
    db.execute("UPDATE repository SET manifests = manifests - 1 WHERE id = ?", (repository,))
    record_content(db, by, now, "manifest.delete", repo, digest)
