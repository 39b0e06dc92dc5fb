"""Shows which tags and manifests retention would delete now (`RetentionPreview`). Deletes nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from registry.upkeep.retention.decision import unused_limits
from registry.upkeep.retention.judgement import JudgedTag, NumberedRule, RetentionJudge, UnmatchedPatterns
from storage.content import Page
from storage.errors import NameUnknown
from storage.human_text import date_text
from storage.names import Digest, RepositoryName, Tag
from storage.retention import MAX_PAGE_ROWS, ManifestKey, Retention, UnusedLimits

MAX_JUDGED_TAGS: Final = 5000
"""Approximate largest number of tags that are judged for a page of `RetentionPreview.repositories`. It is also the
largest number for one repository."""


@dataclass(frozen=True, slots=True)
class PreviewLine:
    """The decision on one tag, or on one untagged manifest if `tag` is None: keep or delete. `rule`: the number
    of the rule that decides. `pushed`, `pulled`: when the tag or manifest was last pushed and pulled, in seconds since
    1970. `pulled` is None if there was no pull, or for an untagged manifest, because its last pull is not known."""

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
    """The totals of a preview. `bytes_freed`: the bytes that garbage collection frees after the rules have deleted all
    these tags and manifests. `bytes_left`: the bytes that the images of deleted tags still occupy after that, because
    their rule has no `delete_untagged_after`. Each blob is counted once. `warnings`: patterns that apply to no
    repository."""

    repositories: int = 0
    tags_kept: int = 0
    tags_deleted: int = 0
    manifests_deleted: int = 0
    bytes_freed: int = 0
    bytes_left: int = 0
    warnings: list[str] = field(default_factory=list)


class RepositoryPreview(NamedTuple):
    """How many tags of a repository its rule would keep and delete. `is_complete`: False if only the
    first tags were judged."""

    repository: RepositoryName
    rule: NumberedRule
    tags_kept: int
    tags_deleted: int
    is_complete: bool


OnLine = Callable[[PreviewLine], None]
"""Receives one line of the preview."""


class RetentionPreview:
    """Judges repositories as the job `retention` would. `clock` returns the time in seconds since 1970."""

    def __init__(self, judge: RetentionJudge, retention: Retention, clock: Callable[[], float]) -> None:
        self.judge = judge
        self._retention = retention
        self._clock = clock

    async def run(self, on_line: OnLine, repo: RepositoryName | None = None) -> PreviewSummary:
        """Passes one line for each tag and untagged manifest to `on_line`, and returns the totals. `repo`: the only
        repository to preview; None: all repositories. Raises NameUnknown if no rule applies to `repo`."""
        summary = PreviewSummary()
        freed: set[ManifestKey] = set()
        only_untagged: set[ManifestKey] = set()
        if repo is not None:
            await self._preview(repo, self.rule_of(repo), on_line, summary, freed, only_untagged)
        else:
            unmatched = UnmatchedPatterns(self.judge.rules)
            async for listed_repo, rule in self.judge.repositories():
                unmatched.on_repository(listed_repo, rule)
                await self._preview(listed_repo, rule, on_line, summary, freed, only_untagged)
            summary.warnings = unmatched.texts()
        summary.bytes_freed = await self._retention.freed_bytes(freed)
        summary.bytes_left = (
            await self._retention.freed_bytes(freed | only_untagged) - summary.bytes_freed if only_untagged else 0
        )
        return summary

    def rule_of(self, repo: RepositoryName) -> NumberedRule:
        """Returns the rule that applies to the repository. Raises NameUnknown if none does."""
        rule = self.judge.rule_of(repo)
        if rule is None:
            raise NameUnknown(f"no [[retention]] rule in the settings applies to {repo}, so all of it is kept")
        return rule

    async def page(self, repo: RepositoryName, after: str | None, limit: int) -> list[PreviewLine]:
        """Returns the lines for at most `limit` tags of the repository, in the order of their names: the tags after the
        name `after`. Raises NameUnknown if no rule applies to the repository."""
        rule = self.rule_of(repo)
        async with aclosing(self.judge.tags(repo, rule.rule, self._clock(), after, limit)) as pages:
            async for page in pages:
                return [_tag_line(repo, rule, judged) for judged in page]
        return []

    async def repositories(self, after: str | None, limit: int) -> Page[RepositoryPreview]:
        """Returns how many tags the rules would keep and delete in each of at most `limit` repositories: those to which
        a rule applies and that sort after `after`. Judges at most `MAX_JUDGED_TAGS` tags of a repository, and ends the
        page when that many tags were judged in all of its repositories."""
        now, judged_tags, previews = self._clock(), 0, list[RepositoryPreview]()
        async with aclosing(self.judge.repositories(after)) as repositories:
            async for repo, rule in repositories:
                if len(previews) == limit or judged_tags >= MAX_JUDGED_TAGS:
                    return Page(previews, True)
                previews.append(await self._judged(repo, rule, now))
                judged_tags += previews[-1].tags_kept + previews[-1].tags_deleted
        return Page(previews, False)

    async def _judged(self, repo: RepositoryName, rule: NumberedRule, now: float) -> RepositoryPreview:
        """Judges tags of one repository."""
        kept_tags = deleted_tags = 0
        async with aclosing(self.judge.tags(repo, rule.rule, now)) as pages:
            async for page in pages:
                if kept_tags + deleted_tags >= MAX_JUDGED_TAGS:
                    return RepositoryPreview(repo, rule, kept_tags, deleted_tags, False)
                kept_of_page = sum(decision.is_kept for _, decision in page)
                kept_tags += kept_of_page
                deleted_tags += len(page) - kept_of_page
        return RepositoryPreview(repo, rule, kept_tags, deleted_tags, True)

    async def _preview(
        self,
        repo: RepositoryName,
        rule: NumberedRule,
        on_line: OnLine,
        summary: PreviewSummary,
        freed: set[ManifestKey],
        only_untagged: set[ManifestKey],
    ) -> None:
        """Previews one repository. Adds the manifests that would be deleted to `freed`. Adds the manifests that would
        only lose their tags to `only_untagged`."""
        now = self._clock()
        summary.repositories += 1
        deleted_tags: set[Tag] = set()
        roots: list[ManifestKey] = []
        async for page in self.judge.tags(repo, rule.rule, now):
            for tag, decision in page:
                on_line(_tag_line(repo, rule, JudgedTag(tag, decision)))
                if not decision.is_kept:
                    deleted_tags.add(tag.name)
                    roots.append(tag.manifest)
            summary.tags_kept += len(page)
        summary.tags_deleted += len(roots)
        summary.tags_kept -= len(roots)
        limits = unused_limits(rule.rule, now)
        if limits is not None:
            await self._preview_untagged(repo, rule, limits, on_line, summary, freed)
        for start in range(0, len(roots), MAX_PAGE_ROWS):
            batch = roots[start : start + MAX_PAGE_ROWS]
            await self._retention.add_unused(repo, batch, deleted_tags, only_untagged if limits is None else freed)

    async def _preview_untagged(
        self,
        repo: RepositoryName,
        rule: NumberedRule,
        limits: UnusedLimits,
        on_line: OnLine,
        summary: PreviewSummary,
        freed: set[ManifestKey],
    ) -> None:
        """Previews the manifests of a repository that have been unused for long enough."""
        count_before = len(freed)
        after: Digest | None = None
        while True:
            page = await self._retention.untagged(repo, limits, after)
            for manifest in page.items:
                reason = f"no tag, pushed {date_text(manifest.pushed)}"
                on_line(PreviewLine(repo, None, manifest.digest, False, reason, rule.number, manifest.pushed, None))
            await self._retention.add_unused(repo, [manifest.manifest for manifest in page.items], (), freed)
            if page.next_after is None:
                break
            after = page.next_after
        summary.manifests_deleted += len(freed) - count_before


def _tag_line(repo: RepositoryName, rule: NumberedRule, judged: JudgedTag) -> PreviewLine:
    tag, decision = judged
    return PreviewLine(
        *(repo, tag.name, tag.digest, decision.is_kept, decision.reason, rule.number), *(tag.pushed, tag.pulled)
    )
