"""The interface of the images in the cache of mirrored content (`CachedImages`).

An *image* is a group of mirrored manifests of one repository: a *root manifest*, its children (the manifests that it
lists), its referrers (the manifests whose `subject` it is), and recursively their children and referrers. A root
manifest is a manifest that no stored index of the repository lists and that has no stored subject. To *evict* an image
is to delete its manifests, its tags, and the repository's links to blobs that no other manifest of the repository
refers to. (A *link* is the right of a repository to serve a blob.) The next pull fetches the image from the upstream
again.

The last pull of an image is the latest time at which a client pulled one of its manifests, or at which the mirror
stored one. A *sighting* records when the mirror first saw a tag of the upstream point at a digest. A *cooldown* is the
time that has to pass after a sighting before clients get the new digest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from storage.content import Actor
from storage.names import Digest, RepositoryName, Tag
from storage.upstream_tags import Sighting

MAX_LISTED_IMAGES: Final = 2000
"""Largest number of images that `CachedImages.images` reads."""

IsKept = Callable[[RepositoryName], bool]
"""Returns whether the images of a repository are never evicted."""


DigestDuringCooldown = Callable[[RepositoryName, Tag, Sequence[Sighting]], Digest | None]
"""Called with a mirrored repository, a tag and the tag's sightings. Returns the older digest that clients get while a
cooldown holds back the newest digest. Returns None if no cooldown holds back the newest digest, or if clients may not
get any digest yet. Called in a thread."""


@dataclass(frozen=True, slots=True)
class Cooldowns:
    """The cooldowns of all upstreams. `longest`: the longest of them, in seconds. `served_instead`: returns the digest
    that clients get while a cooldown holds back a newer one."""

    longest: float
    served_instead: DigestDuringCooldown


@dataclass(frozen=True, slots=True)
class EvictedImage:
    """An image that was evicted, or that a plan would evict. `digest`: digest of its root manifest. `manifests`: number
    of its manifests. `last_pulled`: time of its last pull, in seconds since 1970. `bytes`: size of the blobs that no
    other repository of the registry uses, so that garbage collection frees them."""

    upstream: str
    repository: RepositoryName
    digest: Digest
    tags: tuple[Tag, ...]
    manifests: int
    last_pulled: float
    bytes: int


@dataclass(frozen=True, slots=True)
class DroppedLinks:
    """The removed links of repositories to blobs. `links`: their number. `bytes`: size of the blobs that have no
    link any more, so that garbage collection frees them."""

    links: int
    bytes: int


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """The images of one upstream. `images`: their number. `oldest_pull`: time of the last pull of the least recently
    pulled image, in seconds since 1970; None if there is no image."""

    images: int
    oldest_pull: float | None


class ImageOrder(StrEnum):
    """The orders in which images are listed: largest first, most recently pulled first, or least recently pulled
    first."""

    SIZE = "size"
    NEWEST_PULL = "newest-pull"
    OLDEST_PULL = "oldest-pull"


@dataclass(frozen=True, slots=True)
class CachedImage:
    """An image in the cache. `digest`: digest of its root manifest. `manifests`: number of its manifests.
    `last_pulled`: in seconds since 1970. `bytes`: size of its blobs that are stored, each counted once; other images
    may have the same blobs."""

    repository: RepositoryName
    digest: Digest
    tags: tuple[Tag, ...]
    manifests: int
    last_pulled: float
    bytes: int


@dataclass(frozen=True, slots=True)
class CachedImagePage:
    """A part of a list of images. `total`: number of images in the whole list. `is_complete`: False if there are more
    than `MAX_LISTED_IMAGES`, so that the list lacks some images."""

    images: Sequence[CachedImage]
    total: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class EvictionRules:
    """The rules about images that are not evicted. `is_kept`: returns whether the images of a repository are never
    evicted. `downloading`: the digests of blobs that are being downloaded now; an image that refers to one of them
    stays. `recent_pull_after`: a pull after this time (seconds since 1970) is recent. An image that lacks some of its
    blobs stays after a recent pull, because a client may still be pulling it. `cooldowns`: the cooldowns (None: there
    are none); an older image that clients get during a cooldown stays, because the upstream may no longer have it.
    Images that a frozen tag (a tag that no longer follows the upstream) points at stay in any case."""

    is_kept: IsKept
    downloading: Set[Digest]
    recent_pull_after: float
    cooldowns: Cooldowns | None = None


class CachedImages(Protocol):
    """The images of all mirrors. Changes raise StorageFull, StorageFailed. On a full disk they may use all of the
    reserve (disk space that was allocated in advance)."""

    async def evict_next(
        self, upstreams: Sequence[str], rules: EvictionRules, started: float, by: Actor
    ) -> EvictedImage | bool:
        """Checks a few images of these upstreams, least recently pulled ones first. Evicts the first image that the
        rules allow to evict, in one transaction, and returns the image. If the rules allow the eviction of none of
        them, returns True if more images are left to check, otherwise False. `started`: time at which this series of
        calls began (seconds since 1970). In one series, the store checks each image only once. `by`: the actor that the
        audit log names.

        If an image that may be evicted has very many tags, deletes only a part of them, so that the transaction stays
        short, and returns True. The next call goes on with this image, and `EvictedImage.tags` then has only the tags
        that were left."""
        ...

    async def plan(
        self, upstreams: Sequence[str], rules: EvictionRules, bytes_to_free: int, usage_scope: str
    ) -> list[EvictedImage]:
        """Returns the images that would be evicted to free this number of bytes in the usage scope `usage_scope` (a set
        of repositories whose stored bytes are counted, see `storage.usage`), in order. Here `EvictedImage.bytes` is the
        number of bytes that the eviction frees in that scope. Changes nothing. Runs in a thread."""
        ...

    async def drop_unused_links(self, upstreams: Sequence[str], unused_since: float) -> DroppedLinks:
        """Removes unused links of mirrored repositories. A link is unused if no manifest of the repository refers to
        its blob, and no client has used the blob after the time `unused_since` (seconds since 1970). Removes at most a
        few hundred links. If it removes none, no such link is left."""
        ...

    async def summary(self, upstream: str) -> CacheSummary:
        """Counts the images of an upstream. Runs in a thread."""
        ...

    async def images(
        self, upstreams: Sequence[str], text: str, order: ImageOrder, offset: int, limit: int
    ) -> CachedImagePage:
        """Lists the images of these upstreams whose repository has `text` in its name: at most `limit` of them, from
        the position `offset` of the list on. Reads at most `MAX_LISTED_IMAGES` images, to limit the work. If there are
        more, the list has only a part of them: if `text` is empty, the images that eviction would check first;
        otherwise, those of the repositories whose names come first. Runs in a thread."""
        ...
