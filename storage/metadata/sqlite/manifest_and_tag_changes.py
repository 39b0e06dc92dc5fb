"""Changes of manifests and tags, except the deletion of manifests (`storage.metadata.sqlite.manifest_deletion`).

Each function runs inside a transaction on the given connection. A change becomes durable when
`storage.metadata.sqlite.commit_thread.CommitThread` commits the transaction afterwards.

- `by`: who makes the change. `now`: the time in seconds since 1970.
- `repo`: the name of a repository. `repository`: its row id.
- The *tag history*, a part of the audit log, records each change of a tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any, Final, NamedTuple

import apsw

from storage.content import Actor, Condition, Manifest, json_of_annotations
from storage.errors import ManifestBlobUnknown, ManifestUnknown, PreconditionFailed, with_redacted
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.access.audit_table import record_content
from storage.metadata.sqlite.blob_changes import make_repository
from storage.metadata.sqlite.needing_tags import NeedingTagsCheck, TargetManifest
from storage.metadata.sqlite.upkeep import deleted_manifests, event_tables, usage_tables
from storage.metadata.sqlite.upkeep.damage_changes import heal_manifest
from storage.metadata.sqlite.upkeep.sqlite_pulls import add_mirrored_pull_row
from storage.names import Digest, RepositoryName, Tag
from storage.outbox import EventAction
from storage.tag_history import not_restorable
from storage.tag_rules import (
    IsImmutable,
    immutable_delete_denied,
    immutable_tag_denied,
    immutable_type_denied,
    nothing_immutable,
)

PUSH_TIME_STEP_SECONDS: Final = 60.0
"""A push updates the time of the last push in the manifest's row only if the stored time differs by more than this
number of seconds. This saves writes if a client pushes many tags of one manifest."""
_BLOBS_NOT_IN_REPOSITORY = """
SELECT value FROM json_each(?2)
 WHERE NOT EXISTS (
       SELECT 1 FROM blob b JOIN blob_link l ON l.blob = b.id WHERE b.digest = value AND l.repository = ?1
          AND b.place <> '')"""
_MANIFESTS_NOT_IN_REPOSITORY = """
SELECT value FROM json_each(?2)
 WHERE NOT EXISTS (SELECT 1 FROM manifest m WHERE m.repository = ?1 AND m.digest = value AND m.size > 0)"""
"""Both statements also return damaged content, so that clients push it again. A damaged blob has an empty `place`. A
damaged manifest has the size 0."""


class _StoredManifest(NamedTuple):
    """The stored row of a manifest. `id`: the row id. `size`: size of the manifest in bytes; 0 if the manifest is
    damaged. `pushed`: time of the last push."""

    id: int
    media_type: str
    size: int
    pushed: float


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
    is_immutable: IsImmutable = nothing_immutable,
    checked_to: int | None = None,
) -> bool:
    """Stores the manifest, points the tags at it, and returns True. Creates the repository if it is missing. `sparse`:
    True for a mirrored manifest. The repository may lack content of a mirrored manifest, and the upstream of the
    manifest is recorded. `condition`: `If-Match` or `If-None-Match` for the first tag; ignored if there are no tags.

    A tag *needs* a manifest if it points at the manifest, or at an index that contains the manifest. If the media type
    of a stored manifest would change, checks the tags that need the manifest. If there are too many, changes nothing
    and returns False. The caller then runs `NeedingTagsCheck.check_all`, which checks them all, and calls this function
    again with the result as `checked_to`: the id of the newest entry in the tag history when the check began. Raises:

    - PreconditionFailed: `condition` does not hold.
    - ManifestBlobUnknown: the repository lacks content of the manifest, and `sparse` is False.
    - Denied: one of `tags` is immutable and points at another manifest.
    - Denied: the media type would change, and an immutable tag needs the manifest.
    - QuotaExceeded: a new tag does not fit into a quota."""
    repository = make_repository(db, repo, now)
    if condition and tags:
        _check_condition(db, repository, tags[0], condition)
    for tag in tags:
        if is_immutable(tag):
            _check_tag_unchanged(db, repository, repo, tag, manifest.digest)
    if not sparse:
        _check_complete(db, repository, manifest)
    stored = _find_manifest(db, repository, manifest.digest)
    if stored is None:
        manifest_id = _add_manifest(db, repository, manifest, now)
        if not tags:  # with tags, the tag history records the digest
            record_content(db, by, now, "manifest.put", repo, manifest.digest)
    else:
        manifest_id = stored.id
        if stored.media_type != manifest.media_type:
            target = TargetManifest(repository, repo, manifest_id, manifest.digest, stored.media_type)
            if not media_type_check(is_immutable).check_in_transaction(db, target, checked_to):
                return False
        _update_manifest(db, repo, repository, stored, manifest, by, now, is_push=not sparse)
    if sparse:  # the name of a mirrored repository begins with the name of its upstream
        add_mirrored_pull_row(db, manifest_id, repo.partition("/")[0], now)
    action = EventAction.FILL if sparse else EventAction.PUSH
    for tag in tags:
        previous = _store_tag(db, repository, tag, manifest_id, manifest.digest, by, now)
        event_tables.add_manifest_event(db, action, repo, manifest, tag, previous, by, now)
    if not tags:
        event_tables.add_manifest_event(db, action, repo, manifest, None, None, by, now)
    return True


def media_type_check(is_immutable: IsImmutable) -> NeedingTagsCheck:
    """Returns the check that refuses to change the media type of a manifest that an immutable tag needs."""
    return NeedingTagsCheck(
        is_immutable,
        lambda target, tag: immutable_type_denied(target.repo, target.digest, target.media_type, tag),
    )


def _check_condition(db: apsw.Connection, repository: int, tag: Tag, condition: Condition) -> None:
    """Raises PreconditionFailed if the condition does not hold for the tag. A client that may not see the tag's digest
    gets the error without the digest."""
    current = _digest_of_tag(db, repository, tag)
    if not condition.holds(current):
        message = f"{tag} points at {current or 'nothing'} now; fetch it again and retry"
        raise with_redacted(
            PreconditionFailed(message, {"tag": tag, "current": current}), PreconditionFailed(detail={"tag": tag})
        )


def _digest_of_tag(db: apsw.Connection, repository: int, tag: Tag) -> Digest | None:
    """Returns the digest that the tag points at; None if there is no such tag."""
    current = db.execute(
        "SELECT m.digest FROM tag t JOIN manifest m ON m.id = t.manifest WHERE t.repository = ? AND t.name = ?",
        (repository, tag),
    ).get
    return None if current is None else Digest(current)


def _check_tag_unchanged(db: apsw.Connection, repository: int, repo: RepositoryName, tag: Tag, digest: Digest) -> None:
    """Raises Denied if the tag exists and points at another manifest than `digest`. Called for immutable tags."""
    current = _digest_of_tag(db, repository, tag)
    if current is not None and current != digest:
        raise immutable_tag_denied(repo, tag, current)


def _check_complete(db: apsw.Connection, repository: int, manifest: Manifest) -> None:
    """Raises ManifestBlobUnknown if the repository lacks content that the manifest refers to. Foreign layers may be
    missing, because clients fetch them from elsewhere.

    The *children* of an index are the entries of its list `manifests`. The repository must have each child as a
    manifest. If the child's digest is in `manifest.blob_children`, the repository may have it as a blob instead."""
    foreign = manifest.foreign
    blobs = {blob.digest for blob in manifest.blobs if blob.digest not in foreign}
    children = {child.digest for child in manifest.manifests}
    digests_without_manifest = _missing(db, _MANIFESTS_NOT_IN_REPOSITORY, repository, children)
    may_be_blobs = manifest.blob_children & set(digests_without_manifest)
    digests_without_blob = set(_missing(db, _BLOBS_NOT_IN_REPOSITORY, repository, may_be_blobs))
    missing = _missing(db, _BLOBS_NOT_IN_REPOSITORY, repository, blobs) + [
        digest for digest in digests_without_manifest if digest not in may_be_blobs or digest in digests_without_blob
    ]
    if missing:
        raise ManifestBlobUnknown(
            f"the manifest refers to content the repository does not have: {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else ""),
            [{"digest": digest} for digest in missing[:100]],
        )


def _json_array(digests: Iterable[Digest]) -> str:
    """Returns the digests as a sorted JSON array, for SQLite's function `json_each`. One statement then handles all
    digests, without Python's global interpreter lock. No character of a digest needs escaping in JSON."""
    return '["' + '","'.join(sorted(digests)) + '"]'


def _missing(db: apsw.Connection, sql: str, repository: int, digests: Set[Digest]) -> list[Digest]:
    """Returns the `digests` that the repository lacks. `sql`: `_BLOBS_NOT_IN_REPOSITORY` if they are digests of blobs,
    `_MANIFESTS_NOT_IN_REPOSITORY` if they are digests of manifests."""
    if not digests:
        return []
    rows: list[Any] = db.execute(sql, (repository, _json_array(digests))).fetchall()
    return [Digest(digest) for (digest,) in rows]


def _find_manifest(db: apsw.Connection, repository: int, digest: Digest) -> _StoredManifest | None:
    """Returns the stored row of the manifest; None if the repository does not have it."""
    row: Any = db.execute(
        "SELECT id, media_type, size, pushed FROM manifest WHERE repository = ? AND digest = ?", (repository, digest)
    ).get
    return None if row is None else _StoredManifest(*row)


def _update_manifest(
    db: apsw.Connection,
    repo: RepositoryName,
    repository: int,
    stored: _StoredManifest,
    manifest: Manifest,
    by: Actor,
    now: float,
    *,
    is_push: bool,
) -> None:
    """Updates the row of a manifest that the repository has: stores a changed media type, and the body if the stored
    manifest is damaged. `is_push`: whether a client pushes the manifest. For a push, also updates the time of the last
    push (see `PUSH_TIME_STEP_SECONDS`), and records a change of the media type in the audit log."""
    if is_push and abs(now - stored.pushed) > PUSH_TIME_STEP_SECONDS:
        db.execute("UPDATE manifest SET pushed = ? WHERE id = ?", (now, stored.id))
    if not stored.size:
        heal_manifest(db, repository, stored.id, manifest, now)
    if stored.media_type != manifest.media_type:
        db.execute("UPDATE manifest SET media_type = ? WHERE id = ?", (manifest.media_type, stored.id))
        if is_push:
            types = {"media_type": manifest.media_type, "previous": stored.media_type}
            record_content(db, by, now, "manifest.put", repo, manifest.digest, types)


def _add_manifest(db: apsw.Connection, repository: int, manifest: Manifest, pushed: float) -> int:
    """Stores a manifest that the repository does not have, and the digests that the manifest refers to. `pushed`: the
    time of the last push, which is stored in the manifest's row. Returns the manifest's row id."""
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
            pushed,
            manifest.body,
        ),
    ).get
    # A child in `blob_children` can be a blob or a manifest. Both tables get its digest, so that the child is not
    # removed while this manifest refers to it.
    blobs = {blob.digest for blob in manifest.blobs} | manifest.blob_children
    _store_references(db, "manifest_blob", repository, manifest_id, blobs)
    _store_references(db, "manifest_child", repository, manifest_id, {child.digest for child in manifest.manifests})
    deleted_manifests.remove(db, repository, manifest.digest)
    db.execute("UPDATE repository SET manifests = manifests + 1 WHERE id = ?", (repository,))
    return int(manifest_id)


def _store_references(db: apsw.Connection, table: str, repository: int, manifest_id: int, digests: Set[Digest]) -> None:
    """Records in `table` that a manifest refers to each of `digests`. `manifest_id`: the manifest's row id."""
    if digests:
        db.execute(
            f"INSERT INTO {table} (repository, digest, manifest) SELECT ?1, value, ?2 FROM json_each(?3)",
            (repository, manifest_id, _json_array(digests)),
        )


def _store_tag(
    db: apsw.Connection, repository: int, tag: Tag, manifest_id: int, digest: Digest, by: Actor, now: float
) -> Digest | None:
    """Points the tag at the manifest, and returns the tag's previous digest; None if the tag is new. Adds an entry to
    the tag history if the digest changes. Raises QuotaExceeded if the tag is new and does not fit into a quota."""
    previous = _digest_of_tag(db, repository, tag)
    try:
        db.execute(
            "INSERT INTO tag (repository, name, manifest, updated) VALUES (?, ?, ?, ?) "
            "ON CONFLICT (repository, name) DO UPDATE SET manifest = excluded.manifest, updated = excluded.updated",
            (repository, tag, manifest_id, now),
        )
    except apsw.ConstraintError as error:
        raise usage_tables.tag_refusal(db, error, repository) from None
    if previous != digest:
        _record_tag(db, repository, tag, digest, by, now)
    return previous


def _record_tag(db: apsw.Connection, repository: int, tag: str, digest: Digest | None, by: Actor, now: float) -> None:
    """Adds an entry to the tag history. `digest`: the tag's new digest; None if the tag was deleted."""
    db.execute(
        "INSERT INTO tag_history (repository, tag, digest, at, actor, address, request_id, user_agent) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (repository, tag, digest, now, by.name, by.address, by.request_id, by.user_agent),
    )


def delete_tag(
    db: apsw.Connection,
    repo: RepositoryName,
    tag: Tag,
    by: Actor,
    now: float,
    *,
    condition: Condition | None = None,
    is_immutable: IsImmutable = nothing_immutable,
    action: EventAction = EventAction.DELETE,
) -> None:
    """Deletes the tag, but not its manifest. `action`: the action of the event that this adds. Raises NameUnknown if
    there is no such repository, ManifestUnknown if the repository has no such tag, PreconditionFailed if `condition`
    does not hold for the tag, Denied if the tag is immutable."""
    repository = lookups.repository_id(db, repo)
    digest = _digest_of_tag(db, repository, tag)
    if digest is None:
        raise ManifestUnknown(f"{repo} has no tag {tag}")
    if condition:
        _check_condition(db, repository, tag, condition)
    if is_immutable(tag):
        raise immutable_delete_denied(repo, tag)
    db.execute("DELETE FROM tag WHERE repository = ? AND name = ?", (repository, tag))
    _record_tag(db, repository, tag, digest=None, by=by, now=now)
    event_tables.add_tag_deletion(db, action, repo, tag, digest, by, now)


def put_back(
    db: apsw.Connection,
    repo: RepositoryName,
    digests: Iterable[Digest],
    by: Actor,
    now: float,
    *,
    optional: Set[Digest] = frozenset(),
) -> list[Digest]:
    """Puts deleted manifests back into the repository, and returns the digests of the manifests that it has put back.
    In `digests`, an index must come after the manifests that it lists. Skips manifests that the repository has. Raises
    ManifestUnknown if a deleted manifest is no longer stored. Raises ManifestBlobUnknown if the repository lacks
    content that a deleted manifest refers to. Skips a manifest in `optional` instead of raising these errors."""
    repository = lookups.repository_id(db, repo)
    restored: list[Digest] = []
    for digest in digests:
        try:
            is_restored = _put_manifest_back(db, repo, repository, digest)
        except (ManifestUnknown, ManifestBlobUnknown):
            if digest not in optional:
                raise
            continue
        if is_restored:
            record_content(db, by, now, "manifest.restore", repo, digest)
            restored.append(digest)
    return restored


def _put_manifest_back(db: apsw.Connection, repo: RepositoryName, repository: int, digest: Digest) -> bool:
    """Puts a deleted manifest back, and returns True. Returns False if the repository has the manifest already. Raises
    ManifestUnknown and ManifestBlobUnknown, as `put_back` describes."""
    if _find_manifest(db, repository, digest) is not None:
        return False
    deleted = deleted_manifests.find(db, repository, digest)
    if deleted is None:
        raise not_restorable(repo, digest)
    _check_restorable(db, repo, repository, deleted.manifest)
    _add_manifest(db, repository, deleted.manifest, deleted.pushed)
    return True


def _check_restorable(db: apsw.Connection, repo: RepositoryName, repository: int, manifest: Manifest) -> None:
    """Makes the check of `_check_complete`. The message of its error says to push the image again."""
    try:
        _check_complete(db, repository, manifest)
    except ManifestBlobUnknown as error:
        raise ManifestBlobUnknown(
            f"{repo}@{manifest.digest} is not complete any more: {error.message}; push the image again",
            error.detail,
        ) from None


def move_tag(
    db: apsw.Connection,
    repo: RepositoryName,
    tag: Tag,
    manifest: Manifest,
    by: Actor,
    now: float,
    *,
    condition: Condition | None,
    is_immutable: IsImmutable,
    force: bool,
) -> Digest | None:
    """Points the tag at a manifest that the repository has, and returns the tag's previous digest; None if the tag is
    new. `storage.tag_history.TagHistory.move` describes `condition`, `is_immutable`, `force` and the errors."""
    repository = lookups.repository_id(db, repo)
    manifest_id = db.execute(
        "SELECT id FROM manifest WHERE repository = ? AND digest = ?", (repository, manifest.digest)
    ).get
    if manifest_id is None:
        raise not_restorable(repo, manifest.digest)
    if condition:
        _check_condition(db, repository, tag, condition)
    if is_immutable(tag) and not force:
        _check_tag_unchanged(db, repository, repo, tag, manifest.digest)
    _check_restorable(db, repo, repository, manifest)
    previous = _store_tag(db, repository, tag, manifest_id, manifest.digest, by, now)
    if previous != manifest.digest:
        event_tables.add_manifest_event(db, EventAction.MOVE, repo, manifest, tag, previous, by, now)
    return previous
