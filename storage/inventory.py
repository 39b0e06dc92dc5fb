"""The interface that counts the content of a data directory, and plans the removal of tags and manifests, for
administrators (`Inventory`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.names import Digest, Reference, RepositoryName, Tag
from storage.outbox import WebhookBacklog
from storage.usage import ScopeUsage


@dataclass(frozen=True, slots=True)
class ContentTotals:
    """Totals for some repositories. `repositories`: number of those that have a manifest. `blobs` and `size`:
    number of blobs and their total size in bytes; a blob that several of the repositories have is counted once."""

    repositories: int
    manifests: int
    tags: int
    blobs: int
    size: int


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """The tags and manifests to remove from `repository`: first all tags, then the manifests in the order of
    `manifests`. `freed_bytes`: total size of the blobs that garbage collection deletes after the removal, because no
    other repository has these blobs and no other manifest refers to them."""

    repository: RepositoryName
    tags: tuple[Tag, ...]
    manifests: tuple[Digest, ...]
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class OpenUploads:
    """Totals of the open upload sessions. `count`: number of sessions. `received`: number of bytes that the sessions
    have received and recorded. `idle_since`: time of the last progress of the session that has been
    idle longest, in seconds since 1970; None if there is no session."""

    count: int
    received: int
    idle_since: float | None


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """Figures of a whole data directory, for metrics.

    - `blob_bytes`: total size of all blobs. `uploads`: number of open upload sessions.
    - `damaged_blobs`, `damaged_manifests`: numbers of blobs and manifests whose stored bytes are damaged and were not
      replaced yet.
    - `running_jobs`: number of running jobs, by kind of job.
    - `scopes`: how much each usage scope uses. A usage scope is a set of repositories (`storage.usage`).
    - `remaining_requests`: number of requests that an upstream still allows, by name of the upstream. Contains only
      upstreams that reported the number within the last hour.
    - `backlogs`: one entry for each webhook to which deliveries of events are pending."""

    repositories: int
    manifests: int
    tags: int
    blobs: int
    blob_bytes: int
    uploads: int
    damaged_blobs: int
    damaged_manifests: int
    running_jobs: Mapping[str, int]
    scopes: Sequence[ScopeUsage]
    remaining_requests: Mapping[str, int]
    backlogs: Sequence[WebhookBacklog]


class Inventory(Protocol):
    """Reads a data directory, which a server may be using at the same time. The duration of a call grows with the
    number of tags, manifests and blobs that it reads."""

    def figures(self, now: float) -> StoreFigures:
        """Returns figures of the whole data directory. Reads one entry for each blob and tag. `now`: the present time,
        in seconds since 1970."""
        ...

    def totals_below(self, name: str) -> ContentTotals:
        """Returns the totals for the repositories whose names begin with `name` and a slash."""
        ...

    def tags_below(self, name: str) -> list[tuple[RepositoryName, Tag]]:
        """Returns all tags of the repositories whose names begin with `name` and a slash, each with its repository.
        Sorted by repository and then by tag."""
        ...

    def count_uploads(self) -> OpenUploads:
        """Counts the open upload sessions and their bytes, and finds the one that has been idle longest."""
        ...

    def plan_removal(self, repo: RepositoryName, reference: Reference) -> RemovalPlan:
        """Returns a plan for the removal of `reference`. Removes nothing itself. In the plan, an index comes before the
        manifests that it lists. Raises NameUnknown, ManifestUnknown.

        - If `reference` is a digest, the plan includes this manifest and all its tags.
        - If `reference` is a tag, the plan includes the tag. The plan also includes the tag's manifest, unless another
          tag points at the manifest or an index lists it.

        For each manifest in the plan, the plan also includes the manifest's referrers and, for an index, the manifests
        that the index lists. The plan leaves out a referrer or a listed manifest in two cases: a tag points at it, or
        an index outside the plan lists it."""
        ...

    def plan_removal_of_all(self, repo: RepositoryName) -> RemovalPlan:
        """Returns a plan with all tags and manifests of the repository, newer manifests before older ones. Removes
        nothing itself. Raises NameUnknown if the repository has no manifests."""
        ...
