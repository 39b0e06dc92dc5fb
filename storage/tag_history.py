"""The interface of the tag history (`TagHistory`): which digests each tag pointed at in the past, and who changed the
tag. The interface also has methods that change tags, for example to point a tag at earlier content again.

Each change of a tag has an entry in the history. Entries are never deleted. A deleted manifest and its blobs are kept
for the grace period of garbage collection. During that time the manifest can be *put back*: it then is a manifest of
its repository again.
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
    """An entry of the history. `digest`: the digest that the tag points at since the change; None: the change deleted
    the tag. `previous`: the digest that the tag pointed at before; None: there was no such tag. `at`: time of the
    change, in seconds since 1970. `by`: the client or command that made the change. `availability`: whether the
    manifest `digest` is available; None if `digest` is None."""

    id: int
    tag: Tag
    digest: Digest | None
    previous: Digest | None
    at: float
    by: Actor
    availability: Availability | None


@dataclass(frozen=True, slots=True)
class TagMove:
    """A tag that was pointed at a manifest. `digest`: the digest that the tag points at now. `previous`: the digest
    that it pointed at before; None: there was no such tag. `restored`: digests of the manifests that were put back for
    this, in the order in which they were put back."""

    tag: Tag
    digest: Digest
    previous: Digest | None
    restored: Sequence[Digest]


def not_restorable(repo: str, digest: str) -> ManifestUnknown:
    """Returns the error for a manifest that a repository does not have, and that cannot be put back."""
    return ManifestUnknown(
        f"{repo} has no manifest {digest}, and none that could be put back: a deleted manifest is kept only for the "
        "grace period of garbage collection (gc.grace)",
        {"digest": digest},
    )


class TagHistory(Protocol):
    """The history of tags, and changes that use it. All methods raise NameUnknown for a repository that never had
    content; changes also raise StorageFull, StorageFailed. `repo` is the name under which the store has the repository;
    for a mirrored repository, it begins with the name of the upstream."""

    async def changes(self, repo: RepositoryName, tag: Tag | None, before: int | None, limit: int) -> Page[TagChange]:
        """Returns a page of at most `limit` entries of one tag (None: of all tags), newest first: those that are older
        than the entry with the id `before` (None: from the newest on)."""
        ...

    async def current(self, repo: RepositoryName, tag: Tag) -> Digest | None:
        """Returns the digest that the tag points at; None if there is no such tag."""
        ...

    async def last_other_digest(self, repo: RepositoryName, tag: Tag, current: Digest | None) -> Digest | None:
        """Returns the last digest other than `current` that the tag pointed at; None if there is none."""
        ...

    async def digest_at(self, repo: RepositoryName, tag: Tag, at: float) -> Digest | None:
        """Returns the digest of the tag at the time `at` (seconds since 1970); None if there was no such tag. People
        see times rounded to milliseconds, so changes up to half a millisecond after `at` count too."""
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

        First puts back deleted manifests: the manifest itself, the manifests that an index lists, and the *referrers*
        of each of these (manifests with the field `subject`, such as signatures). A deleted referrer stays deleted if
        some of its content is missing. Usually all this happens in the transaction that changes the tag. If very many
        manifests are put back, most of them are put back in earlier transactions. An interrupted call can then leave
        manifests that no tag points at.

        Raises ManifestUnknown (the manifest, or a manifest that it lists, cannot be put back), ManifestBlobUnknown (a
        blob is missing), ManifestTooLarge (it lists more manifests than one call can put back), PreconditionFailed
        (`condition` does not hold for the tag), Denied (the tag is immutable and points at another manifest; with
        `force`, the call moves the tag anyway, and the audit log records this)."""
        ...

    async def delete_tag(
        self, repo: RepositoryName, tag: Tag, *, by: Actor, is_immutable: IsImmutable, force: bool = False
    ) -> None:
        """Deletes the tag and keeps its manifest. Raises ManifestUnknown (there is no such tag), Denied (the tag is
        immutable; with `force`, the call deletes the tag anyway, and the audit log records this)."""
        ...
