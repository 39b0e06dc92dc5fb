"""The interface of the records about mirrored tags (`UpstreamTags`): the digests that an upstream's tag has pointed
at, and the frozen tags.

An *upstream* is a registry that this registry mirrors. A *sighting* records that the mirror saw an upstream's tag for
the first time, or saw that the tag had moved. A sighting has the time and the tag's digest. The tag counts as pointing
at this digest until its next sighting. A *frozen* tag stays at one digest in this registry, even if the upstream's tag
moves. Repositories are given by their stored names, such as `docker.io/library/ubuntu`. Times are seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from storage.content import Actor, Page
from storage.errors import Denied, RegistryError
from storage.names import Digest, RepositoryName, Tag


class TagNotFrozen(RegistryError):
    """The tag is not frozen."""

    code = "TAG_NOT_FROZEN"
    default = "the tag is not frozen"


class TagFrozen(Denied):
    """The error for a request that would delete a frozen tag, or content that a frozen tag needs. (`FrozenTag` is not
    an error: it is the record of a frozen tag.)"""

    default = "the tag is frozen"


@dataclass(frozen=True, slots=True)
class Sighting:
    """At the time `since`, the mirror saw that an upstream's tag points at `digest`. The tag was new, or had moved."""

    since: float
    digest: Digest


class UpstreamTagMove(NamedTuple):
    """The time of a sighting, with the tag that was seen. `Sighting` has the digest instead of the tag. The first
    sighting of a new tag counts as a move, too. Moves are sorted by `since`, then by repository, then by tag."""

    since: float
    repository: RepositoryName
    tag: Tag


@dataclass(frozen=True, slots=True)
class FrozenTag:
    """The record of a tag that was frozen at `digest`. `at`: the time at which the tag was frozen. `actor`: the name of
    the account or command that froze the tag. (`TagFrozen` is an error.)"""

    repository: RepositoryName
    tag: Tag
    digest: Digest
    at: float
    actor: str

    def __str__(self) -> str:
        return f"{self.repository}:{self.tag}"


class UpstreamTags(Protocol):
    """The sightings and the frozen tags. All processes share these records, and the records survive restarts. A read
    takes less than a millisecond, unless the docstring of the method says that it reads in a thread. Changes raise
    StorageFull, StorageFailed."""

    async def sightings(self, repo: RepositoryName, tag: Tag) -> Sequence[Sighting]:
        """Returns the stored sightings of the tag, oldest first; an empty sequence if the tag was never seen."""
        ...

    async def save_sightings(self, repo: RepositoryName, tag: Tag, sightings: Sequence[Sighting]) -> None:
        """Replaces the stored sightings of the tag by `sightings`, whose times must increase. The caller makes sure
        that no other process changes the sightings of the tag meanwhile. A power cut may undo the change. The mirror
        then sees the new digest again, and stores a sighting with a later time."""
        ...

    async def moves(self, since: float, after: UpstreamTagMove | None, limit: int) -> Sequence[UpstreamTagMove]:
        """Returns at most `limit` stored moves of all tags, sorted. If `after` is None, starts with the first move that
        the mirror saw at `since` or later. Otherwise starts with the first move that sorts after `after`, and ignores
        `since`."""
        ...

    async def forget_unused(self, before: float) -> int:
        """Deletes all sightings of each tag that is not cached any more and has no sighting at `before` or later.
        Returns the number of these tags. Reads all sightings that are older than `before`, in a thread."""
        ...

    async def find_frozen_tag(self, repo: RepositoryName, tag: Tag) -> FrozenTag | None:
        """Returns the frozen tag; None if the tag is not frozen."""
        ...

    async def frozen_tags(self, after: str | None, limit: int) -> Page[FrozenTag]:
        """Returns a page of at most `limit` frozen tags, sorted by repository and then by tag. `after`: a tag in the
        form `REPOSITORY:TAG`; the page begins with the first tag that sorts after it. If `after` is None, the page
        begins with the first tag."""
        ...

    async def frozen_tags_in(self, repo: RepositoryName) -> Sequence[FrozenTag]:
        """Returns the frozen tags of the repository. The cache must keep the manifests of these tags, and the content
        that these manifests refer to."""
        ...

    async def frozen_tag_that_needs(self, repo: RepositoryName, digest: Digest) -> FrozenTag | None:
        """Returns the first frozen tag of the repository that needs the manifest or blob with this digest; None if no
        frozen tag needs it. A frozen tag needs its manifest. A cached index needs the manifests that it lists, and a
        cached manifest needs its blobs. Reads the manifests of all frozen tags of the repository, in a thread."""
        ...

    async def freeze(self, repo: RepositoryName, tag: Tag, digest: Digest, *, by: Actor) -> FrozenTag:
        """Freezes the tag at `digest`, and returns the frozen tag. If the tag is frozen at another digest, replaces its
        record. If the tag is already frozen at `digest`, changes nothing, not even the record's time and actor."""
        ...

    async def unfreeze(self, repo: RepositoryName, tag: Tag, *, by: Actor) -> FrozenTag:
        """Unfreezes a tag, and returns its deleted record. Raises TagNotFrozen."""
        ...
