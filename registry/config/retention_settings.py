"""The setting `[[retention]]`: which tags are kept.

The functions `_check_…` are pydantic validators: they return the value to use, and raise ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from registry.config.cooldown_settings import TagPattern
from registry.config.field_types import Duration, SettingsGroup, split_commas
from registry.config.mirror_settings import HUB_LIBRARY, Upstream
from storage.patterns import NamePattern


class RetentionRule(SettingsGroup):
    """Which tags are kept in the hosted repositories that a pattern matches. A tag is kept if any of the conditions
    `keep_…` keeps it; all others are deleted. The first rule that matches a repository applies. To see what would be
    deleted, run `entrepot retention preview`."""

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
        description="Keeps tags whose image was pulled within this time. A pull of one platform's image counts for the "
        "index that lists it. Untagged manifests that were pulled within this time are kept too",
    )
    delete_untagged_after: Duration | None = Field(
        default=None,
        description="Deletes a manifest that has had no tag, push or pull for this time. Manifests that an index "
        "lists, and referrers of a manifest that is kept, stay. No manifest is deleted in the hour after its push or "
        "pull, because clients push an index after the manifests that it lists. A pull does not count until it is "
        "recorded, up to half a minute later. Default: manifests without a tag are kept",
    )
    delete_all: bool = Field(
        default=False, description="Has to be true in a rule without a condition, which deletes every tag"
    )

    @model_validator(mode="after")
    def _check_conditions(self) -> Self:
        has_condition = bool(self.keep_last or self.keep_tags or self.keep_pushed_within or self.keep_pulled_within)
        if self.delete_all and has_condition:
            raise ValueError("delete_all is set, but a condition keeps tags; remove one of them")
        if not self.delete_all and not has_condition:
            raise ValueError(
                "the rule would delete every tag, because no condition keeps any; set keep_last, keep_tags, "
                'keep_pushed_within or keep_pulled_within, or keep_tags = ["*"] to delete only untagged manifests, or '
                "delete_all = true if you mean it"
            )
        return self


def check_retention(rules: Sequence[RetentionRule], upstreams: Sequence[Upstream]) -> None:
    """Raises ValueError if a pattern of a rule begins with the name of an upstream. If there is a default upstream,
    `library` counts as its name too."""
    mirrored_prefixes = {upstream.name for upstream in upstreams}
    if any(upstream.default for upstream in upstreams):
        mirrored_prefixes.add(HUB_LIBRARY)  # a default upstream serves `library/…`
    for pattern in (pattern for rule in rules for pattern in rule.repositories):
        if pattern.partition("/")[0] in mirrored_prefixes:
            raise ValueError(
                f"retention: {pattern!r} names what is mirrored, and rules apply only to what is pushed here; to bound "
                "a mirror's cache, set cache_max"
            )
