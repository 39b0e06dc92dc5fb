"""The interface for previews of removals of tags (`TagRemovals`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from storage.names import Digest, RepositoryName, Tag

MAX_REMOVED_TAGS: Final = 200
"""Largest number of tags that one removal may name."""
MAX_REMOVED_MANIFESTS: Final = 2_000
"""Largest number of manifests in a plan. At this number, the search for manifests ends."""


@dataclass(frozen=True, slots=True)
class PlannedTag:
    """A tag, and the digest that it points at. `is_requested`: whether the request for the removal names the tag. If
    not, it is a referrer tag, such as `sha256-….sig`, of a manifest that is removed."""

    name: Tag
    digest: Digest
    is_requested: bool


@dataclass(frozen=True, slots=True)
class TagRemovalPlan:
    """The tags and manifests that a removal of tags would remove. `manifests`: the manifests that would be unused
    without these tags. A manifest is used if it has a tag, if an index lists it, or if it refers to a subject that is
    used. `freed_bytes`: size of the blobs that garbage collection would delete. `is_complete`: False if the plan
    stops at MAX_REMOVED_MANIFESTS manifests, so that there may be more."""

    tags: Sequence[PlannedTag]
    manifests: Sequence[Digest]
    freed_bytes: int
    is_complete: bool


class TagRemovals(Protocol):
    """Previews removals of tags. Reads in a thread, and changes nothing."""

    async def plan(self, repo: RepositoryName, tags: Sequence[Tag]) -> TagRemovalPlan:
        """Returns the tags and manifests that a removal of `tags` would remove. There are at most MAX_REMOVED_TAGS
        `tags`. Leaves out tags that do not exist. Raises NameUnknown for a repository that never had content."""
        ...
