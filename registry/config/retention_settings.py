"""The setting `[[retention]]`: which tags are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from registry.config.cooldown_settings import TagPattern
from registry.config.field_types import Duration, SettingsGroup, split_commas
from registry.config.mirror_settings import HUB_LIBRARY, Upstream
from storage.patterns import NamePattern


class RetentionRule(SettingsGroup):
    """Which tags are kept in the hosted repositories that a pattern matches. A tag is kept if at least one of the
    conditions `keep_…` keeps it; all other tags are deleted. If several rules match a repository, only the first one
    applies. To see what would be deleted, run `entrepot retention preview`."""

    repositories: Annotated[
        list[Annotated[str, AfterValidator(lambda value: NamePattern(value))]],
        BeforeValidator(split_commas),
        Field(min_length=1),
    ] = Field(description="One or more patterns of repositories, such as `team/**`")
    keep_last: int = Field(
        default=0, ge=0, le=1_000_000, description="Keeps this many tags: those that were pushed last"
    )
    keep_tags: Annotated[list[TagPattern], BeforeValidator(split_commas)] = Field(
        default=[], description='Keeps the tags that match one of these patterns: `["v*", "latest"]`'
    )
    keep_pushed_within: Duration = Field(default=0.0, description="Keeps tags that were pushed within this time")
    keep_pulled_within: Duration = Field(
        default=0.0,
        description="Keeps tags whose image was pulled within this time. A pull of one platform's image counts as a "
        "pull of each index that lists the image. Untagged manifests that were pulled within this time are also kept",
    )
    delete_untagged_after: Duration | None = Field(
        default=None,
        description="Deletes a manifest that has had no tag, push or pull for this time. Keeps manifests that an index "
        "lists, and referrers of manifests that are kept. Deletes no manifest within one hour of its push or pull. The "
        "registry records a pull up to half a minute later; until then, the pull does not count. Default: manifests "
        "without a tag are kept",
    )
    delete_all: bool = Field(
        default=False,
        description="Deletes every tag. Must be true in a rule that has none of the conditions `keep_…`, and false in "
        "every other rule",
    )

    @model_validator(mode="after")
    def _check_conditions(self) -> Self:
        has_condition = bool(self.keep_last or self.keep_tags or self.keep_pushed_within or self.keep_pulled_within)
        if self.delete_all and has_condition:
            raise ValueError("delete_all is set, but a condition keeps tags; remove delete_all or the condition")
        if not self.delete_all and not has_condition:
            raise ValueError(
                "the rule would delete every tag, because it has no condition; set keep_last, keep_tags, "
                "keep_pushed_within or keep_pulled_within; to delete only untagged manifests, set "
                'keep_tags = ["*"]; to delete every tag, set delete_all = true'
            )
        return self


def check_retention(rules: Sequence[RetentionRule], upstreams: Sequence[Upstream]) -> None:
    """Raises ValueError if a pattern of a rule begins with the name of an upstream. If there is a default upstream,
    also raises ValueError for patterns that begin with `library`, because the default upstream serves `library/…`."""
    mirrored_prefixes = {upstream.name for upstream in upstreams}
    if any(upstream.default for upstream in upstreams):
        mirrored_prefixes.add(HUB_LIBRARY)
    for pattern in (pattern for rule in rules for pattern in rule.repositories):
        if pattern.partition("/")[0] in mirrored_prefixes:
            raise ValueError(
                f"retention: {pattern!r} names mirrored repositories, but rules apply only to repositories that "
                "clients push to; to limit the size of a mirror's cache, set cache_max"
            )
