"""`SqliteTagHistory`: reads the tag history in the metadata database, moves tags, and deletes tags.

The store keeps a deleted manifest for some time. A move of a tag to a deleted manifest *puts the manifest back*: the
manifest belongs to its repository again. The move also tries to put back the deleted *referrers* of the manifest, such
as its signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import apsw

from storage.content import Actor, Condition, Page
from storage.data_dir.reserve import ReserveUse
from storage.metadata.sqlite import lookups, manifest_and_tag_changes
from storage.metadata.sqlite.access.audit_table import record
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep.restore_plan import PlannedManifest, find_plan
from storage.names import Digest, RepositoryName, Tag
from storage.tag_history import Availability, TagChange, TagMove
from storage.tag_rules import IsImmutable

MAX_BATCH_MANIFESTS: Final = 200
"""Largest number of manifests in a batch: the manifests that one transaction puts back."""
FULL_BATCH_BYTES: Final = 8 * 1024 * 1024
"""A batch is full when its manifests have at least this many bytes in total."""
_CHANGES: Final = """
SELECT h.id, h.tag, h.digest, h.at, h.actor, h.address, h.request_id, h.user_agent,
       (SELECT p.digest FROM tag_history p
         WHERE p.repository = h.repository AND p.tag = h.tag AND p.id < h.id ORDER BY p.id DESC LIMIT 1),
       EXISTS (SELECT 1 FROM manifest m WHERE m.repository = h.repository AND m.digest = h.digest),
       EXISTS (SELECT 1 FROM deleted_manifest d WHERE d.repository = h.repository AND d.digest = h.digest)
  FROM tag_history h"""
_CHANGES_OF_TAG: Final = _CHANGES + " WHERE h.repository = ?1 AND h.tag = ?2 AND h.id < ?3 ORDER BY h.id DESC LIMIT ?4"
_CHANGES_OF_REPOSITORY: Final = (
    _CHANGES
    + " WHERE h.repository = ?1 AND h.at <= ?2 AND (h.at < ?2 OR h.id < ?3) ORDER BY h.at DESC, h.id DESC LIMIT ?4"
)
_CURRENT_DIGEST: Final = (
    "SELECT m.digest FROM tag t JOIN manifest m ON m.id = t.manifest WHERE t.repository = ? AND t.name = ?"
)
_MAX_ROUNDING_SECONDS: Final = 0.0005
"""The exact time of an entry is at most this much later than the time that people see, which is rounded to
milliseconds."""
_HIGHEST_ROW_ID: Final = 2**63 - 1
"""The largest possible row id in SQLite. No entry has it."""


class SqliteTagHistory:
    """Implements `storage.tag_history.TagHistory`, which describes the methods. Runs its queries in the scan thread,
    because a tag can have any number of entries."""

    def __init__(
        self,
        scans: ScanThread | ImmutableScans,
        writer: CommitThread | ImmutableDatabase,
        clock: Callable[[], float],
    ) -> None:
        """Reads through `scans` and changes through `writer`. `clock` returns the time in seconds since 1970."""
        self._scans = scans
        self._writer = writer
        self._clock = clock

    async def changes(self, repo: RepositoryName, tag: Tag | None, before: int | None, limit: int) -> Page[TagChange]:
        return await self._scans.run(lambda db: _read_changes(db, repo, tag, before, limit))

    async def current(self, repo: RepositoryName, tag: Tag) -> Digest | None:
        return await self._find_digest(repo, _CURRENT_DIGEST, tag)

    async def last_other_digest(self, repo: RepositoryName, tag: Tag, current: Digest | None) -> Digest | None:
        sql = (
            "SELECT digest FROM tag_history WHERE repository = ? AND tag = ? AND digest IS NOT NULL "
            "AND digest IS NOT ? ORDER BY id DESC LIMIT 1"
        )
        return await self._find_digest(repo, sql, tag, current)

    async def digest_at(self, repo: RepositoryName, tag: Tag, at: float) -> Digest | None:
        sql = (
            "SELECT digest FROM tag_history INDEXED BY tag_history_tag WHERE repository = ? AND tag = ? AND at <= ? "
            "ORDER BY id DESC LIMIT 1"
        )
        return await self._find_digest(repo, sql, tag, at + _MAX_ROUNDING_SECONDS)

    async def _find_digest(self, repo: RepositoryName, sql: str, *values: str | float | None) -> Digest | None:
        """Runs the query `sql` and returns the digest that it finds; None if it finds none. The query's parameters are
        the row id of the repository, followed by `values`."""

        def look_up(db: apsw.Connection) -> str | None:
            digest_text: str | None = db.execute(sql, (lookups.repository_id(db, repo), *values)).get
            return digest_text

        digest = await self._scans.run(look_up)
        return None if digest is None else Digest(digest)

    async def move(
        self,
        repo: RepositoryName,
        tag: Tag,
        digest: Digest,
        *,
        by: Actor,
        condition: Condition | None = None,
        is_immutable: IsImmutable,
        force: bool = False,
    ) -> TagMove:
        plan = await self._scans.run(lambda db: find_plan(db, repo, digest))
        # Puts referrers back before their subjects (the manifests to which they refer). `find_plan` finds the referrers
        # of a subject only while the subject is deleted. If the process dies between two batches, the subjects of the
        # remaining referrers are still deleted, so a repeated call finds these referrers.
        batches = _batches([manifest for group in reversed(plan.referrer_groups) for manifest in group] + plan.required)
        referrers = [manifest for group in plan.referrer_groups for manifest in group]
        may_stay_deleted = frozenset(manifest.digest for manifest in referrers)
        restored: list[Digest] = []

        def put_back(db: apsw.Connection, digests: Sequence[Digest]) -> list[Digest]:
            return manifest_and_tag_changes.put_back(db, repo, digests, by, self._clock(), optional=may_stay_deleted)

        for batch in batches[:-1]:
            restored += await self._writer.run(partial(put_back, digests=batch))

        def change(db: apsw.Connection) -> TagMove:
            restored_now = put_back(db, batches[-1])
            # A referrer can be an index. `put_back` has skipped such a referrer if a deleted manifest that the index
            # lists comes later in `batches`. All batches are done now, so the skipped referrers are tried again. Only
            # one batch of them is tried, to keep the transaction short.
            restored_so_far = {*restored, *restored_now}
            restored_now += put_back(
                db, _batches([manifest for manifest in referrers if manifest.digest not in restored_so_far])[0]
            )
            now = self._clock()
            previous = manifest_and_tag_changes.move_tag(
                *(db, repo, tag, plan.target, by, now),
                condition=condition,
                is_immutable=is_immutable,
                force=force,
            )
            if force and previous not in (None, digest) and is_immutable(tag):
                _record_forced_change(db, repo, tag, previous, by, now)
            return TagMove(tag, digest, previous, [*restored, *restored_now])

        return await self._writer.run(change)

    async def delete_tag(
        self, repo: RepositoryName, tag: Tag, *, by: Actor, is_immutable: IsImmutable, force: bool = False
    ) -> None:
        now = self._clock()

        def delete(db: apsw.Connection) -> None:
            if force and is_immutable(tag):
                previous = db.execute(_CURRENT_DIGEST, (lookups.repository_id(db, repo), tag)).get
                manifest_and_tag_changes.delete_tag(db, repo, tag, by, now)
                _record_forced_change(db, repo, tag, previous, by, now)
            else:
                manifest_and_tag_changes.delete_tag(db, repo, tag, by, now, is_immutable=is_immutable)

        await self._writer.run(delete, reserve_use=ReserveUse.ALL)


def _read_changes(
    db: apsw.Connection, repo: RepositoryName, tag: Tag | None, before: int | None, limit: int
) -> Page[TagChange]:
    repository = lookups.repository_id(db, repo)
    before_id = _HIGHEST_ROW_ID if before is None else before
    if tag is not None:
        rows: list[Any] = db.execute(_CHANGES_OF_TAG, (repository, tag, before_id, limit + 1)).fetchall()
    else:
        before_time = None if before is None else db.execute("SELECT at FROM tag_history WHERE id = ?", (before,)).get
        values = (repository, float("inf") if before_time is None else before_time, before_id, limit + 1)
        rows = db.execute(_CHANGES_OF_REPOSITORY, values).fetchall()
    return Page([_to_tag_change(row) for row in rows[:limit]], more=len(rows) > limit)


def _to_tag_change(row: tuple[Any, ...]) -> TagChange:
    """Converts a row of the query `_CHANGES` to an entry of the tag history."""
    row_id, tag, digest, at, actor, address, request_id, user_agent, previous, is_stored, is_deleted = row
    availability = Availability.GONE
    if is_stored:
        availability = Availability.STORED
    elif is_deleted:
        availability = Availability.DELETED
    return TagChange(
        id=row_id,
        tag=Tag(tag),
        digest=None if digest is None else Digest(digest),
        previous=None if previous is None else Digest(previous),
        at=at,
        by=Actor(actor, address, request_id, user_agent),
        availability=None if digest is None else availability,
    )


def _record_forced_change(
    db: apsw.Connection, repo: RepositoryName, tag: Tag, previous: Any, by: Actor, now: float
) -> None:
    """Records in the audit log that `by` forced a change of an immutable tag. `previous`: the digest that the tag
    pointed at before the change."""
    record(db, by, now, "tag.force", repo, {"previous": previous}, part=f":{tag}")


def _batches(manifests: Sequence[PlannedManifest]) -> list[list[Digest]]:
    """Divides manifests into batches, in their order. If there are no manifests, returns one empty batch."""
    batches: list[list[Digest]] = [[]]
    batch_bytes = 0
    for manifest in manifests:
        if len(batches[-1]) >= MAX_BATCH_MANIFESTS or batch_bytes >= FULL_BATCH_BYTES:
            batches.append([])
            batch_bytes = 0
        batches[-1].append(manifest.digest)
        batch_bytes += manifest.size
    return batches
