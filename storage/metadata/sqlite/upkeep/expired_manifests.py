"""Deleted manifests that can still be put back, as garbage collection sees them.

Each function runs on the given connection. `before` is a time in seconds since 1970.
"""

from __future__ import annotations

from typing import Any

import apsw

from storage.metadata.catalog import DeletedManifest
from storage.names import Digest

MAX_DROPPED_BYTES = 1024 * 1024
"""Size of the manifests in bytes that one transaction deletes, so that other changes do not wait for long."""
_OLDEST = """
SELECT d.repository, d.digest, coalesce(r.name, ''), length(d.body), d.deleted
  FROM deleted_manifest d LEFT JOIN repository r ON r.id = d.repository
 WHERE d.deleted <= ?1 AND (d.deleted, d.repository, d.digest) > (?2, ?3, ?4)
 ORDER BY d.deleted, d.repository, d.digest LIMIT ?5"""


def deleted_manifests(
    db: apsw.Connection, before: float, limit: int, after: DeletedManifest | None = None
) -> list[DeletedManifest]:
    """Returns at most `limit` manifests that were deleted by the time `before` and follow the manifest `after`, oldest
    first."""
    position = (after.deleted, after.repository, after.digest) if after else (float("-inf"), 0, "")
    found: list[Any] = db.execute(_OLDEST, (before, *position, limit)).fetchall()
    return [
        DeletedManifest(repository, Digest(digest), name, size, deleted)
        for repository, digest, name, size, deleted in found
    ]


def drop_deleted_manifests(db: apsw.Connection, before: float, limit: int) -> list[DeletedManifest]:
    """Deletes at most `limit` of the manifests that were deleted by the time `before`, the oldest first, and returns
    them. Deletes fewer if they are large, but at least one. Runs in a transaction, which the caller commits."""
    dropped: list[DeletedManifest] = []
    size = 0
    for manifest in deleted_manifests(db, before, limit):
        size += manifest.size
        if dropped and size > MAX_DROPPED_BYTES:
            break
        dropped.append(manifest)
    db.executemany(
        "DELETE FROM deleted_manifest WHERE repository = ? AND digest = ?",
        [(manifest.repository, manifest.digest) for manifest in dropped],
    )
    return dropped
