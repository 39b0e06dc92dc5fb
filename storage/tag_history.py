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
    that the tag pointed at before; None: there was no such tag. `restored`: digests of the manifests that the call has
    put back, in this order."""

    tag: Tag
    digest: Digest
    previous: Digest | None
    restored: Sequence[Digest]


def not_restorable(repo: str, digest: str) -> ManifestUnknown:
    """Returns the error for a manifest that is not in the repository and cannot be put back."""
    return ManifestUnknown(
        f"{repo} has no manifest {digest}, and it cannot be put back: a deleted manifest is kept only for the grace "
        "period of garbage collection (gc.grace)",
        {"digest": digest},
    )


class TagHistory(Protocol):
    """The history of tags, and changes of tags. `repo` is the name of the repository in the store. The name of a
    mirrored repository begins with the name of the upstream. If the repository never had content, all methods raise
    NameUnknown. The methods `move` and `delete_tag` also raise StorageFull and StorageFailed."""

    async def changes(self, repo: RepositoryName, tag: Tag | None, before: int | None, limit: int) -> Page[TagChange]:
        """Returns a page of at most `limit` entries of the tag, newest first. `tag`: None means all tags. `before`: the
        page has only entries that are older than the entry with this id; None: begins with the newest entry."""
        ...

    async def current(self, repo: RepositoryName, tag: Tag) -> Digest | None:
        """Returns the digest that the tag points at; None if there is no such tag."""
        ...

    async def last_other_digest(self, repo: RepositoryName, tag: Tag, current: Digest | None) -> Digest | None:
        """Returns the last digest other than `current` that the tag pointed at; None if there is none."""
        ...

    async def digest_at(self, repo: RepositoryName, tag: Tag, at: float) -> Digest | None:
        """Returns the digest of the tag at the time `at` (seconds since 1970); None if there was no such tag. Changes
        up to half a millisecond after `at` count: `at` may be the time of a change, rounded to milliseconds."""
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
        of these manifests (manifests with the field `subject`, such as signatures). If some content of a referrer is
        missing, the referrer stays deleted. Usually one transaction puts back the manifests and changes the tag. If
        there are very many manifests, earlier transactions put back most of them. An interrupted call can then leave
        manifests that no tag points at. Raises:

        - ManifestUnknown: the manifest, or a manifest that it lists, cannot be put back.
        - ManifestBlobUnknown: a blob is missing.
        - ManifestTooLarge: the manifest lists more manifests than one call can put back.
        - PreconditionFailed: `condition` does not hold for the tag.
        - Denied: the tag is immutable and points at another manifest. With `force`, the call moves the tag anyway, and
          the audit log records the forced move."""
        ...

    async def delete_tag(
        self, repo: RepositoryName, tag: Tag, *, by: Actor, is_immutable: IsImmutable, force: bool = False
    ) -> None:
        """Deletes the tag and keeps its manifest. If there is no such tag, raises ManifestUnknown. If the tag is
        immutable, raises Denied; with `force`, deletes the tag anyway, and the audit log records the forced delete."""
        ...
