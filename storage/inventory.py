"""Statistics of a data directory, and plans for removals of tags and manifests, for administrators (`Inventory`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.names import Digest, Reference, RepositoryName, Tag
from storage.outbox import WebhookBacklog
from storage.usage import ScopeUse


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
    In `manifests`, an index comes before the manifests that it lists. `size`: total size in bytes of the blobs that
    garbage collection would delete after the removal, because no other repository has them and no other manifest refers
    to them."""

    repository: RepositoryName
    tags: tuple[Tag, ...]
    manifests: tuple[Digest, ...]
    size: int


@dataclass(frozen=True, slots=True)
class OpenUploads:
    """The upload sessions that are open. `count`: their number. `received`: bytes that have arrived and are recorded.
    `idle_since`: the time of the last progress of the session that has been idle longest, in seconds since 1970; None:
    there is no session."""

    count: int
    received: int
    idle_since: float | None


@dataclass(frozen=True, slots=True)
class StoreFigures:
    """Figures of a whole data directory, for metrics.

    `blob_bytes`: total size of all blobs. `uploads`: open upload sessions. `damaged_blobs`, `damaged_manifests`:
    numbers of damaged blobs and manifests whose right bytes were not stored again yet. `running_jobs`: number of
    running jobs of each kind. `scopes`: the use of each usage scope, which is a set of repositories (`storage.usage`).
    `remaining_requests`: how many requests each upstream still allows, if it has reported this within the last hour.
    `backlogs`: the pending deliveries of events to webhooks; a webhook without deliveries is left out."""

    repositories: int
    manifests: int
    tags: int
    blobs: int
    blob_bytes: int
    uploads: int
    damaged_blobs: int
    damaged_manifests: int
    running_jobs: Mapping[str, int]
    scopes: Sequence[ScopeUse]
    remaining_requests: Mapping[str, int]
    backlogs: Sequence[WebhookBacklog]


class Inventory(Protocol):
    """Reads a data directory, which a server may be using at the same time. The duration of a call grows with the
    number of tags, manifests and blobs that it reads."""

    def figures(self, now: float) -> StoreFigures:
        """Returns figures of the whole data directory. Reads one entry for each blob and tag. `now`: in seconds since
        1970."""
        ...

    def totals_below(self, name: str) -> ContentTotals:
        """Returns the totals for the repositories whose names begin with `name` and a slash."""
        ...

    def tags_below(self, name: str) -> list[tuple[RepositoryName, Tag]]:
        """Returns all tags of the repositories whose names begin with `name` and a slash, each with its repository.
        Sorted by repository and then by tag."""
        ...

    def open_uploads(self) -> OpenUploads:
        """Counts the open upload sessions and their bytes, and finds the one that has been idle longest."""
        ...

    def plan_removal(self, repo: RepositoryName, reference: Reference) -> RemovalPlan:
        """Returns a plan for the removal of `reference`. Removes nothing itself.

        If `reference` is a digest, the plan includes this manifest and all its tags. If `reference` is a tag, the plan
        includes the tag. It also includes the tag's manifest, unless another tag or an index refers to it. With each
        manifest, the plan includes its referrers and, if it is an index, the manifests that it lists. A referrer or
        listed manifest stays out of the plan if a tag or index that is not removed still refers to it. Raises
        NameUnknown, ManifestUnknown."""
        ...

    def plan_removal_of_all(self, repo: RepositoryName) -> RemovalPlan:
        """Returns a plan with all tags and manifests of the repository. Removes nothing itself. Raises NameUnknown if
        there are none."""
        ...
