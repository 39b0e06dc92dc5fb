"""Finds and deletes tags and manifests for retention, in the metadata database (`SqliteRetention`). *Retention* is the
job that deletes tags and manifests that no rule of the settings keeps.

The *dependents* of a manifest are the manifests that it lists, and its referrers. An *orphan* is a manifest that has no
tag, no index that lists it, and no stored subject (`storage.retention`).

If the machine's clock was ahead when a time was stored, the time can be in the future."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, TypeVar

import apsw

from storage.content import Actor
from storage.data_dir.reserve import ReserveUse
from storage.errors import StorageFull
from storage.future_times import CLOCK_MARGIN_SECONDS
from storage.imports import IMPORT_PROGRAM
from storage.metadata.sqlite import manifest_and_tag_changes, manifest_deletion
from storage.metadata.sqlite.commit_thread import CommitThread
from storage.metadata.sqlite.immutable_database import ImmutableDatabase, ImmutableScans
from storage.metadata.sqlite.scan_thread import ScanThread
from storage.metadata.sqlite.upkeep import recorded_periods, unused_manifests
from storage.names import Digest, RepositoryName, Tag
from storage.outbox import EventAction
from storage.recorded_periods import RecordedPeriods
from storage.retention import (
    MAX_ORPHANS,
    MAX_PAGE_ROWS,
    REFERRER_TAG,
    DeletedOrphans,
    LostTags,
    ManifestKey,
    Orphan,
    OrphanPage,
    TagFacts,
    TagPosition,
    UnusedSince,
)
from storage.tag_rules import IsImmutable, nothing_immutable

T = TypeVar("T")
log = logging.getLogger("storage.retention")
_REFERRER_GLOB: Final = "sha256-" + 64 * "[0-9a-f]"
_IS_REFERRER: Final = f"(name GLOB '{_REFERRER_GLOB}' OR name GLOB '{_REFERRER_GLOB}.?*')"
"""SQL condition that is true if the regular expression `storage.retention.REFERRER_TAG` matches the name of a tag. The
name then contains the digest of the manifest to which the tag belongs. Tags of cosign signatures have such names."""
_ORDER_TIME: Final = """
CASE WHEN t.updated > ?3 THEN max(?4, coalesce((
    SELECT max(h.at) FROM tag_history h INDEXED BY tag_history_tag
     WHERE h.repository = t.repository AND h.tag = t.name AND h.at <= ?3), 0)) END"""
"""SQL expression for `TagFacts.order_time`, which is used in place of the push time to sort the tags by age.

If the push time of the tag is not in the future (after ?3), the expression is NULL: the push time is used. If the push
time is in the future, the expression is the later of two times:

- ?4, the result of `_last_change_before_future`. It is 0 if no change in the history of the repository has a time in
  the future. This happens if a client has only pushed the same manifest again: such a push sets the push time of the
  tag, but is not in the history.
- The newest time in the tag's own history that is not in the future; 0 if there is none."""
_IMPORTED: Final = f"""
(SELECT iif(h.user_agent = '{IMPORT_PROGRAM}' AND t.updated <= h.at AND h.at <= ?3, h.at, NULL)
   FROM tag_history h INDEXED BY tag_history_tag
  WHERE h.repository = t.repository AND h.tag = t.name ORDER BY h.id DESC LIMIT 1)"""
"""SQL expression for `TagFacts.imported`: the time of the newest entry in the tag's history. NULL in these cases:

- The newest entry is not about an import.
- The time of the newest entry is in the future (after ?3).
- The tag was pushed again after the import: `t.updated` is later than `h.at`. The import itself sets both to the same
  time. It may then set `t.updated` back to an earlier time, such as the time at which the tag was set at the other
  registry."""
_NEWEST: Final = f"""
SELECT t.updated, t.name, {_ORDER_TIME} AS order_time FROM tag t WHERE t.repository = ?1 AND NOT {_IS_REFERRER}
 ORDER BY coalesce(order_time, t.updated) DESC, t.updated DESC, t.name LIMIT 1 OFFSET ?2"""
_TAG_PAGE: Final = f"""
SELECT t.name, m.digest, m.id, t.updated, {_ORDER_TIME}, {_IMPORTED} FROM tag t JOIN manifest m ON m.id = t.manifest
 WHERE t.repository = ?1 AND t.name > ?2 ORDER BY t.name LIMIT ?5"""
_FIRST_FUTURE_CHANGE: Final = """
SELECT min(id) FROM tag_history INDEXED BY tag_history_repository WHERE repository = ? AND at > ?"""
_LAST_CHANGE_BEFORE: Final = """
SELECT at FROM tag_history NOT INDEXED WHERE id < ? AND at <= ? ORDER BY id DESC LIMIT 1"""
_MANIFEST_PAGE: Final = """
SELECT digest, id, pushed FROM manifest WHERE repository = ?1 AND digest > ?2 ORDER BY digest LIMIT ?3"""
_TAG: Final = """
SELECT m.id, m.digest, t.updated FROM tag t JOIN manifest m ON m.id = t.manifest WHERE t.repository = ?1 AND t.name = ?2
"""
_MANIFEST: Final = "SELECT id, pushed FROM manifest WHERE repository = ?1 AND digest = ?2"


class SqliteRetention:
    """Implements `storage.retention.Retention`, which describes the methods. Reads run in the thread for long
    lookups. Changes free disk space, so on a full disk they may use the reserve (disk space that is set aside)."""

    def __init__(
        self,
        writer: CommitThread | ImmutableDatabase,
        scans: ScanThread | ImmutableScans,
        clock: Callable[[], float],
    ) -> None:
        """Reads with `scans` and changes through `writer`. `clock` returns the time in seconds since 1970."""
        self._writer = writer
        self._scans = scans
        self._clock = clock

    async def recorded_periods(self) -> RecordedPeriods:
        return await self._scans.run(recorded_periods.read_periods)

    async def nth_newest(self, repo: RepositoryName, n: int) -> TagPosition | None:
        def read(db: apsw.Connection) -> TagPosition | None:
            repository, future_start = _repository_id(db, repo), self._clock() + CLOCK_MARGIN_SECONDS
            last_change = _last_change_before_future(db, repository, future_start)
            row: Any = db.execute(_NEWEST, (repository, n - 1, future_start, last_change)).fetchone()
            if row is None:
                return None
            pushed, name, order_time = row
            return TagPosition(pushed, name, order_time, future_start=future_start)

        return await self._scans.run(read)

    async def tag_facts(
        self, repo: RepositoryName, after: str | None, limit: int = MAX_PAGE_ROWS
    ) -> Sequence[TagFacts]:
        def read(db: apsw.Connection) -> list[TagFacts]:
            repository, future_start = _repository_id(db, repo), self._clock() + CLOCK_MARGIN_SECONDS
            last_change = _last_change_before_future(db, repository, future_start)
            rows: list[Any] = db.execute(
                _TAG_PAGE, (repository, after or "", future_start, last_change, limit)
            ).fetchall()
            recorded_since = _recorded_since(db)
            tags = []
            for name, digest, manifest, pushed, order_time, tag_imported in rows:
                pulled, manifest_imported = unused_manifests.last_pull(db, manifest)
                # An import first sets the tag, and then records the import of the manifest. As long as this record is
                # missing, the time from the tag's history takes its place.
                if pulled is None and manifest_imported is None:
                    manifest_imported = tag_imported
                # Pulls before `recorded_since`, and pulls at another registry before the import, have no record.
                unrecorded_until = max(recorded_since if pushed < recorded_since else 0.0, manifest_imported or 0.0)
                tags.append(
                    TagFacts(
                        *(Tag(name), Digest(digest), manifest, pushed, pulled),
                        unrecorded_until=unrecorded_until or None,
                        subject=_subject_of_tag(db, repository, name),
                        order_time=order_time,
                        imported=tag_imported,
                    )
                )
            return tags

        return await self._scans.run(read)

    async def unused_orphans(
        self, repo: RepositoryName, since: UnusedSince, after: Digest | None, lost_tags: LostTags
    ) -> OrphanPage:
        def read(db: apsw.Connection) -> OrphanPage:
            repository = _repository_id(db, repo)
            rows: list[Any] = db.execute(_MANIFEST_PAGE, (repository, after or "", MAX_PAGE_ROWS)).fetchall()
            recorded_since = _recorded_since(db)
            unused = [
                Orphan(Digest(digest), manifest, pushed)
                for digest, manifest, pushed in rows
                if pushed <= since.pushed
                # A pull between `since.pulled` and `recorded_since` may have no record, so a manifest that was pushed
                # before `recorded_since` stays.
                and not pushed < recorded_since > since.pulled
                and not unused_manifests.is_used(db, manifest)
                and not unused_manifests.last_pull(db, manifest).is_after(since.pulled)
            ]
            if unused:  # otherwise the tag history need not be read
                unused_manifests.add_digests_that_lost_a_tag(db, repository, since.untagged, lost_tags)
                unused = [orphan for orphan in unused if orphan.digest not in lost_tags.manifest_digests]
            return OrphanPage(unused, Digest(rows[-1][0]) if len(rows) == MAX_PAGE_ROWS else None)

        return await self._scans.run(read)

    async def delete_tag(
        self, repo: RepositoryName, judged_tag: TagFacts, by: Actor, is_immutable: IsImmutable = nothing_immutable
    ) -> bool:
        now = self._clock()
        if is_immutable(judged_tag.name):
            return False

        def delete(db: apsw.Connection) -> bool:
            repository = _repository_id(db, repo)
            row: Any = db.execute(_TAG, (repository, judged_tag.name)).fetchone()
            if row is None or _subject_of_tag(db, repository, judged_tag.name) is not None:
                return False
            manifest, digest, pushed = row
            if (digest, pushed) != (judged_tag.digest, judged_tag.pushed):
                return False
            if unused_manifests.last_pull(db, manifest).pulled != judged_tag.pulled:
                return False
            manifest_and_tag_changes.delete_tag(db, repo, judged_tag.name, by, now, action=EventAction.RETENTION)
            return True

        return await self._writer.run(delete, reserve_use=ReserveUse.ALL)

    async def delete_unused_orphan(
        self, repo: RepositoryName, digest: Digest, since: UnusedSince, judged_at: float, by: Actor
    ) -> Sequence[Digest] | None:
        def delete(db: apsw.Connection, restorable: bool) -> list[Digest] | None:
            repository = _repository_id(db, repo)
            row: Any = db.execute(_MANIFEST, (repository, digest)).fetchone()
            if (
                row is None
                or unused_manifests.is_used(db, row[0])
                or _is_used_after(db, row[0], row[1], since.pushed, since.pulled)
            ):
                return None
            # A manifest that lost a tag after `judged_at` has not been without a tag for long enough.
            if digest in unused_manifests.digests_that_lost_a_tag(db, repository, judged_at):
                return None
            dependents = [dependent for _, dependent in unused_manifests.dependents(db, row[0])]
            _delete_manifest(db, repo, digest, by, self._clock(), restorable)
            return dependents

        return await self._run_deletion(repo, delete)

    async def delete_orphans(
        self, repo: RepositoryName, digests: Sequence[Digest], by: Actor, *, unused_since: float | None
    ) -> DeletedOrphans:
        assert len(digests) <= MAX_ORPHANS
        action = EventAction.DELETE if unused_since is None else EventAction.RETENTION
        # With infinity, `_is_used_after` is false for every manifest.
        keep_after = math.inf if unused_since is None else unused_since

        def delete(db: apsw.Connection, restorable: bool) -> DeletedOrphans:
            repository = _repository_id(db, repo)
            deleted: list[Digest] = []
            dependents: list[Digest] = []
            for digest in digests:
                row: Any = db.execute(_MANIFEST, (repository, digest)).fetchone()
                if row is None or unused_manifests.is_used(db, row[0]):
                    continue
                if not _is_used_after(db, row[0], row[1], keep_after, keep_after):
                    dependents += (dependent for _, dependent in unused_manifests.dependents(db, row[0]))
                    # The clock is read in the transaction, so that later deletions have later times (see
                    # `ManifestDeletion._step`).
                    _delete_manifest(db, repo, digest, by, self._clock(), restorable, action)
                    deleted.append(digest)
            return DeletedOrphans(deleted, dependents, restorable)

        return await self._run_deletion(repo, delete)

    async def _run_deletion(self, repo: RepositoryName, delete: Callable[[apsw.Connection, bool], T]) -> T:
        """Runs `delete`, which deletes manifests, in a transaction. The second argument of `delete` is True if it must
        keep the deleted manifests, so that they can be put back. If the disk has no space to keep them, runs `delete`
        again with False. Raises StorageFull, StorageFailed."""
        try:
            return await self._writer.run(lambda db: delete(db, True), reserve_use=ReserveUse.ALL)
        except StorageFull:
            log.warning("the disk is too full to keep deleted manifests of %s; they cannot be put back", repo)
            return await self._writer.run(lambda db: delete(db, False), reserve_use=ReserveUse.ALL)

    async def add_orphans(
        self,
        repo: RepositoryName,
        roots: Sequence[ManifestKey],
        removed_tags: Collection[Tag],
        orphans: set[ManifestKey],
        limit: float = math.inf,
    ) -> None:
        await self._scans.run(lambda db: unused_manifests.add_unused(db, roots, removed_tags, orphans, limit))

    async def freed_bytes(self, manifests: Collection[ManifestKey]) -> int:
        return await self._scans.run(lambda db: unused_manifests.freed_bytes(db, manifests))


def _delete_manifest(
    db: apsw.Connection,
    repo: RepositoryName,
    digest: Digest,
    by: Actor,
    now: float,
    restorable: bool,
    action: EventAction = EventAction.RETENTION,
) -> None:
    """Deletes a manifest. `restorable`: whether to keep the manifest, so that it can be put back. `action`: the action
    that the event records."""
    manifest_deletion.delete_manifest(db, repo, digest, by, now, restorable=restorable, action=action)


def _repository_id(db: apsw.Connection, repo: RepositoryName) -> int:
    """Returns the row id of a repository. Returns 0, which no row has, if there is no such repository."""
    row_id = db.execute("SELECT id FROM repository WHERE name = ?", (repo,)).get
    return 0 if row_id is None else int(row_id)


def _last_change_before_future(db: apsw.Connection, repository: int, future_start: float) -> float:
    """Returns the time of the last tag change, in any repository, before the clock went ahead. Row ids show the order
    of the changes:

    - First, the function finds the repository's first tag change with a time in the future (after `future_start`).
    - Of all changes with smaller row ids, in any repository, it then finds the last one whose time is not in the
      future. The result is the time of this change.

    Returns 0 if one of the two changes does not exist."""
    first_id = db.execute(_FIRST_FUTURE_CHANGE, (repository, future_start)).get
    time = None if first_id is None else db.execute(_LAST_CHANGE_BEFORE, (first_id, future_start)).get
    return 0.0 if time is None else float(time)


def _subject_of_tag(db: apsw.Connection, repository: int, name: str) -> Digest | None:
    """Returns the digest of the manifest to which the tag `name` belongs; the name contains this digest. Returns None
    if `REFERRER_TAG` does not match the name, or if the repository does not have the manifest."""
    if REFERRER_TAG.fullmatch(name) is None:
        return None
    digest = Digest(name[:71].replace("-", ":", 1))  # 71: the length of "sha256-" and 64 digits
    return None if db.execute(_MANIFEST, (repository, digest)).get is None else digest


def _recorded_since(db: apsw.Connection) -> float:
    """Returns the time since which all pulls are recorded, in seconds since 1970; 0 if all pulls since the first
    push are recorded."""
    since = db.execute("SELECT since FROM pull_recording").get
    return 0.0 if since is None else float(since)


def _is_used_after(db: apsw.Connection, manifest: int, pushed: float, push_limit: float, pull_limit: float) -> bool:
    """Returns whether the manifest was pushed after `push_limit`, or was pulled or imported after `pull_limit`.
    `pushed`: the time of its last push."""
    return pushed > push_limit or unused_manifests.last_pull(db, manifest).is_after(pull_limit)
