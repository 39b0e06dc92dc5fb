"""The interface that plans removals of tags (`TagRemovalPlanner`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from storage.names import Digest, RepositoryName, Tag

MAX_REMOVED_TAGS: Final = 200
"""Largest number of tags that one request for a removal may name."""
MAX_REMOVED_MANIFESTS: Final = 2_000
"""Largest number of manifests in a plan."""


@dataclass(frozen=True, slots=True)
class PlannedTag:
    """A tag that the removal removes, and the digest that the tag points at. `is_requested`: True if the request names
    the tag; False if the tag is a referrer tag (such as `sha256-….sig`) of a removed manifest."""

    name: Tag
    digest: Digest
    is_requested: bool


@dataclass(frozen=True, slots=True)
class TagRemovalPlan:
    """The tags and manifests that a removal would remove.

    - `manifests`: the manifests that become unused. A manifest is unused if no remaining tag points at it, no remaining
      index lists it, and it refers to no remaining subject.
    - `freed_bytes`: total size of the blobs that garbage collection would then delete.
    - `is_complete`: False if the plan has reached MAX_REMOVED_MANIFESTS manifests, and may lack some."""

    tags: Sequence[PlannedTag]
    manifests: Sequence[Digest]
    freed_bytes: int
    is_complete: bool


class TagRemovalPlanner(Protocol):
    """Plans removals of tags. Changes nothing."""

    async def plan(self, repo: RepositoryName, tags: Sequence[Tag]) -> TagRemovalPlan:
        """Returns the tags and manifests that a removal of `tags` would remove. Runs in a thread. Ignores tags that do
        not exist. The caller passes at most MAX_REMOVED_TAGS tags. Raises NameUnknown if the repository never had
        content."""
        ...
