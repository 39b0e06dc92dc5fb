"""The settings for upkeep: `[[immutable]]` (tags that clients cannot overwrite)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from registry.config.field_types import SettingsGroup, split_commas
from storage.patterns import NamePattern
from storage.tag_rules import TagPattern


def _check_name_pattern(value: str) -> str:
    return NamePattern(value)


def _check_tag_pattern(value: str) -> str:
    return TagPattern(value)


class ImmutableRule(SettingsGroup):
    """Tags that clients cannot overwrite or delete once they exist, in repositories that are pushed to this registry. A
    push of the same image again is accepted. An operator can change such a tag with `entrepot tag move --force`. A tag
    is immutable if it matches one of the rules."""

    repositories: Annotated[
        list[Annotated[str, AfterValidator(_check_name_pattern)]], BeforeValidator(split_commas)
    ] = Field(min_length=1, description="Patterns of repositories, such as `team/**`")
    tags: Annotated[list[Annotated[str, AfterValidator(_check_tag_pattern)]], BeforeValidator(split_commas)] = Field(
        min_length=1, description="Patterns of tags, such as `v*`"
    )


def check_immutable_rules(rules: Sequence[ImmutableRule], upstreams: Iterable[str]) -> None:
    """Raises ValueError if a rule is only for repositories of an upstream."""
    names = frozenset(upstreams)
    for rule in rules:
        for pattern in rule.repositories:
            first, slash, _ = pattern.partition("/")
            if slash and first in names:
                raise ValueError(
                    f"immutable: {pattern!r} is mirrored from {first}, and its tags follow that registry; name "
                    "repositories that are pushed here"
                )
