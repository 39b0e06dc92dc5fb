"""What a data directory holds, counted for a person, and what removing a reference takes along (`Inventory`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from storage.names import Digest, Reference, RepositoryName, Tag


@dataclass(frozen=True, slots=True)
class ContentTotals:
    """Totals over repositories that have content. A blob in several of them counts once. `size`: bytes of the blobs."""

    repositories: int
    manifests: int
    tags: int
    blobs: int
    size: int


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """What is removed with a reference: tags, manifests (indexes before their children), and the bytes of blobs that
    nothing refers to afterwards."""

    repository: RepositoryName
    tags: tuple[Tag, ...]
    manifests: tuple[Digest, ...]
    size: int


class Inventory(Protocol):
    """Reads beside a running server. A call takes as long as there is content to count."""

    def below(self, name: str) -> ContentTotals:
        """Counts the repositories whose names begin with `name` and `/`."""
        ...

    def tags_below(self, name: str) -> list[tuple[RepositoryName, Tag]]:
        """Returns the tags of these repositories, in order."""
        ...

    def removal(self, repo: RepositoryName, reference: Reference) -> RemovalPlan:
        """Plans the removal of a reference. With a tag goes its manifest, unless another tag or an index refers to it;
        with a manifest go all its tags, and its children and referrers that nothing else refers to. Raises NameUnknown,
        ManifestUnknown."""
        ...

    def removal_of_all(self, repo: RepositoryName) -> RemovalPlan:
        """Plans the removal of everything in the repository. Raises NameUnknown."""
        ...
