"""Stores the pulls of manifests in the metadata database (`SqlitePulls`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import apsw

from storage.data_dir.reserve import ReserveUse
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase
from storage.metadata.sqlite.upkeep import recorded_periods
from storage.names import Digest, RepositoryName
from storage.pulls import MAX_SAVED_PULLS, PullCount, PullRecord

_ADD: Final = """
INSERT INTO manifest_pull (manifest, upstream, last, pulls)
SELECT m.id, ?3, ?4, ?5 FROM repository r JOIN manifest m ON m.repository = r.id AND m.digest = ?2 WHERE r.name = ?1
    ON CONFLICT (manifest) DO UPDATE SET last = max(last, excluded.last), pulls = pulls + excluded.pulls"""
_RECORD: Final = """
SELECT p.upstream, p.last, p.pulls
  FROM repository r JOIN manifest m ON m.repository = r.id AND m.digest = ?2 JOIN manifest_pull p ON p.manifest = m.id
 WHERE r.name = ?1"""


class SqlitePulls:
    """Implements `storage.pulls.Pulls`; see there for the contract. Reads on the event loop."""

    def __init__(self, db: apsw.Connection, writer: CommitThread | ImmutableDatabase) -> None:
        """`db`: the connection for reads. `writer`: makes the changes. An ImmutableDatabase has the method `run` of a
        CommitThread, but refuses every change with StorageFull, because the disk is too full."""
        self._db = db
        self._writer = writer

    async def save(self, counts: Sequence[PullCount]) -> None:
        assert len(counts) <= MAX_SAVED_PULLS
        rows = [(pull.repository, pull.digest, pull.upstream, pull.last, pull.pulls) for pull in counts]

        def add(db: apsw.Connection) -> None:
            db.executemany(_ADD, rows)

        # `ReserveUse.NONE`: on a full disk, counts of pulls must not use the reserved space that deletions need.
        await self._writer.run(add, durable=False, reserve_use=ReserveUse.NONE)

    async def mark_pulls_recorded(self, now: float) -> None:
        # Records that the database has all pulls until `now`. `ReserveUse.NONE`, as in `save`: if a full disk keeps
        # `save` from storing pulls, this call must fail as well.
        await self._writer.run(
            lambda db: recorded_periods.mark_pulls_recorded(db, now), durable=False, reserve_use=ReserveUse.NONE
        )

    async def record_of(self, repo: RepositoryName, digest: Digest) -> PullRecord | None:
        row: Any = self._db.execute(_RECORD, (repo, digest)).fetchone()
        return None if row is None else PullRecord(*row)


def add_mirrored_pull_row(db: apsw.Connection, manifest_id: int, upstream: str, now: float) -> None:
    """Adds a row to `manifest_pull` for a mirrored manifest that was just stored: 0 pulls, and `now` (seconds since
    1970) as the time of the last pull. Does nothing if the manifest has a row. Runs inside a transaction, which the
    caller commits."""
    db.execute(
        "INSERT INTO manifest_pull (manifest, upstream, last, pulls) VALUES (?, ?, ?, 0) ON CONFLICT DO NOTHING",
        (manifest_id, upstream, now),
    )


def add_imported_pull_row(db: apsw.Connection, manifest_id: int, now: float) -> None:
    """Adds or updates the row in `manifest_pull` of a manifest that was imported from another registry: 0 pulls, and
    the time of the import, `now` (seconds since 1970), as the time of the last pull. Does nothing if the row has pulls.
    Runs inside a transaction, which the caller commits."""
    db.execute(
        "INSERT INTO manifest_pull (manifest, upstream, last, pulls) VALUES (?, '', ?, 0) "
        "ON CONFLICT (manifest) DO UPDATE SET last = excluded.last WHERE pulls = 0",
        (manifest_id, now),
    )


def delete_pull_row(db: apsw.Connection, manifest_id: int) -> None:
    """Deletes the row of a manifest in `manifest_pull`. Call this before the manifest itself is deleted. Runs inside a
    transaction, which the caller commits."""
    db.execute("DELETE FROM manifest_pull WHERE manifest = ?", (manifest_id,))
