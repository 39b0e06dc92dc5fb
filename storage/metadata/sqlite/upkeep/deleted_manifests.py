"""Deleted manifests that can still be put back (table `deleted_manifest`).

A `DeletedManifestContent` has the body of a deleted manifest. A `DeletedManifest` describes a deleted manifest without
its body. Functions that change the table run inside a transaction that the caller commits. `repository` is the row id
of a repository. Times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

import apsw

from storage.content import Manifest
from storage.metadata.catalog import DeletedManifest
from storage.names import Digest

MAX_DROPPED: Final = 500
"""Largest number of manifests that one call of `drop_of_repository` removes."""
MAX_DROPPED_BYTES: Final = 1024 * 1024
"""Largest total size, in bytes, of the manifests that one call removes, so that other changes do not wait for long. If
the first manifest is larger, the call removes only this manifest."""
_OLDEST: Final = """
SELECT d.repository, d.digest, coalesce(r.name, ''), octet_length(d.body), d.deleted
  FROM deleted_manifest d LEFT JOIN repository r ON r.id = d.repository
 WHERE d.deleted <= ?1 AND (d.deleted, d.repository, d.digest) > (?2, ?3, ?4)
 ORDER BY d.deleted, d.repository, d.digest LIMIT ?5"""
_OLDEST_OF_REPOSITORY: Final = """
SELECT repository, digest, '', octet_length(body), deleted FROM deleted_manifest
 WHERE repository = ? AND deleted <= ? ORDER BY deleted LIMIT ?"""


class DeletedManifestContent(NamedTuple):
    """A deleted manifest with its body, and the time at which it was pushed."""

    manifest: Manifest
    pushed: float


def add(db: apsw.Connection, manifest_id: int, now: float) -> None:
    """Copies the manifest with this row id into the table `deleted_manifest`. The caller then deletes the manifest from
    the table `manifest`. Does not copy a damaged manifest, because it has no body."""
    db.execute(
        "INSERT OR REPLACE INTO deleted_manifest (repository, digest, media_type, subject, pushed, deleted, body) "
        "SELECT repository, digest, media_type, subject, pushed, ?, body FROM manifest WHERE id = ? AND size > 0",
        (now, manifest_id),
    )


def remove(db: apsw.Connection, repository: int, digest: Digest) -> None:
    """Removes the manifest from the table `deleted_manifest`, if it is there."""
    db.execute("DELETE FROM deleted_manifest WHERE repository = ? AND digest = ?", (repository, digest))


def find(db: apsw.Connection, repository: int, digest: Digest) -> DeletedManifestContent | None:
    """Returns a deleted manifest; None if the table does not have it."""
    row: Any = db.execute(
        "SELECT body, media_type, pushed FROM deleted_manifest WHERE repository = ? AND digest = ?",
        (repository, digest),
    ).get
    return None if row is None else DeletedManifestContent(Manifest(row[0], row[1], digest), row[2])


def referrers(db: apsw.Connection, repository: int, subject: Digest, limit: int) -> list[Digest]:
    """Returns the digests of at most `limit` deleted manifests whose subject is `subject`."""
    rows: list[Any] = db.execute(
        "SELECT digest FROM deleted_manifest INDEXED BY deleted_manifest_subject "
        "WHERE repository = ? AND subject = ? LIMIT ?",
        (repository, subject, limit),
    ).fetchall()
    return [Digest(digest) for (digest,) in rows]


def oldest(
    db: apsw.Connection, before: float, limit: int, after: DeletedManifest | None = None
) -> list[DeletedManifest]:
    """Returns at most `limit` manifests that were deleted at `before` or earlier, earliest deletion first. The result
    begins after the manifest `after`. None: it begins with the earliest deletion."""
    position = (after.deleted_at, after.repository_id, after.digest) if after else (float("-inf"), 0, "")
    return _rows(db, _OLDEST, before, *position, limit)


def drop_oldest(db: apsw.Connection, before: float, limit: int) -> list[DeletedManifest]:
    """Removes manifests that were deleted at `before` or earlier, earliest deletion first: at most `limit` manifests
    and `MAX_DROPPED_BYTES`. Returns the removed manifests."""
    return _drop(db, oldest(db, before, limit))


def drop_of_repository(db: apsw.Connection, repository: int, before: float) -> bool:
    """Removes manifests of one repository that were deleted at `before` or earlier: at most `MAX_DROPPED` manifests and
    `MAX_DROPPED_BYTES`. Returns False if there may be more such manifests."""
    expired = _rows(db, _OLDEST_OF_REPOSITORY, repository, before, MAX_DROPPED)
    # If `expired` has `MAX_DROPPED` manifests, there may be more.
    return len(_drop(db, expired)) == len(expired) < MAX_DROPPED


def _drop(db: apsw.Connection, manifests: Iterable[DeletedManifest]) -> list[DeletedManifest]:
    """Removes manifests in order. Stops before their total size exceeds `MAX_DROPPED_BYTES`, but always removes the
    first one. Returns the removed manifests."""
    dropped: list[DeletedManifest] = []
    size = 0
    for manifest in manifests:
        size += manifest.size
        if dropped and size > MAX_DROPPED_BYTES:
            break
        remove(db, manifest.repository_id, manifest.digest)
        dropped.append(manifest)
    return dropped


def _rows(db: apsw.Connection, sql: str, *parameters: object) -> list[DeletedManifest]:
    rows: list[Any] = db.execute(sql, parameters).fetchall()
    return [DeletedManifest(repository, Digest(digest), *other_columns) for repository, digest, *other_columns in rows]
