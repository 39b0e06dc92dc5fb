"""`RetentionJudge`: finds which tags the retention rules of the settings keep. The rules apply only to *hosted*
repositories, to which clients push. This module deletes nothing."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from registry.config import HUB_LIBRARY, RetentionRule
from registry.naming import NamingRules
from registry.upkeep.retention.decision import Decision, decide
from storage.metadata.catalog import Metadata
from storage.names import RepositoryName
from storage.patterns import NamePattern, NameSet
from storage.retention import MAX_PAGE_ROWS, Retention, TagFacts
from storage.tag_rules import NO_IMMUTABLE_TAGS, ImmutableTags

_REPOSITORIES_PER_PAGE = 500
"""Number of repositories that one read of the store returns."""


class NumberedRule(NamedTuple):
    """A rule of the settings. `number`: its number in the list of rules, counted from 1. `settings`: the values of the
    rule, such as its patterns for names of repositories."""

    number: int
    settings: RetentionRule

    @property
    def text(self) -> str:
        """The number and the patterns of the rule, for messages."""
        return f"rule {self.number} ({', '.join(self.settings.repositories)})"


class JudgedTag(NamedTuple):
    """A tag, and a rule's decision about the tag."""

    tag: TagFacts
    decision: Decision


class RetentionJudge:
    """Finds the rule for a repository, and this rule's decisions about the repository's tags. `naming`: tells mirrored
    repositories from hosted ones. `immutable_tags`: the tags that no rule can delete."""

    def __init__(
        self,
        rules: Sequence[RetentionRule],
        naming: NamingRules,
        metadata: Metadata,
        retention: Retention,
        immutable_tags: ImmutableTags = NO_IMMUTABLE_TAGS,
    ) -> None:
        self.rules = [NumberedRule(number, rule) for number, rule in enumerate(rules, 1)]
        self._naming = naming
        self._metadata = metadata
        self._retention = retention
        self.immutable_tags = immutable_tags
        patterns = [NamePattern(pattern) for rule in rules for pattern in rule.repositories]
        # Names that begin with one of these segments are mirrored. A default upstream also serves `library/…`.
        mirrored = [*naming.upstreams, *([HUB_LIBRARY] if naming.default else [])]
        self._names = NameSet.of(patterns).without_names_below(mirrored)  # repositories to which a rule can apply

    def rule_of(self, repo: RepositoryName) -> NumberedRule | None:
        """Returns the first rule that matches the repository. Returns None if no rule matches it, or if the repository
        is mirrored."""
        if self._naming.upstream_of(repo) is not None:
            return None
        matching = (
            rule
            for rule in self.rules
            if any(NamePattern(pattern).matches(repo) for pattern in rule.settings.repositories)
        )
        return next(matching, None)

    async def matched_repositories(
        self, after: str | None = None
    ) -> AsyncGenerator[tuple[RepositoryName, NumberedRule]]:
        """Yields each hosted repository that has content and a rule (`rule_of`), with the rule. Yields the repositories
        in the order of their names, and begins after the name `after`; None: begins with the first repository."""
        while self.rules:
            page = await self._metadata.repositories(after, _REPOSITORIES_PER_PAGE, self._names)
            for repo in page.items:
                if (rule := self.rule_of(repo)) is not None:
                    yield repo, rule
            if not page.more:
                return
            after = page.next_after or page.items[-1]

    async def judged_tags(
        self,
        repo: RepositoryName,
        rule: RetentionRule,
        now: float,
        after: str | None = None,
        limit: int = MAX_PAGE_ROWS,
    ) -> AsyncGenerator[Sequence[JudgedTag]]:
        """Yields pages of at most `limit` tags of a repository. Each tag has the rule's decision at the time `now`.
        Begins after the tag name `after`; None: begins with the first tag. One read of the store returns all tags of a
        page."""
        oldest_kept = await self._retention.nth_newest(repo, rule.keep_last) if rule.keep_last else None
        # While no server records pulls, a missing pull does not show that an image is unused. Such a time does not
        # count towards `keep_pulled_within`. For example, if `keep_pulled_within` is 30 days, and no server ran on 2 of
        # the last 32 days, `pulls_since` is 32 days ago.
        recorded = await self._retention.recorded_periods()
        pulls_since = recorded.start_of_window(rule.keep_pulled_within, now)
        is_immutable = self.immutable_tags.in_repository(repo)
        while tags := await self._retention.tag_facts(repo, after, limit):
            yield [
                JudgedTag(
                    tag,
                    decide(
                        *(rule, tag, now),
                        oldest_kept=oldest_kept,
                        is_protected=is_immutable(tag.name),
                        pulls_since=pulls_since,
                    ),
                )
                for tag in tags
            ]
            after = tags[-1].name


class UnmatchedPatterns:
    """Finds patterns without effect. The caller passes each repository, and the rule that applies to the repository, to
    `on_repository`. A pattern of a rule is *unmatched* if it matches none of the repositories to which this rule
    applies. Such a pattern is probably mistyped."""

    def __init__(self, rules: Sequence[NumberedRule]) -> None:
        self._unmatched = [(rule, NamePattern(pattern)) for rule in rules for pattern in rule.settings.repositories]

    def on_repository(self, repo: RepositoryName, rule: NumberedRule) -> None:
        """Records that `rule` is the rule of the repository."""
        self._unmatched = [
            (other_rule, pattern)
            for other_rule, pattern in self._unmatched
            if other_rule != rule or not pattern.matches(repo)
        ]

    def warnings(self) -> list[str]:
        """Returns a warning for each pattern that matches none of the recorded repositories of its rule."""
        return [
            f"rule {rule.number}: the pattern {pattern} applies to no hosted repository with content"
            for rule, pattern in self._unmatched
        ]
