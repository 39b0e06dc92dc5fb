"""Stores records of damaged content and of the rounds of scrub in the metadata database (`SqliteDamageRecords`).

- *Scrub* is a job that reads all content and checks its digests. A *round* is one pass of scrub over all content. A
  round checks the blobs in the order of their row ids. The row id of the last blob of the round is `until_blob`. The
  row id of the last blob that was checked is `after_blob`. For manifests, the columns are `until_manifest` and
  `after_manifest`.
- The *place* of a blob is the key of its bytes in the blob store (column `place` of the table `blob`). A damaged blob
  has an empty place.
- The table `damaged_blob` has two columns with keys. `former` is the place that the blob had before the damage was
  found. `place` is the key of the damaged bytes in the *quarantine*, a part of the blob store.
- A damaged manifest has the size 0 and an empty body. The record of its damage keeps the body.
- Content is *healed* when its right bytes are stored again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import apsw

from storage.content import Page, digest_of
from storage.damage import DamagedBlob, DamagedManifest, ManifestCheck, ScrubRound, StoredBlob
from storage.data_dir.reserve import ReserveUse
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep import damage_changes
from storage.names import Digest, RepositoryName

MAX_ROUNDS: Final = 20
"""Number of rounds that the table `scrub_round` keeps."""
MAX_SHOWN_HOLDERS: Final = 20
"""Largest number of repositories that are named for a damaged blob."""
MANIFESTS_PER_CHECK: Final = 200
"""Largest number of manifests that one call of `check_manifests` hashes."""
BYTES_PER_CHECK: Final = 4 * 1024 * 1024
"""A call of `check_manifests` ends when the hashed bodies together have at least this number of bytes."""
MANIFESTS_PER_RECHECK: Final = 8
"""Number of damaged manifests that one transaction hashes again."""
_ROUND_COLUMNS: Final = (
    "id, started, updated, ended, until_blob, until_manifest, total_bytes, after_blob, after_manifest, blobs, "
    "manifests, bytes, damaged"
)
_MIRRORED_HOLDERS: Final = """
SELECT r.name FROM blob b CROSS JOIN blob_link l ON l.blob = b.id CROSS JOIN repository r ON r.id = l.repository
 WHERE b.digest = ?1 AND substr(r.name, 1, instr(r.name, '/') - 1) IN (SELECT value FROM json_each(?2)) LIMIT ?3"""
"""Selects the mirrored repositories that have the blob. The name of a mirrored repository begins with the name of its
upstream and a slash. A common layer belongs to very many repositories, so this query runs in the thread for long
reads."""
_OLDEST_BLOB_CREATED = "SELECT min(created) FROM (SELECT created FROM blob ORDER BY id LIMIT 100)"
"""Selects the time at which the oldest blob was created. This blob usually has the lowest row id. But healing a blob
sets its `created` to the time of the healing. Therefore, the query takes the earliest `created` of several rows with
the lowest row ids."""


class SqliteDamageRecords:
    """Implements `storage.damage.DamageRecords`, which describes the methods."""

    def __init__(
        self,
        db: apsw.Connection,
        writer: CommitThread | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        clock: Callable[[], float],
    ) -> None:
        """`db`: the connection for short reads. `scans`: runs long reads in a thread. `writer`: runs changes. `clock`:
        returns the time in seconds since 1970."""
        self._db = db
        self._writer = writer
        self._scans = scans
        self._clock = clock

    async def current_round(self) -> ScrubRound | None:
        newest = await self.rounds(1)
        return newest[0] if newest and newest[0].ended is None else None

    async def start_round(self) -> ScrubRound:
        until_blob, until_manifest, size = await self._scans.run(_measure_content)
        now = self._clock()

        def insert(db: apsw.Connection) -> ScrubRound:
            db.execute("DELETE FROM scrub_round WHERE ended IS NULL")
            row: Any = db.execute(
                "INSERT INTO scrub_round (started, updated, until_blob, until_manifest, total_bytes) "
                f"VALUES (?, ?, ?, ?, ?) RETURNING {_ROUND_COLUMNS}",
                (now, now, until_blob, until_manifest, size),
            ).fetchone()
            db.execute(
                "DELETE FROM scrub_round WHERE id <= (SELECT id FROM scrub_round ORDER BY id DESC LIMIT 1 OFFSET ?)",
                (MAX_ROUNDS,),
            )
            return ScrubRound(*row)

        return await self._writer.run(insert, reserve_use=ReserveUse.HALF)

    async def save_round(self, progress: ScrubRound) -> None:
        await self._write_round(progress, ended=None, durable=False)

    async def end_round(self, progress: ScrubRound) -> ScrubRound:
        return await self._write_round(progress, ended=self._clock(), durable=True)

    async def _write_round(self, progress: ScrubRound, *, ended: float | None, durable: bool) -> ScrubRound:
        """Stores the progress of a round, and returns the stored round. If the database has no such round, returns
        `progress`. `ended`: the time at which the round ended, in seconds since 1970; None if it has not ended.

        When a round ends, its `total_bytes` becomes the number of bytes that the round checked. The two numbers can
        differ, because blobs can be deleted or healed during the round."""
        total_bytes = progress.total_bytes if ended is None else progress.checked_bytes
        values = (
            *(self._clock(), ended, progress.after_blob, progress.after_manifest, progress.blobs, progress.manifests),
            *(progress.checked_bytes, progress.damaged, total_bytes, progress.id),
        )

        def update(db: apsw.Connection) -> ScrubRound:
            row: Any = db.execute(
                "UPDATE scrub_round SET updated = ?, ended = ?, after_blob = ?, after_manifest = ?, blobs = ?, "
                f"manifests = ?, bytes = ?, damaged = ?, total_bytes = ? WHERE id = ? RETURNING {_ROUND_COLUMNS}",
                values,
            ).fetchone()
            return progress if row is None else ScrubRound(*row)

        return await self._writer.run(update, durable=durable, reserve_use=ReserveUse.HALF)

    async def rounds(self, limit: int) -> Sequence[ScrubRound]:
        rows: list[Any] = self._db.execute(
            f"SELECT {_ROUND_COLUMNS} FROM scrub_round ORDER BY id DESC LIMIT ?", (limit,)
        ).fetchall()
        return [ScrubRound(*row) for row in rows]

    async def oldest_blob_created_at(self) -> float | None:
        created: float | None = self._db.execute(_OLDEST_BLOB_CREATED).get
        return created

    async def blobs_after(self, after: int, until: int, limit: int) -> Sequence[StoredBlob]:
        def read(db: apsw.Connection) -> list[StoredBlob]:
            rows: list[Any] = db.execute(
                "SELECT id, digest, size, place FROM blob WHERE id > ? AND id <= ? AND place <> '' ORDER BY id LIMIT ?",
                (after, until, limit),
            ).fetchall()
            return [StoredBlob(row_id, Digest(digest), size, place) for row_id, digest, size, place in rows]

        return await self._scans.run(read)

    async def place_of(self, digest: Digest) -> str | None:
        place: str | None = self._db.execute("SELECT place FROM blob WHERE digest = ?", (digest,)).get
        return place

    async def mark_blob_damaged(self, digest: Digest, former_place: str, reason: str, quarantine_place: str) -> bool:
        now = self._clock()
        return await self._writer.run(
            lambda db: damage_changes.mark_blob_damaged(db, digest, former_place, reason, quarantine_place, now),
            reserve_use=ReserveUse.ALL,
        )

    async def mark_blob_healed(self, digest: Digest, place: str) -> bool:
        now = self._clock()
        return await self._writer.run(
            lambda db: damage_changes.mark_blob_healed(db, digest, place, now), reserve_use=ReserveUse.ALL
        )

    async def damaged_blobs(self, after: str | None, limit: int) -> Page[DamagedBlob]:
        rows: list[Any] = self._db.execute(
            "SELECT d.digest, ifnull(b.size, 0), d.found, d.reason, d.place, d.former "
            "FROM damaged_blob d LEFT JOIN blob b ON b.digest = d.digest WHERE d.digest > ? ORDER BY d.digest LIMIT ?",
            (after or "", limit + 1),
        ).fetchall()
        blobs = [
            DamagedBlob(
                Digest(digest),
                size,
                found_at,
                reason,
                place,
                former,
                await self.holders(Digest(digest), MAX_SHOWN_HOLDERS),
            )
            for digest, size, found_at, reason, place, former in rows[:limit]
        ]
        return Page(blobs, more=len(rows) > limit)

    async def damaged_manifests(self, limit: int) -> Sequence[DamagedManifest]:
        rows: list[Any] = self._db.execute(
            "SELECT r.name, d.digest, d.found, d.reason "
            "FROM damaged_manifest d JOIN repository r ON r.id = d.repository ORDER BY d.found, d.digest LIMIT ?",
            (limit,),
        ).fetchall()
        return [
            DamagedManifest(RepositoryName(name), Digest(digest), *found_and_reason)
            for name, digest, *found_and_reason in rows
        ]

    async def damaged_count(self) -> int:
        counts = "SELECT (SELECT count(*) FROM damaged_blob) + (SELECT count(*) FROM damaged_manifest)"
        count: Any = await self._scans.run(lambda db: db.execute(counts).get)
        return int(count)

    async def holders(self, digest: Digest, limit: int) -> Sequence[RepositoryName]:
        return damage_changes.holders(self._db, digest, limit)

    async def mirrored_holders(
        self, digest: Digest, upstreams: Collection[str], limit: int
    ) -> Sequence[RepositoryName]:
        values = (digest, json.dumps(list(upstreams)), limit)
        rows: list[Any] = await self._scans.run(lambda db: db.execute(_MIRRORED_HOLDERS, values).fetchall())
        return [RepositoryName(name) for (name,) in rows]

    async def check_manifests(self, after: int, until: int) -> ManifestCheck | None:
        return await self._scans.run(lambda db: _check_manifests(db, after, until))

    async def mark_manifest_damaged(self, row_id: int) -> DamagedManifest | None:
        now = self._clock()
        return await self._writer.run(
            lambda db: damage_changes.mark_manifest_damaged(db, row_id, now), reserve_use=ReserveUse.ALL
        )

    async def recheck_damaged_manifests(self) -> int:
        """Hashes at most `MANIFESTS_PER_RECHECK` damaged manifests again, oldest damage first. Heals each manifest that
        has the right digest: faulty memory can have made its first hash wrong. The limit keeps the transaction
        short."""
        if self._db.execute("SELECT 1 FROM damaged_manifest LIMIT 1").get is None:
            return 0
        now = self._clock()
        return await self._writer.run(
            lambda db: damage_changes.recheck_damaged_manifests(db, MANIFESTS_PER_RECHECK, now),
            reserve_use=ReserveUse.ALL,
        )


def _measure_content(db: apsw.Connection) -> tuple[int, int, int]:
    """Returns the highest row id of a blob, the highest row id of a manifest, and the total size in bytes of all blobs
    that are not damaged. Does not add the sizes of manifests, because SQLite would read all bodies."""
    last_blob: Any = db.execute("SELECT ifnull(max(id), 0) FROM blob").get
    last_manifest: Any = db.execute("SELECT ifnull(max(id), 0) FROM manifest").get
    size: Any = db.execute("SELECT ifnull(sum(size), 0) FROM blob WHERE place <> ''").get
    return last_blob, last_manifest, size


def _check_manifests(db: apsw.Connection, after: int, until: int) -> ManifestCheck | None:
    """Hashes the next manifests whose row ids are above `after` and at most `until`. Returns None if there are none.
    Stops after `MANIFESTS_PER_CHECK` manifests, or when the hashed bodies together have at least `BYTES_PER_CHECK`
    bytes. Reads each body with a separate statement, so that only one body is in memory at a time."""
    rows: list[Any] = db.execute(
        "SELECT id, digest FROM manifest WHERE id > ? AND id <= ? AND size > 0 ORDER BY id LIMIT ?",
        (after, until, MANIFESTS_PER_CHECK),
    ).fetchall()
    if not rows:
        return None
    damaged_row_ids, read_bytes, last_row_id, count = [], 0, after, 0
    for row_id, digest in rows:
        body: bytes | None = db.execute("SELECT body FROM manifest WHERE id = ? AND digest = ?", (row_id, digest)).get
        last_row_id, count = row_id, count + 1
        if body is None:
            continue  # the manifest was deleted after the first statement
        read_bytes += len(body)
        # A body is empty if the manifest was marked as damaged after the first statement.
        if body and digest_of(body, Digest(digest).algorithm) != digest:
            damaged_row_ids.append(row_id)
        if read_bytes >= BYTES_PER_CHECK:
            break
    return ManifestCheck(last_row_id, count, read_bytes, damaged_row_ids)
