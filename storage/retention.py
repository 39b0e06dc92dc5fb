"""The interface through which retention reads and deletes tags and manifests (`Retention`).

*Retention* works on hosted repositories (those that are not mirrored). It deletes the tags and the untagged manifests
that no rule in the settings keeps.

- An *orphan* is a manifest that has no tag and that no index of its repository lists. It has no subject, or its subject
  is not in the repository.
- An orphan is *unused* if no client has pushed, tagged or pulled it for long enough (`UnusedSince`).
- The *dependents* of a manifest are the manifests that it lists, and its referrers. When the manifest is deleted, its
  dependents may become orphans.

A client may push or pull a tag after retention has judged it. So each deletion checks again, in its own transaction,
the facts on which the judgement was based.
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
"""Matches the name of a tag that belongs to another manifest, whose digest is in the name. The tag points at a
signature, SBOM or attestation of cosign, or at the list of that manifest's referrers (OCI distribution spec, "Referrers
Tag Schema")."""

RETENTION_ACTOR: Final = Actor(name="entrepot retention")
"""The actor that the audit log and the history of tags name for the deletions of retention."""

ManifestKey = int
"""The number by which the store identifies a manifest of a repository."""


@dataclass(frozen=True, slots=True)
class TagFacts:
    """The facts by which retention judges a tag. Times are in seconds since 1970.

    - `pushed`: when the tag was last pushed.
    - `pulled`: when the tag's manifest, or a manifest that it lists, was last pulled; None: no pull is recorded.
    - `unrecorded_until`: some pulls before this time are not recorded, because another registry or an earlier version
      of the program served the image, or because the store was restored from a backup; None: all pulls are recorded.
    - `imported`: when an import from another registry set the tag; `pushed` is then the time of the tag at the other
      registry, which may be an estimate. None: a client has set the tag, or has pushed it again since the import.
    - `subject`: if the name of the tag matches `REFERRER_TAG`, the manifest to which the tag belongs. None: the name
      does not match, or the repository does not have the manifest.
    - `order_time`: the time by which the tag is sorted in place of `pushed`, if `pushed` was in the future
      (`storage.future_times`) when the tag was read; otherwise None. It is the later of two times: the last change of
      any tag, in any repository, before the clock went ahead, and the last change of this tag whose time was not in
      the future. It is 0.0 if neither change is known."""

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
        """Whether the name of the tag matches `REFERRER_TAG`."""
        return REFERRER_TAG.fullmatch(self.name) is not None


@dataclass(frozen=True, slots=True)
class TagPosition:
    """The position of a tag in a repository's list of tags, newest first. The list is sorted by the time of the last
    push. A tag whose last push is in the future (`storage.future_times`) is sorted by `TagFacts.order_time` instead:
    it would otherwise be the newest tag until the clock reaches that time. Tags that were pushed at the same time are
    sorted by name.

    `pushed`, `name`, `order_time`: the fields of the tag's `TagFacts`. `future_start`: the time at which the list was
    read, plus `storage.future_times.CLOCK_MARGIN_SECONDS`. For the list, all later times were in the future."""

    pushed: float
    name: str
    order_time: float | None = None
    future_start: float = field(default=math.inf, compare=False)

    def is_same_or_older_than(self, tag: TagFacts) -> bool:
        """Returns whether this position is the position of `tag`, or an older one. If this is the position of the `n`th
        newest tag, returns whether `tag` is one of the `n` newest."""
        # If `tag.pushed` was not in the future when the list was read, the list sorted the tag by `pushed`, so
        # `tag.order_time` must not count. `tag` can have an `order_time` in spite of this: the clock may have been set
        # back after the list was read and before `tag` was read.
        order_time = tag.order_time if tag.pushed > self.future_start else None
        return _sort_key(tag.pushed, tag.name, order_time) <= _sort_key(self.pushed, self.name, self.order_time)


def _sort_key(pushed: float, name: str, order_time: float | None) -> tuple[float, float, str]:
    return (-pushed if order_time is None else -order_time, -pushed, name)


@dataclass(frozen=True, slots=True)
class UnusedSince:
    """The conditions under which an orphan counts as unused. Times are in seconds since 1970.

    - `pushed`: the orphan has not been pushed since this time.
    - `untagged`: the orphan has had no tag since this time.
    - `pulled`: since this time, the orphan and the manifests that it lists were neither pulled by a client nor imported
      from another registry.

    The *start of the record* is the time since which all pulls are recorded. Earlier pulls may be missing, because an
    earlier version of the program served the image, or because the store was restored from a backup. If the record
    starts after `pulled`, pulls between these two times may be missing. An orphan that was pushed before the start of
    the record may have been pulled then, so it counts as used."""

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
    """Some of the unused orphans of a repository. `next_after`: the argument `after` for the next page; None: this is
    the last page."""

    items: Sequence[Orphan]
    next_after: Digest | None


@dataclass(slots=True)
class LostTags:
    """What `Retention.unused_orphans` has read so far from the tag history of one repository. A caller passes the same
    object for all pages of the repository, so that each entry of the history is read only once.

    `manifest_digests`: the digests of the manifests that have lost a tag. `last_entry`: the id of the newest entry of
    the history when it was last read; 0: no entry was read yet."""

    manifest_digests: set[str] = field(default_factory=set)
    last_entry: int = 0


class DeletedOrphans(NamedTuple):
    """The result of `Retention.delete_orphans`. `deleted`: the deleted manifests. `dependents`: the dependents of the
    deleted manifests. `is_restorable`: whether the deleted manifests can be put back; False if the disk was too full to
    keep them."""

    deleted: Sequence[Digest]
    dependents: Sequence[Digest]
    is_restorable: bool


class Retention(Protocol):
    """Reads the tags and manifests of one repository at a time, in pages, and deletes tags and manifests that no rule
    keeps. Reads run in a thread. `repo` is the name of a repository in the store. A repository without content has no
    tags and no manifests. All methods may raise StorageFailed.

    A deleted tag can be put back (`storage.tag_history`). A deleted manifest can be put back during the grace period of
    garbage collection, unless the disk was too full to keep it.

    Only orphans are deleted, no other manifests. So every manifest that an immutable tag needs stays."""

    async def recorded_periods(self) -> RecordedPeriods:
        """Returns the periods in which a server recorded pulls."""
        ...

    async def nth_newest(self, repo: RepositoryName, n: int) -> TagPosition | None:
        """Returns the position of the `n`th newest tag; None if there are fewer than `n` tags. Tags whose names match
        `REFERRER_TAG` do not count."""
        ...

    async def tag_facts(
        self, repo: RepositoryName, after: str | None, limit: int = MAX_PAGE_ROWS
    ) -> Sequence[TagFacts]:
        """Returns the facts about at most `limit` tags, in the order of their names. Begins after the name `after`;
        None: begins with the first tag."""
        ...

    async def unused_orphans(
        self, repo: RepositoryName, since: UnusedSince, after: Digest | None, lost_tags: LostTags
    ) -> OrphanPage:
        """Returns the orphans that are unused since the times in `since`. Reads at most `MAX_PAGE_ROWS` manifests, so a
        page may be empty although there are further pages.

        `lost_tags`: an empty object for the first page. The call adds what it reads from the tag history. For each
        further page, pass the same object and the same `since`."""
        ...

    async def delete_tag(
        self, repo: RepositoryName, judged_tag: TagFacts, by: Actor, is_immutable: IsImmutable = nothing_immutable
    ) -> bool:
        """Deletes a tag, but not its manifest. Returns whether it deleted the tag. Does not delete a tag that

        - is immutable,
        - belongs to a manifest in the repository (`TagFacts.subject`), or
        - has been pushed, moved, deleted or pulled since it was judged."""
        ...

    async def delete_unused_orphan(
        self, repo: RepositoryName, digest: Digest, since: UnusedSince, judged_at: float, by: Actor
    ) -> Sequence[Digest] | None:
        """Deletes a manifest that `unused_orphans` returned at the time `judged_at`, if it is still an unused orphan.
        Returns the digests of the manifest's dependents. Returns None if it deleted nothing."""
        ...

    async def delete_orphans(
        self, repo: RepositoryName, digests: Sequence[Digest], by: Actor, *, unused_since: float | None
    ) -> DeletedOrphans:
        """Deletes the orphans among the manifests `digests` (at most `MAX_ORPHANS`). `unused_since`:

        - A time in seconds since 1970, for a deletion by retention. Orphans that were pushed or pulled after this time
          stay, because a client may be about to push an index that lists them. The events of the deletions have the
          action `EventAction.RETENTION`.
        - None, for a deletion that a client asked for. The time of their last use does not matter."""
        ...

    async def add_orphans(
        self,
        repo: RepositoryName,
        roots: Sequence[ManifestKey],
        removed_tags: Collection[Tag],
        orphans: set[ManifestKey],
        limit: float = math.inf,
    ) -> None:
        """Finds the manifests that would be orphans if `removed_tags` and the manifests in the set `orphans` were
        deleted, and adds them to `orphans`. The time of their last use does not matter. Changes nothing in the store.

        First checks `roots` (at most `MAX_PAGE_ROWS` manifests), and then the dependents of each manifest that it adds.
        Stops when the set has `limit` manifests."""
        ...

    async def freed_bytes(self, manifests: Collection[ManifestKey]) -> int:
        """Returns the size in bytes of the blobs that garbage collection would delete if `manifests` were deleted.
        Counts each blob once. The manifests may be of several repositories."""
        ...
