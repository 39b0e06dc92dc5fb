"""The interface of the tag history (`TagHistory`): what each tag pointed at in the past, who changed it, and how a tag
gets back what it pointed at.

Each change of a tag has an entry in the history, which is kept for ever. A deleted manifest is kept for the grace
period of garbage collection, and its blobs as well, so it can be *put back*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from storage.content import Actor, Condition, Page
from storage.errors import ManifestUnknown
from storage.names import Digest, RepositoryName, Tag
from storage.tag_rules import IsImmutable


class Availability(StrEnum):
    """Whether a tag can point at a manifest. `STORED`: the repository has the manifest. `DELETED`: it was deleted, and
    can still be put back. `GONE`: garbage collection has removed it."""

    STORED = "stored"
    DELETED = "deleted"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class TagChange:
    """An entry of the history. `digest`: what the tag points at since the change; None: the change deleted the tag.
    `previous`: what the tag pointed at before; None: there was no such tag. `at`: time of the change, in seconds since
    1970. `by`: who made it. `availability`: that of the manifest `digest`; None if `digest` is None."""

    id: int
    tag: Tag
    digest: Digest | None
    previous: Digest | None
    at: float
    by: Actor
    availability: Availability | None


@dataclass(frozen=True, slots=True)
class TagMove:
    """A tag that was pointed at a manifest. `digest`: what it points at now; `previous`: what it pointed at before;
    None: there was no such tag. `restored`: digests of the manifests that were put back for this, in the order in which
    they were stored."""

    tag: Tag
    digest: Digest
    previous: Digest | None
    restored: Sequence[Digest]


def not_restorable(repo: str, digest: str) -> ManifestUnknown:
    """Returns the error for a manifest that a repository neither has nor can get back."""
    return ManifestUnknown(
        f"{repo} has no manifest {digest}, and none that could be put back: a deleted manifest is kept only for the "
        "grace period of garbage collection (gc.grace)",
        {"digest": digest},
    )


class TagHistory(Protocol):
    """The history of tags, and changes that use it. All methods raise NameUnknown for a repository that never had
    content; changes also raise StorageFull, StorageFailed. `repo` is the stored name of a repository."""

    async def changes(self, repo: RepositoryName, tag: Tag | None, before: int | None, limit: int) -> Page[TagChange]:
        """Returns a page of at most `limit` entries of one tag (None: of all tags), newest first: those that come after
        the entry with the id `before` (None: from the newest on)."""
        ...

    async def current(self, repo: RepositoryName, tag: Tag) -> Digest | None:
        """Returns what the tag points at; None if there is no such tag."""
        ...

    async def last_other_digest(self, repo: RepositoryName, tag: Tag, current: Digest | None) -> Digest | None:
        """Returns the digest at which the tag last pointed, other than `current`; None if there is none."""
        ...

    async def digest_at(self, repo: RepositoryName, tag: Tag, at: float) -> Digest | None:
        """Returns what the tag pointed at at the time `at` (seconds since 1970); None if there was no such tag. Changes
        in the same millisecond count, because times are shown in milliseconds."""
        ...

    async def move(
        self,
        repo: RepositoryName,
        tag: Tag,
        digest: Digest,
        *,
        by: Actor,
        condition: Condition | None = None,
        is_immutable: IsImmutable,
        force: bool = False,
    ) -> TagMove:
        """Points the tag at a manifest that the repository has, or that was deleted and can be put back. Creates the
        tag if there is none.

        First puts back what is missing: the manifest, the manifests that an index lists, and the deleted referrers of
        each manifest that is put back. A deleted referrer that is not whole any more stays deleted. All this is one
        transaction with the change of the tag, unless very many manifests are put back; then an interrupted call leaves
        some that no tag points at.

        Raises ManifestUnknown (the manifest, or one that it lists, is gone), ManifestBlobUnknown (a blob is gone),
        ManifestTooLarge (it lists more manifests than one call can put back), PreconditionFailed (`condition` does not
        hold for the tag), Denied (the tag is immutable and points at another manifest; with `force`, the tag is moved
        all the same and the audit log says so)."""
        ...

    async def delete_tag(
        self, repo: RepositoryName, tag: Tag, *, by: Actor, is_immutable: IsImmutable, force: bool = False
    ) -> None:
        """Deletes the tag and keeps its manifest. Raises ManifestUnknown (there is no such tag), Denied (the tag is
        immutable; with `force`, it is deleted all the same and the audit log says so)."""
        ...
