"""The interface of the tag history (`TagHistory`): which digests each tag pointed at in the past, and who changed the
tag. The interface also has methods that change tags, for example to point a tag at earlier content again.

Each change of a tag has an entry in the history. Entries are never deleted. A deleted manifest and its blobs are kept
for the grace period of garbage collection. During this period, the manifest can be *put back* into its repository.
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
    """Whether a tag can be pointed at a manifest.

    - `STORED`: yes, the repository has the manifest.
    - `DELETED`: yes, the manifest was deleted, but can be put back.
    - `GONE`: no, garbage collection has removed the manifest."""

    STORED = "stored"
    DELETED = "deleted"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class TagChange:
    """An entry of the history.

    - `digest`: the digest that the tag points at after the change. None: the change deleted the tag.
    - `previous`: the digest that the tag pointed at before the change. None: the tag did not exist.
    - `at`: time of the change, in seconds since 1970.
    - `by`: the client or command that made the change.
    - `availability`: whether a tag can be pointed at the manifest `digest` now. None: `digest` is None."""

    id: int
    tag: Tag
    digest: Digest | None
    previous: Digest | None
    at: float
    by: Actor
    availability: Availability | None


@dataclass(frozen=True, slots=True)
class TagMove:
    """The result of `TagHistory.move`.

    - `digest`: the digest that the tag points at after the call.
    - `previous`: the digest that the tag pointed at before. None: the tag did not exist.
    - `restored`: the digests of the manifests that the call has put back, in this order."""

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
        """Returns a page of at most `limit` entries of the tag, newest first. `tag`: None means all tags. `before`: id
        of an entry, and the page has only older entries; None: the page begins with the newest entry."""
        ...

    async def current(self, repo: RepositoryName, tag: Tag) -> Digest | None:
        """Returns the digest that the tag points at; None if there is no such tag."""
        ...

    async def last_other_digest(self, repo: RepositoryName, tag: Tag, current: Digest | None) -> Digest | None:
        """Returns the last digest that the tag pointed at and that is not `current`. Returns None if there is none."""
        ...

    async def digest_at(self, repo: RepositoryName, tag: Tag, at: float) -> Digest | None:
        """Returns the digest that the tag had at a time in the past; None if the tag did not exist then. `at`: this
        time, in seconds since 1970. A change of the tag that was made up to half a millisecond after `at` also counts,
        because `at` may be the rounded time of the change."""
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
        tag if it does not exist.

        Before this, puts back each of these manifests that was deleted:

        - the manifest itself
        - the manifests that it lists, if it is an index
        - the *referrers* of these manifests (manifests with the field `subject`, such as signatures). A referrer whose
          content is not complete stays deleted.

        If very many manifests must be put back, the call puts them back in several steps. If such a call is interrupted
        or fails, some of the manifests may be put back although the tag is unchanged. Raises:

        - ManifestUnknown: the manifest, or a manifest that it lists, cannot be put back.
        - ManifestBlobUnknown: a blob of the manifest, or of a manifest that it lists, is missing.
        - ManifestTooLarge: the manifest lists more manifests than one call can put back.
        - PreconditionFailed: `condition` does not hold for the tag.
        - Denied: the tag is immutable and points at another manifest, and `force` is False. If `force` is True, the
          call moves such a tag, and the audit log records the forced move."""
        ...

    async def delete_tag(
        self, repo: RepositoryName, tag: Tag, *, by: Actor, is_immutable: IsImmutable, force: bool = False
    ) -> None:
        """Deletes the tag and keeps its manifest. Raises ManifestUnknown if the tag does not exist. Raises Denied if
        the tag is immutable and `force` is False. If `force` is True, deletes an immutable tag, and the audit log
        records the forced delete."""
        ...
