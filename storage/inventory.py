"""Statistics of a data directory for administrators, and plans of removals: what would be removed (`Inventory`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from storage.names import Digest, Reference, RepositoryName, Tag


@dataclass(frozen=True, slots=True)
class ContentTotals:
    """Counts over some repositories that have content. A blob that several of them have counts once. `size`: total size
    of the blobs in bytes."""

    repositories: int
    manifests: int
    tags: int
    blobs: int
    size: int


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """The tags and manifests of `repository` to remove. An index comes before the manifests that it lists. `size`:
    total size in bytes of the blobs that nothing would refer to afterwards."""

    repository: RepositoryName
    tags: tuple[Tag, ...]
    manifests: tuple[Digest, ...]
    size: int


class Inventory(Protocol):
    """Reads a data directory that a server may be using at the same time. The time that a call takes grows with the
    content that it counts."""

    def totals_below(self, name: str) -> ContentTotals:
        """Returns the counts over the repositories whose names begin with `name` and a slash."""
        ...

    def tags_below(self, name: str) -> list[tuple[RepositoryName, Tag]]:
        """Returns all tags of the repositories whose names begin with `name` and a slash, in the order of the names."""
        ...

    def plan_removal(self, repo: RepositoryName, reference: Reference) -> RemovalPlan:
        """Returns what to remove together with `reference`; removes nothing. A tag is removed with its manifest, unless
        another tag or an index refers to the manifest. A manifest is removed with all its tags, and with those of its
        children and referrers that nothing else refers to. Raises NameUnknown, ManifestUnknown."""
        ...

    def plan_removal_of_all(self, repo: RepositoryName) -> RemovalPlan:
        """Returns all tags and manifests of the repository as a plan; removes nothing. Raises NameUnknown."""
        ...
