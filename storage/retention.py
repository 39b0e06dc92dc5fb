"""The interface through which retention reads and deletes tags and manifests (`Retention`). *Retention* deletes the
tags and the untagged manifests that no rule in the settings keeps, in hosted repositories (those that are not
mirrored). An *orphan* is a manifest that has no tag, that no index of its repository lists, and whose subject, if it
names one, is not in the repository. An orphan is *unused* if no client has pushed, tagged or pulled it for long enough
(`UnusedSince`).

Retention first judges a tag and then deletes it, and a client may push or pull the tag in between. So each deletion
checks again, in its own transaction, the facts on which the judgement was based.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

from storage.content import Actor
from storage.names import Digest, RepositoryName, Tag
from storage.recorded_periods import RecordedPeriods
from storage.tag_rules import IsImmutable, nothing_immutable

MAX_PAGE_ROWS: Final = 500
"""Largest number of tags or manifests that one call reads."""
MAX_ORPHANS: Final = 10
"""Largest number of manifests that one call of `Retention.delete_orphans` checks."""

REFERRER_TAG: Final = re.compile(r"sha256-[0-9a-f]{64}(\..+)?")
"""The name of a tag that belongs to the manifest whose digest it contains: a signature, SBOM or attestation of cosign,
or the list of a manifest's referrers (OCI distribution spec, "Referrers Tag Schema")."""

RETENTION_ACTOR: Final = Actor(name="entrepot retention")
"""The actor that the audit log and the history of tags name for the deletions of retention."""

ManifestKey = int
"""Identifies a manifest of a repository in the store."""


@dataclass(frozen=True, slots=True)
class TagFacts:
    """The facts by which retention judges a tag. Times are in seconds since 1970.

    - `pushed`: when it was last pushed.
    - `pulled`: when its manifest, or a manifest that the manifest lists, was last pulled; None: no pull is recorded.
    - `unrecorded_until`: some pulls before this time are not recorded, because another registry or an earlier version
      of the program served the image, or because the store was restored from a backup; None: all pulls are recorded.
    - `imported`: for a tag that an import from another registry has set, when it did so; `pushed` is then the time of
      the tag at that registry, which may be an estimate. None: a client has set the tag, or has pushed it again since.
    - `subject`: for a tag whose name is a `REFERRER_TAG`, the manifest that it belongs to; None: the repository does
      not have that manifest, or the tag has another name.
    - `order_time`: None, unless `pushed` was in the future (`storage.future_times`) when the tag was read. Then the
      time that takes the place of `pushed` in the order of the tags: the time of the last change of any tag before the
      clock went ahead; 0.0 if no such change is known."""

    name: Tag
    digest: Digest
    manifest: ManifestKey
    pushed: float
    pulled: float | None
    unrecorded_until: float | None = None
    subject: Digest | None = None
    order_time: float | None = None
    imported: float | None = None

    @property
    def is_referrer(self) -> bool:
        """Whether the name of the tag is a `REFERRER_TAG`."""
        return REFERRER_TAG.fullmatch(self.name) is not None


@dataclass(frozen=True, slots=True)
class TagPosition:
    """The position of a tag in the list of the tags of a repository, newest first. The list is sorted by the times of
    the last pushes. A tag whose push has a time in the future (`storage.future_times`) is sorted by
    `TagFacts.order_time` instead. Otherwise this tag would be the newest until the clock has reached that time. Of
    several tags that were pushed at the same time, the first in the order of names comes first.

    `pushed`, `name`, `order_time`: those of the tag. `future_start`: times after it were in the future when the list
    was read."""

    pushed: float
    name: str
    order_time: float | None = None
    future_start: float = field(default=math.inf, compare=False)

    def is_not_newer_than(self, tag: TagFacts) -> bool:
        """Returns whether this position is that of the tag, or comes after it in the list, which begins with the newest
        tag. So for the position of the `n`th newest tag, returns whether the tag is one of the `n` newest."""
        # Sorts the tag as the list did: by `order_time` only if `pushed` was in the future when the list was read. The
        # tag may have been read later. If the clock was set back in between, the tag has an `order_time` although the
        # list sorted it by `pushed`.
        order_time = tag.order_time if tag.pushed > self.future_start else None
        return _sort_key(tag.pushed, tag.name, order_time) <= _sort_key(self.pushed, self.name, self.order_time)


def _sort_key(pushed: float, name: str, order_time: float | None) -> tuple[float, float, str]:
    return (-pushed if order_time is None else -order_time, -pushed, name)


@dataclass(frozen=True, slots=True)
class UnusedSince:
    """The conditions for an orphan to count as unused. Times are in seconds since 1970. `pushed`: the orphan has not
    been pushed since this time. `untagged`: it has had no tag since this time. `pulled`: since this time, no client has
    pulled it or a manifest that it lists, and neither it nor a manifest that it lists was imported from another
    registry.

    Some pulls may not be recorded, because an earlier version of the program served the image, or because the store was
    restored from a backup. The *start of the record* is the time from which on all pulls are recorded. If it is later
    than `pulled`, pulls between the two times may be missing. Then no manifest that was pushed before the start of the
    record counts as unused."""

    pushed: float
    untagged: float
    pulled: float


@dataclass(frozen=True, slots=True)
class Orphan:
    """An orphan: its digest, its key, and the time of its last push."""

    digest: Digest
    manifest: ManifestKey
    pushed: float


@dataclass(frozen=True, slots=True)
class OrphanPage:
    """Some of the unused orphans of a repository. `next_after`: where the next page begins; None: there is none."""

    items: Sequence[Orphan]
    next_after: Digest | None


@dataclass(slots=True)
class LostTags:
    """The manifests of one repository that have lost a tag (`manifest_digests`), from the part of its tag history that
    `Retention.unused_orphans` has read. `last_entry`: the newest entry that was read; 0: none was. A caller that reads
    all pages of a repository passes the same object for each, so that each entry of the history is read only once."""

    manifest_digests: set[str] = field(default_factory=set)
    last_entry: int = 0


class DeletedOrphans(NamedTuple):
    """The result of `Retention.delete_orphans`. `deleted`: the deleted manifests. `dependents`: the children and
    referrers of the deleted manifests. `is_restorable`: False if the disk was too full to keep the deleted manifests,
    so that they cannot be put back."""

    deleted: Sequence[Digest]
    dependents: Sequence[Digest]
    is_restorable: bool


class Retention(Protocol):
    """Reads the tags and manifests of one repository at a time, in pages, and deletes tags and manifests that no rule
    keeps. Reads run in a thread. All methods take the names of repositories in the store, and may raise StorageFailed.
    A repository without content has no tags and no manifests.

    A deleted tag can be put back (`storage.tag_history`). A deleted manifest can be put back during the grace period of
    garbage collection, unless the disk was too full to keep it.

    Only orphans are deleted. So no manifest that an immutable tag needs is deleted."""

    async def recorded_periods(self) -> RecordedPeriods:
        """Returns the periods in which a server recorded pulls."""
        ...

    async def nth_newest(self, repo: RepositoryName, n: int) -> TagPosition | None:
        """Returns the position of the `n`th newest tag; None if there are fewer than `n` tags. Tags whose names are a
        `REFERRER_TAG` do not count."""
        ...

    async def tags(self, repo: RepositoryName, after: str | None, limit: int = MAX_PAGE_ROWS) -> Sequence[TagFacts]:
        """Returns at most `limit` tags whose names sort after `after`, in the order of their names."""
        ...

    async def unused_orphans(
        self, repo: RepositoryName, since: UnusedSince, after: Digest | None, lost_tags: LostTags
    ) -> OrphanPage:
        """Returns the orphans that are unused since the times in `since`. Reads at most `MAX_PAGE_ROWS` manifests, so a
        page may be empty although there are further pages.

        `lost_tags`: for the first page, an empty object; for each further page, the same object and the same `since`.
        The call adds to it the entries of the tag history that no earlier call has read."""
        ...

    async def delete_tag(
        self, repo: RepositoryName, judged_tag: TagFacts, by: Actor, is_immutable: IsImmutable = nothing_immutable
    ) -> bool:
        """Deletes a tag, unless it is immutable, belongs to a manifest in the repository (`TagFacts.subject`), or has
        been pushed, moved, deleted or pulled since it was judged. Its manifest stays. Returns whether it deleted
        the tag."""
        ...

    async def delete_unused_orphan(
        self, repo: RepositoryName, digest: Digest, since: UnusedSince, judged_at: float, by: Actor
    ) -> Sequence[Digest] | None:
        """Deletes a manifest that `unused_orphans` returned at the time `judged_at`, if it is still an unused orphan.
        Returns the digests of its children and its referrers, which may be orphans now. Returns None if it deleted
        nothing."""
        ...

    async def delete_orphans(
        self, repo: RepositoryName, digests: Sequence[Digest], by: Actor, *, unused_since: float | None
    ) -> DeletedOrphans:
        """Checks the manifests `digests`, of which there are at most `MAX_ORPHANS`. Deletes those of them that are
        orphans.

        `unused_since`: manifests that were pushed or pulled after this time, in seconds since 1970, stay, because a
        client may be about to push an index that lists them. The events of the deletions name a rule of retention as
        the reason. None: a client asked for the deletion, so it does not matter when the manifests were used."""
        ...

    async def add_orphans(
        self,
        repo: RepositoryName,
        roots: Sequence[ManifestKey],
        removed_tags: Collection[Tag],
        orphans: set[ManifestKey],
        limit: float = math.inf,
    ) -> None:
        """Finds the manifests that become orphans when `removed_tags` are deleted, and adds them to the set `orphans`.
        Each manifest in the set counts as deleted, from the beginning or from when it is added. First checks `roots`,
        at most `MAX_PAGE_ROWS`, and then the children and referrers of each added manifest. When they were last used
        does not matter. Stops when the set has `limit` manifests. Changes nothing in the store."""
        ...

    async def freed_bytes(self, manifests: Collection[ManifestKey]) -> int:
        """Returns the size of the blobs that garbage collection would delete if these manifests of any repositories
        were deleted. Counts each blob once."""
        ...
