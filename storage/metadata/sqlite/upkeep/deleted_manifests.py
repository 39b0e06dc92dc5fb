"""Deleted manifests that can still be put back (table `deleted_manifest`).

Functions that change something run inside a transaction that the caller commits. `repository` is the row id of a
repository. Times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import apsw

from storage.content import Manifest
from storage.names import Digest

MAX_DROPPED: Final = 500
"""Largest number of rows that `drop_of_repository` deletes."""
MAX_DROPPED_BYTES: Final = 16 * 1024 * 1024
"""A transaction deletes no further rows after it has deleted rows with this many bytes of manifests."""


def keep(db: apsw.Connection, manifest_id: int, now: float) -> None:
    """Copies the manifest with this row id, which the caller then deletes. Copies no empty body, which could not be put
    back."""
    db.execute(
        "INSERT OR REPLACE INTO deleted_manifest (repository, digest, media_type, subject, pushed, deleted, body) "
        "SELECT repository, digest, media_type, subject, pushed, ?, body FROM manifest WHERE id = ? AND size > 0",
        (now, manifest_id),
    )


def forget(db: apsw.Connection, repository: int, digest: Digest) -> None:
    """Deletes the row of a manifest, if there is one, because the repository has the manifest again."""
    db.execute("DELETE FROM deleted_manifest WHERE repository = ? AND digest = ?", (repository, digest))


class DeletedManifest(NamedTuple):
    """A deleted manifest, and the time at which it was pushed."""

    manifest: Manifest
    pushed: float


def find(db: apsw.Connection, repository: int, digest: Digest) -> DeletedManifest | None:
    """Returns a deleted manifest; None if it is not kept."""
    row: Any = db.execute(
        "SELECT body, media_type, pushed FROM deleted_manifest WHERE repository = ? AND digest = ?",
        (repository, digest),
    ).get
    return None if row is None else DeletedManifest(Manifest(row[0], row[1], digest), row[2])


def referrers(db: apsw.Connection, repository: int, subject: Digest, limit: int) -> list[Digest]:
    """Returns at most `limit` deleted manifests whose subject is `subject`."""
    rows: list[Any] = db.execute(
        "SELECT digest FROM deleted_manifest INDEXED BY deleted_manifest_subject "
        "WHERE repository = ? AND subject = ? LIMIT ?",
        (repository, subject, limit),
    ).fetchall()
    return [Digest(digest) for (digest,) in rows]


def drop_of_repository(db: apsw.Connection, repository: int, before: float) -> bool:
    """Deletes rows of manifests of one repository that were deleted by the time `before`, but only so many as one
    transaction should. Returns whether there are none left."""
    rows: list[Any] = db.execute(
        "SELECT rowid, octet_length(body) FROM deleted_manifest WHERE repository = ? AND deleted <= ? "
        "ORDER BY deleted LIMIT ?",
        (repository, before, MAX_DROPPED),
    ).fetchall()
    return _drop(db, rows) == len(rows) < MAX_DROPPED


def _drop(db: apsw.Connection, rows: Sequence[tuple[int, int]]) -> int:
    """Deletes rows, given by row id and size, until they have `MAX_DROPPED_BYTES`. Returns how many it deleted."""
    dropped = dropped_bytes = 0
    for row_id, size in rows:
        db.execute("DELETE FROM deleted_manifest WHERE rowid = ?", (row_id,))
        dropped += 1
        dropped_bytes += size
        if dropped_bytes >= MAX_DROPPED_BYTES:
            break
    return dropped
