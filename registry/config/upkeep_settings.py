"""The settings for upkeep: `[upkeep]`, `[scrub]`, `[backup]`, `[cache]`, `[disk]`, `[[quota]]` and `[[immutable]]`.

The functions `_check_…` are pydantic validators: they return the value to use, and raise ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, model_validator
from pydantic_settings import NoDecode

from registry.config.field_types import MIB, Duration, SettingsGroup, split_commas
from storage.errors import RegistryError
from storage.names import RepositoryName
from storage.patterns import NamePattern
from storage.tag_rules import TagPattern


def _check_name_pattern(value: str) -> str:
    return NamePattern(value)


def _check_tag_pattern(value: str) -> str:
    return TagPattern(value)


_NamePattern = Annotated[str, AfterValidator(_check_name_pattern)]
_TagPattern = Annotated[str, AfterValidator(_check_tag_pattern)]


class UpkeepSettings(SettingsGroup):
    """Work that the server does on its content from time to time."""

    retention_every: Duration = Field(
        default=86400.0,
        description="Time between two runs of the rules `[[retention]]`. 0 means that only the command "
        "`entrepot retention apply` and the API run them",
    )


class ScrubSettings(SettingsGroup):
    """Scrub: the server reads all stored content again, and checks whether the disk has changed or lost any content.
    Damaged content is not served any more. Damaged mirrored content is fetched again if possible; other damaged content
    waits for a push."""

    every: Duration = Field(
        default=30 * 86400.0,
        description="Time between the end of a round and the start of the next one. `0` means that the server starts "
        "no rounds",
    )
    rate: ByteSize = Field(default=ByteSize(20 * MIB), gt=0, description="How many bytes are read per second at most")
    quarantine_max: ByteSize = Field(
        default=ByteSize(1024 * MIB),
        ge=0,
        description="How many damaged bytes are kept for inspection, in the folder `quarantine` of the data directory; "
        "the oldest are deleted first",
    )


class BackupSettings(SettingsGroup):
    """Backups, which `entrepot backup` and the API make while the registry serves."""

    target: Path | None = Field(
        default=None,
        description="Directory of the backups. Only its owner may read the directory, because the backups contain the "
        "accounts and keys",
    )
    keep: int | None = Field(
        default=None,
        ge=1,
        description="How many backups are kept in the directory; older ones are removed. Default: all",
    )


class ImmutableRule(SettingsGroup):
    """A rule for immutable tags: clients can create these tags, but can neither overwrite nor delete them. A push of
    the same image again is accepted. An operator can change an immutable tag with `entrepot tag move --force`. A tag is
    immutable if it matches one of the rules. The rules are for repositories that are pushed to this registry."""

    repositories: Annotated[list[_NamePattern], BeforeValidator(split_commas)] = Field(
        min_length=1, description="Patterns of repositories, such as `team/**`"
    )
    tags: Annotated[list[_TagPattern], BeforeValidator(split_commas)] = Field(
        min_length=1, description="Patterns of tags, such as `v*`"
    )


def check_immutable_rules(rules: Sequence[ImmutableRule], upstreams: Iterable[str]) -> None:
    """Raises ValueError if a pattern of a rule begins with the name of one of the `upstreams` and a slash."""
    names = frozenset(upstreams)
    for rule in rules:
        for pattern in rule.repositories:
            first_name, slash, _ = pattern.partition("/")
            if slash and first_name in names:
                raise ValueError(
                    f"immutable: {pattern!r} is mirrored from {first_name}, and its tags follow that registry; name "
                    "repositories that are pushed here"
                )


def _check_prefix(value: str) -> str:
    """Returns the prefix of a quota. Raises ValueError unless the prefix is empty, or a repository name with a slash
    at its end."""
    if value and not value.endswith("/"):
        raise ValueError(f"{value!r} does not end with a slash; for all repositories below it write {value + '/'!r}")
    try:
        if value:
            RepositoryName(value[:-1])
    except RegistryError:
        raise ValueError(f"{value!r} is not the beginning of repository names, like team/") from None
    return value


class Quota(SettingsGroup):
    """Limits for all repositories below a prefix together. A push that would exceed a limit gets 403."""

    prefix: Annotated[str, AfterValidator(_check_prefix)] = Field(
        description="The beginning of the repositories' names, such as `team/`. An empty text means all repositories "
        "that are not mirrored"
    )
    max_size: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Largest total size of the repositories' blobs. A blob counts once, however many repositories "
        "use it",
    )
    max_tags: int | None = Field(default=None, gt=0, description="Largest number of the repositories' tags")

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if self.max_size is None and self.max_tags is None:
            raise ValueError(f"the quota of {self.prefix!r} limits nothing; set max_size or max_tags")
        return self


class CacheSettings(SettingsGroup):
    """The cache of mirrored content. Images that were not pulled for the longest time are evicted first."""

    max: ByteSize | None = Field(
        default=None,
        gt=0,
        description="Largest size of all mirrored content. Default: no limit. `cache_max` of an `[[upstream]]` limits "
        "one upstream",
    )
    keep: Annotated[list[_NamePattern], NoDecode, BeforeValidator(split_commas)] = Field(
        default=[], description="Patterns of repositories whose images always stay, such as `docker.io/library/*`"
    )
    min_free: ByteSize = Field(
        default=ByteSize(0), ge=0, description="Images are evicted if less disk space than this is free. 0 means never"
    )
    target_free: ByteSize = Field(
        default=ByteSize(0),
        ge=0,
        description="How much of the disk is free at the end of an eviction that `min_free` has started. 0 means a "
        "tenth more than `min_free`",
    )

    @model_validator(mode="after")
    def _check_free_space(self) -> Self:
        if self.target_free and self.target_free < self.min_free:
            raise ValueError("target_free is less than min_free; target_free is the free space after an eviction")
        return self


class DiskSettings(SettingsGroup):
    """How much of the data directory's disk has to be free. If less is free, pushes get 507, and pulls and deletes
    still work. If both settings are set, the greater one counts."""

    min_free: ByteSize = Field(
        default=ByteSize(0), ge=0, description="Space that stays free. 0 means that pushes work until the disk is full"
    )
    min_free_percent: float = Field(
        default=0.0, ge=0, le=50, allow_inf_nan=False, description="Space that stays free, in percent of the disk"
    )


def check_quotas(quotas: Sequence[Quota], upstreams: Sequence[str]) -> None:
    """Raises ValueError if two quotas have the same prefix, or if a prefix begins with the name of one of the
    `upstreams` and a slash."""
    prefixes = [quota.prefix for quota in quotas]
    if duplicate := next((prefix for prefix in prefixes if prefixes.count(prefix) > 1), None):
        raise ValueError(f"there are two quotas with the prefix {duplicate!r}")
    for prefix in prefixes:
        if prefix.partition("/")[0] in upstreams:
            raise ValueError(
                f"the quota of {prefix!r} is for mirrored content; to limit a cache, set cache_max of the [[upstream]]"
            )
