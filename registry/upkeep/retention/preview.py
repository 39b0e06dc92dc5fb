"""Shows which tags and manifests retention would delete now (`RetentionPreview`). Deletes nothing.

A manifest is an *orphan* if all of these conditions are met (`storage.retention`):

- The manifest has no tag.
- No index of its repository lists the manifest.
- The manifest has no field `subject`, or this field names a manifest that is not in the repository.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from registry.upkeep.retention.decision import unused_since
from registry.upkeep.retention.judgement import JudgedTag, NumberedRule, RetentionJudge, UnmatchedPatterns
from registry.visitor_limits import Limits, VisitorLimits
from storage.content import Page
from storage.errors import NameUnknown
from storage.human_text import date_text
from storage.names import Digest, RepositoryName, Tag
from storage.retention import MAX_PAGE_ROWS, LostTags, ManifestKey, Retention, UnusedSince

MAX_JUDGED_TAGS: Final = 5000
"""`RetentionPreview.repositories` and `RetentionPreview.totals` stop after they have judged about this many tags.
Judging 5,000 tags takes about half a second."""
MAX_READ_MANIFESTS: Final = 5000
"""Approximate largest number of manifests that `RetentionPreview.totals` reads to find orphans."""
MAX_COUNTED_MANIFESTS: Final = 20_000
"""Approximate largest number of manifests that `RetentionPreview.totals` counts as deleted, with the children of
deleted indexes. Counting 20,000 manifests takes about a second."""
MAX_PREVIEWS: Final = 2
"""Largest number of previews that a process makes at a time for visitors."""
_PREVIEW_LIMITS: Final = Limits(
    max_running=MAX_PREVIEWS, max_running_per_visitor=1, max_pending=100, max_pending_per_visitor=10
)
"""The limits on previews that visitors request. Other long lookups in the metadata database wait while a preview reads
from the database."""


@dataclass(frozen=True, slots=True)
class PreviewLine:
    """The decision to keep or delete one tag or, if `tag` is None, one untagged manifest.

    - `rule`: the number of the rule that decides.
    - `pushed`, `pulled`: when the tag or manifest was last pushed and pulled, in seconds since 1970. `pulled` is None
      for an untagged manifest, and for a tag without a pull."""

    repository: RepositoryName
    tag: Tag | None
    digest: Digest
    is_kept: bool
    reason: str
    rule: int
    pushed: float
    pulled: float | None


@dataclass(slots=True)
class PreviewSummary:
    """The totals of a preview. The numbers of bytes count each blob once.

    - `bytes_freed`: the bytes that garbage collection frees after the rules have deleted the tags and manifests.
    - `bytes_left`: the bytes that stay only because a rule has no `delete_untagged_after`. Such a rule deletes tags,
      but keeps the images that lose their tags. If it deleted these images too, garbage collection would also free
      these bytes.
    - `warnings`: one text for each pattern that applies to no repository.
    - `complete`: False if a limit ended the preview. The numbers then count only the first tags and manifests."""

    repositories: int = 0
    tags_kept: int = 0
    tags_deleted: int = 0
    manifests_deleted: int = 0
    bytes_freed: int = 0
    bytes_left: int = 0
    warnings: list[str] = field(default_factory=list)
    complete: bool = True


class PreviewedRepository(NamedTuple):
    """A repository, and how many of its tags its rule would keep and delete. `is_complete`: False if only the first
    tags were judged."""

    repository: RepositoryName
    rule: NumberedRule
    tags_kept: int
    tags_deleted: int
    is_complete: bool


OnLine = Callable[[PreviewLine], None]
"""Called with each line of a preview."""


@dataclass(slots=True)
class _Findings:
    """The limits of one preview, and what the preview has found so far.

    - `on_line`: called with each line; None: nobody needs the lines.
    - `max_judged`: the approximate largest number of tags that are judged.
    - `max_read`: the approximate largest number of manifests that are read to find the orphans.
    - `max_counted`: the largest number of manifests in each of the two sets `deleted` and `kept_untagged`.
    - `deleted`: the manifests that the rules would delete.
    - `kept_untagged`: the manifests that would lose their tags, but that no rule would delete."""

    on_line: OnLine | None
    max_judged: float = math.inf
    max_read: float = math.inf
    max_counted: float = math.inf
    summary: PreviewSummary = field(default_factory=PreviewSummary)
    deleted: set[ManifestKey] = field(default_factory=set)
    kept_untagged: set[ManifestKey] = field(default_factory=set)


class RetentionPreview:
    """Shows what the job `retention` would delete. `clock` returns the time in seconds since 1970."""

    def __init__(self, judge: RetentionJudge, retention: Retention, clock: Callable[[], float]) -> None:
        self.judge = judge
        self.slots = VisitorLimits(_PREVIEW_LIMITS, "previews")
        """A preview for a visitor must hold one of these slots."""
        self._retention = retention
        self._clock = clock

    async def run(self, on_line: OnLine, repo: RepositoryName | None = None) -> PreviewSummary:
        """Passes one line for each tag and untagged manifest to `on_line`, and returns the totals. `repo`: the only
        repository to preview; None: all repositories. Raises NameUnknown if no rule applies to `repo`."""
        findings = _Findings(on_line)
        if repo is not None:
            await self._preview_repository(repo, self.rule_of(repo), findings)
        else:
            unmatched = UnmatchedPatterns(self.judge.rules)
            async for listed_repo, rule in self.judge.matched_repositories():
                unmatched.on_repository(listed_repo, rule)
                await self._preview_repository(listed_repo, rule, findings)
            findings.summary.warnings = unmatched.warnings()
        return await self._complete_summary(findings)

    async def totals(self, repo: RepositoryName) -> PreviewSummary:
        """Returns the totals of a preview of one repository. If `MAX_JUDGED_TAGS`, `MAX_READ_MANIFESTS` or
        `MAX_COUNTED_MANIFESTS` ends the preview early, the result is not `complete`. Raises NameUnknown if no rule
        applies to the repository."""
        findings = _Findings(None, MAX_JUDGED_TAGS, MAX_READ_MANIFESTS, MAX_COUNTED_MANIFESTS)
        await self._preview_repository(repo, self.rule_of(repo), findings)
        return await self._complete_summary(findings)

    def rule_of(self, repo: RepositoryName) -> NumberedRule:
        """Returns the rule that applies to the repository. Raises NameUnknown if none does."""
        rule = self.judge.rule_of(repo)
        if rule is None:
            raise NameUnknown(f"no [[retention]] rule in the settings applies to {repo}, so all of it is kept")
        return rule

    async def tag_lines(self, repo: RepositoryName, after: str | None, limit: int) -> list[PreviewLine]:
        """Returns the lines for at most `limit` tags of the repository that sort after `after`, in the order of their
        names. Raises NameUnknown if no rule applies to the repository."""
        rule = self.rule_of(repo)
        async with aclosing(self.judge.judged_tags(repo, rule.settings, self._clock(), after, limit)) as pages:
            async for page in pages:
                return [_tag_line(repo, rule, judged) for judged in page]
        return []

    async def repositories(self, after: str | None, limit: int) -> Page[PreviewedRepository]:
        """Returns a page of the repositories to which a rule applies, each with its numbers of kept and deleted tags.
        The page has at most `limit` repositories that sort after `after`. It ends early when `MAX_JUDGED_TAGS` tags are
        judged. Of each repository, only about the first `MAX_JUDGED_TAGS` tags are judged."""
        now, judged_tags, previews = self._clock(), 0, list[PreviewedRepository]()
        async with aclosing(self.judge.matched_repositories(after)) as repositories:
            async for repo, rule in repositories:
                if len(previews) == limit or judged_tags >= MAX_JUDGED_TAGS:
                    return Page(previews, True)
                previews.append(await self._count_tags(repo, rule, now))
                judged_tags += previews[-1].tags_kept + previews[-1].tags_deleted
        return Page(previews, False)

    async def _count_tags(self, repo: RepositoryName, rule: NumberedRule, now: float) -> PreviewedRepository:
        """Counts the tags of one repository that the rule would keep and delete. Judges only about the first
        `MAX_JUDGED_TAGS` tags."""
        kept_tags = deleted_tags = 0
        async with aclosing(self.judge.judged_tags(repo, rule.settings, now)) as pages:
            async for page in pages:
                if kept_tags + deleted_tags >= MAX_JUDGED_TAGS:
                    return PreviewedRepository(repo, rule, kept_tags, deleted_tags, False)
                kept_of_page = sum(decision.is_kept for _, decision in page)
                kept_tags += kept_of_page
                deleted_tags += len(page) - kept_of_page
        return PreviewedRepository(repo, rule, kept_tags, deleted_tags, True)

    async def _preview_repository(self, repo: RepositoryName, rule: NumberedRule, findings: _Findings) -> None:
        """Previews one repository, and adds the results to `findings`."""
        now = self._clock()
        summary, on_line = findings.summary, findings.on_line
        summary.repositories += 1
        judged_tags = 0
        deleted_tags: set[Tag] = set()
        manifests_of_deleted_tags: list[ManifestKey] = []
        async with aclosing(self.judge.judged_tags(repo, rule.settings, now)) as pages:
            async for page in pages:
                if judged_tags >= findings.max_judged:
                    summary.complete = False
                    break
                judged_tags += len(page)
                for tag, decision in page:
                    if on_line is not None:
                        on_line(_tag_line(repo, rule, JudgedTag(tag, decision)))
                    if not decision.is_kept:
                        deleted_tags.add(tag.name)
                        manifests_of_deleted_tags.append(tag.manifest)
        summary.tags_deleted += len(deleted_tags)
        summary.tags_kept += judged_tags - len(deleted_tags)
        since = unused_since(rule.settings, now, await self._retention.recorded_periods())
        if since is not None:
            await self._preview_untagged(repo, rule, since, findings)
        # If `since` is None, the rule deletes no untagged manifests.
        orphans = findings.kept_untagged if since is None else findings.deleted
        for start in range(0, len(manifests_of_deleted_tags), MAX_PAGE_ROWS):
            manifests = manifests_of_deleted_tags[start : start + MAX_PAGE_ROWS]
            await self._add_orphans(repo, manifests, deleted_tags, orphans, findings)

    async def _preview_untagged(
        self, repo: RepositoryName, rule: NumberedRule, since: UnusedSince, findings: _Findings
    ) -> None:
        """Adds to `findings` the orphans that the rule would delete: those that have had no push, tag or pull since the
        times in `since`."""
        count_before, read_manifests, on_line = len(findings.deleted), 0, findings.on_line
        # A manifest loses a tag when the tag is moved or deleted. `lost_tags` keeps what `Retention.unused_orphans`
        # reads about lost tags from the tag history, so that the call for the next page does not read it again.
        lost_tags = LostTags()
        after: Digest | None = None
        while True:
            page = await self._retention.unused_orphans(repo, since, after, lost_tags)
            read_manifests += MAX_PAGE_ROWS
            if on_line is not None:
                for orphan in page.items:
                    reason = f"no tag, pushed {date_text(orphan.pushed)}"
                    on_line(PreviewLine(repo, None, orphan.digest, False, reason, rule.number, orphan.pushed, None))
            await self._add_orphans(repo, [orphan.manifest for orphan in page.items], (), findings.deleted, findings)
            if page.next_after is None:
                break
            if read_manifests >= findings.max_read:
                findings.summary.complete = False
                break
            after = page.next_after
        findings.summary.manifests_deleted += len(findings.deleted) - count_before

    async def _add_orphans(
        self,
        repo: RepositoryName,
        manifests: Sequence[ManifestKey],
        removed_tags: Collection[Tag],
        orphans: set[ManifestKey],
        findings: _Findings,
    ) -> None:
        """Adds to `orphans` those `manifests` that become orphans when `removed_tags` are deleted. Also adds their
        children and referrers that then become orphans (`Retention.add_orphans`). Stops when `orphans` has
        `findings.max_counted` manifests."""
        if manifests and len(orphans) < findings.max_counted:
            await self._retention.add_orphans(repo, manifests, removed_tags, orphans, findings.max_counted)
            if len(orphans) >= findings.max_counted:
                findings.summary.complete = False

    async def _complete_summary(self, findings: _Findings) -> PreviewSummary:
        """Adds the numbers of bytes to the summary, and returns it."""
        summary, deleted, kept_untagged = findings.summary, findings.deleted, findings.kept_untagged
        summary.bytes_freed = await self._retention.freed_bytes(deleted)
        if kept_untagged:
            summary.bytes_left = await self._retention.freed_bytes(deleted | kept_untagged) - summary.bytes_freed
        return summary


def _tag_line(repo: RepositoryName, rule: NumberedRule, judged: JudgedTag) -> PreviewLine:
    tag, decision = judged
    return PreviewLine(
        *(repo, tag.name, tag.digest, decision.is_kept, decision.reason, rule.number), *(tag.pushed, tag.pulled)
    )
