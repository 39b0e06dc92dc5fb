"""The work of the job `retention`: deletes the tags and untagged manifests that no rule keeps (`RetentionWork`).

The job handles one repository after the other. In each repository it first deletes tags, then untagged manifests. It
records the last handled repository, so that it continues with the next repository after a restart of the server.

An *orphan* is a manifest that has no tag, is in no index, and has no subject in the repository.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, Literal

from registry.upkeep.retention.decision import MIN_UNTAGGED_SECONDS, unused_since
from registry.upkeep.retention.judgement import JudgedTag, NumberedRule, RetentionJudge, UnmatchedPatterns
from storage.human_text import date_text
from storage.jobs import JSON
from storage.names import Digest, RepositoryName
from storage.retention import MAX_ORPHANS, RETENTION_ACTOR, LostTags, Orphan, Retention, UnusedSince
from storage.upkeep.job_runner import JobContext

KIND: Final = "retention"
"""The kind of the job."""
ACTOR: Final = RETENTION_ACTOR
_DELETES_AT_A_TIME: Final = 16
"""Largest number of tags that are deleted at the same time. Deletions at the same time can share a commit."""
OnDeleted = Callable[[Literal["tag", "manifest"], int], None]
"""A function that is called after deletions, with the kind of the deleted content and the number of deletions."""
_COUNT_NAMES: Final = ("repositories", "tags_kept", "tags_deleted", "manifests_deleted")
"""The names of the counts in the progress and in the result of the job."""


def ignore_deleted(content: str, count: int) -> None:
    """An `OnDeleted` that does nothing."""


class RetentionWork:
    """Deletes the tags and untagged manifests that no rule keeps. `clock` returns the time in seconds since 1970.
    `on_deleted` is called for the deleted tags and manifests."""

    def __init__(
        self,
        judge: RetentionJudge,
        retention: Retention,
        clock: Callable[[], float],
        on_deleted: OnDeleted = ignore_deleted,
    ) -> None:
        self._judge = judge
        self._retention = retention
        self._clock = clock
        self._on_deleted = on_deleted

    async def __call__(self, context: JobContext) -> JSON:
        """Runs the job. Returns the counts, and warnings about patterns in the rules that apply to no repository. A run
        that continues an interrupted run returns no warnings. An error or a cancellation does not undo earlier
        deletions. Raises JobStopped, StorageFull, StorageFailed."""
        position: dict[str, Any] = context.progress.position or {}
        counts = {name: int(position.get(name, 0)) for name in _COUNT_NAMES}
        is_whole_run = not position
        unmatched = UnmatchedPatterns(self._judge.rules)
        async for repo, rule in self._judge.matched_repositories(position.get("after")):
            unmatched.on_repository(repo, rule)
            await context.report(counts["repositories"], unit="repositories", message=repo)
            await self._handle_repository(context, repo, rule, counts)
            counts["repositories"] += 1
            await context.report(counts["repositories"], position={"after": repo, **counts})
        return {**counts, "warnings": unmatched.warnings() if is_whole_run else []}

    async def _handle_repository(
        self, context: JobContext, repo: RepositoryName, rule: NumberedRule, counts: dict[str, int]
    ) -> None:
        """Deletes tags and untagged manifests of one repository, and adds their numbers to `counts`."""
        now = self._clock()
        async for page in self._judge.judged_tags(repo, rule.settings, now):
            await context.report()
            tags_to_delete = [judged for judged in page if not judged.decision.is_kept]
            deleted = 0
            for start in range(0, len(tags_to_delete), _DELETES_AT_A_TIME):
                deleted += await self._delete_tags(
                    context, repo, rule, tags_to_delete[start : start + _DELETES_AT_A_TIME]
                )
                await context.report()
            counts["tags_deleted"] += deleted
            counts["tags_kept"] += len(page) - deleted
        # The clock is read again, because the deletions above have untagged manifests after the time `now`. With `now`,
        # a rule that deletes untagged manifests immediately would keep these manifests.
        since = unused_since(rule.settings, self._clock(), await self._retention.recorded_periods())
        if since is not None:
            counts["manifests_deleted"] += await self._delete_untagged(context, repo, since)

    async def _delete_tags(
        self, context: JobContext, repo: RepositoryName, rule: NumberedRule, tags_to_delete: Sequence[JudgedTag]
    ) -> int:
        """Deletes the tags. Keeps tags that were pushed, moved or pulled or became immutable after they were judged.
        Returns the number of deleted tags."""
        is_immutable = self._judge.immutable_tags.in_repository(repo)
        deletions = (self._retention.delete_tag(repo, judged.tag, ACTOR, is_immutable) for judged in tags_to_delete)
        outcomes = await asyncio.gather(*deletions)
        self._on_deleted("tag", sum(outcomes))
        for (tag, decision), was_deleted in zip(tags_to_delete, outcomes, strict=True):
            kept_reason = "it is immutable now" if is_immutable(tag.name) else "changed or pulled during this run"
            context.step(
                "deleted" if was_deleted else "kept",
                action="delete" if was_deleted else "keep",
                repository=repo,
                tag=tag.name,
                digest=tag.digest,
                reason=decision.reason if was_deleted else kept_reason,
                rule=rule.number,
            )
        return sum(outcomes)

    async def _delete_untagged(self, context: JobContext, repo: RepositoryName, since: UnusedSince) -> int:
        """Deletes the orphans of a repository that are unused since the times in `since`. Also deletes the manifests
        that those orphans list, and their referrers, if they become orphans. Returns the number of deleted
        manifests."""
        deleted = 0
        # All pages share this object, so that each entry of the tag history is read only once.
        lost_tags = LostTags()
        after: Digest | None = None
        while True:
            judged_at = self._clock()
            page = await self._retention.unused_orphans(repo, since, after, lost_tags)
            for manifest in page.items:
                deleted += await self._delete_with_dependents(context, repo, manifest, since, judged_at)
                await context.report()
            if page.next_after is None:
                return deleted
            after = page.next_after
            await context.report()

    async def _delete_with_dependents(
        self,
        context: JobContext,
        repo: RepositoryName,
        manifest: Orphan,
        since: UnusedSince,
        judged_at: float,
    ) -> int:
        """Deletes the orphan `manifest` if it is still unused. Then also deletes its *dependents* (the manifests that
        it lists, and its referrers) and their dependents, if they have become orphans. Keeps those that were pushed
        or pulled within the last `MIN_UNTAGGED_SECONDS`. Returns the number of deleted manifests. If this run is
        interrupted, the next run of the job finds the orphans that are left."""
        dependents = await self._retention.delete_unused_orphan(repo, manifest.digest, since, judged_at, ACTOR)
        if dependents is None:
            return 0
        self._on_deleted("manifest", 1)
        _report_deleted(context, repo, manifest.digest, f"no tag, pushed {date_text(manifest.pushed)}")
        deleted = 1
        pending = deque(dependents)
        while pending:
            batch = [pending.popleft() for _ in range(min(len(pending), MAX_ORPHANS))]
            # Manifests that were pushed or pulled after the time `latest_use` stay.
            latest_use = self._clock() - MIN_UNTAGGED_SECONDS
            orphans = await self._retention.delete_orphans(repo, batch, ACTOR, unused_since=latest_use)
            for digest in orphans.deleted:
                _report_deleted(context, repo, digest, f"belongs to {manifest.digest}")
            deleted += len(orphans.deleted)
            self._on_deleted("manifest", len(orphans.deleted))
            pending.extend(orphans.dependents)
        return deleted


def _report_deleted(context: JobContext, repo: RepositoryName, digest: Digest, reason: str) -> None:
    """Reports the deletion of a manifest to commands that watch the job."""
    context.step("deleted", action="delete", repository=repo, digest=digest, reason=reason)
