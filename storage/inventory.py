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
    """Totals for some repositories. `repositories`: number of repositories that have a manifest. `blobs` and `size`:
    number of blobs and their total size in bytes; a blob that several of the repositories have is counted once."""

    repositories: int
    manifests: int
    tags: int
    blobs: int
    size: int


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """The tags and manifests of `repository` to remove: first all tags, then the manifests in the order of `manifests`.
    `plan_removal` puts an index before the manifests that it lists; `plan_removal_of_all` puts newer manifests before
    older ones. `freed_bytes`: total size of the blobs that garbage collection would delete after the removal: no other
    repository has these blobs, and no other manifest refers to them."""

    repository: RepositoryName
    tags: tuple[Tag, ...]
    manifests: tuple[Digest, ...]
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class OpenUploads:
    """Totals of the open upload sessions. `count`: number of sessions. `received`: number of bytes that the sessions
    have received and recorded. `idle_since`: time at which the session that has been idle longest made its last
    progress, in seconds since 1970; None if there is no session."""

    count: int
    received: int
    idle_since: float | None


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """Figures of a whole data directory, for metrics.

    `blob_bytes`: total size of all blobs. `uploads`: number of open upload sessions. `damaged_blobs`,
    `damaged_manifests`: numbers of blobs and manifests whose stored bytes are damaged and were not replaced yet.
    `running_jobs`: number of running jobs, by kind of job. `scopes`: the use of each usage scope, which is a set of
    repositories (`storage.usage`). `remaining_requests`: number of requests that an upstream still allows, by upstream;
    has only upstreams that reported the number within the last hour. `backlogs`: the pending deliveries of events, one
    entry for each webhook that has pending deliveries."""

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
        """Returns a plan for the removal of `reference`. Removes nothing itself. Raises NameUnknown, ManifestUnknown.

        - If `reference` is a digest, the plan includes this manifest and all its tags.
        - If `reference` is a tag, the plan includes the tag. The plan also includes the tag's manifest, unless another
          tag points at the manifest or an index lists it.

        With each manifest, the plan includes its referrers and, if it is an index, the manifests that it lists. But a
        referrer or listed manifest stays if a tag points at it, or if an index that stays lists it."""
        ...

    def plan_removal_of_all(self, repo: RepositoryName) -> RemovalPlan:
        """Returns a plan with all tags and manifests of the repository. Removes nothing itself. Raises NameUnknown if
        the repository has no manifests."""
        ...
