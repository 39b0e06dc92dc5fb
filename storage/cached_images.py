"""The interface that lists and evicts cached images (`CachedImages`). A mirror caches images of other registries, its
*upstreams*.

A *root manifest* is a manifest that no stored index of its repository lists and that has no stored subject. An *image*
is a root manifest with its children (the manifests that it lists), its referrers (the manifests whose `subject` it is),
and recursively their children and referrers. A *link* is the right of a repository to serve a blob. To *evict* an image
is to delete the root manifest, its tags, the children and referrers that nothing else needs, and the repository's links
to blobs that only deleted manifests refer to. The next pull fetches the image from the upstream again.

The last pull of an image is the latest time at which a client pulled, or the mirror stored, one of its manifests. A
*sighting* records when the mirror first saw a tag of the upstream point at a digest. A *cooldown* is the time that has
to pass after a sighting before clients get the new digest.
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
"""Returns True if no image of the repository may be evicted."""

FindDigestDuringCooldown = Callable[[RepositoryName, Tag, Sequence[Sighting]], Digest | None]
"""Called with a mirrored repository, a tag and the tag's sightings. Returns the older digest that clients get while a
cooldown holds back the newest digest. Returns None if no cooldown holds back the newest digest, or if clients may not
get any digest yet. Called in a thread."""


@dataclass(frozen=True, slots=True)
class Cooldowns:
    """The cooldowns of all upstreams. `longest`: the longest cooldown, in seconds. `served_instead`: returns the digest
    that clients get while a cooldown holds back a newer digest."""

    longest: float
    served_instead: FindDigestDuringCooldown


@dataclass(frozen=True, slots=True)
class EvictedImage:
    """An image that was evicted, or that a plan would evict. `digest`: digest of its root manifest. `manifests`: number
    of manifests that the eviction deletes. `last_pulled`: time of its last pull, in seconds since 1970. `bytes`: total
    size of the blobs that lose their last link, so that garbage collection frees them."""

    upstream: str
    repository: RepositoryName
    digest: Digest
    tags: tuple[Tag, ...]
    manifests: int
    last_pulled: float
    bytes: int


@dataclass(frozen=True, slots=True)
class DroppedLinks:
    """The result of `CachedImages.drop_unused_links`. `links`: number of removed links. `bytes`: total size of the
    blobs that lost their last link, so that garbage collection frees them."""

    links: int
    bytes: int


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """The images of one upstream. `images`: number of images. `oldest_pull`: the earliest of the images' last pulls, in
    seconds since 1970; None if there is no image."""

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
    `last_pulled`: time of its last pull, in seconds since 1970. `bytes`: total size of its stored blobs. A blob that
    several of its manifests share counts once. Other images may share blobs with it."""

    repository: RepositoryName
    digest: Digest
    tags: tuple[Tag, ...]
    manifests: int
    last_pulled: float
    bytes: int


@dataclass(frozen=True, slots=True)
class CachedImagePage:
    """A page of a list of images. `total`: number of images in the whole list. `is_complete`: False if the list lacks
    some images, because there are more than `MAX_LISTED_IMAGES`."""

    images: Sequence[CachedImage]
    total: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class EvictionRules:
    """Determines which images must not be evicted:

    - the images of a repository for which `is_kept` returns True;
    - an image that refers to a blob that is being downloaded now (its digest is in `downloads`);
    - an image that lacks some of its blobs, if its last pull is after the time `recent_pull_after` (seconds since
      1970): a client may still be pulling the image;
    - an older image that clients get while a cooldown (`cooldowns`; None: no cooldowns) holds back a newer image: the
      upstream may no longer have the older one;
    - an image that a *frozen* tag (a tag that no longer follows the upstream) points at."""

    is_kept: IsKept
    downloads: Set[Digest]
    recent_pull_after: float
    cooldowns: Cooldowns | None = None


class CachedImages(Protocol):
    """The images of all mirrors. Methods that change something raise StorageFull, StorageFailed. On a full disk, these
    methods may use the whole reserve: disk space that is allocated in advance, so that content can be deleted."""

    async def evict_next(
        self, upstreams: Sequence[str], rules: EvictionRules, started: float, by: Actor
    ) -> EvictedImage | bool:
        """Checks a few images of these upstreams, least recently pulled ones first, in one transaction. Evicts and
        returns the first image that the rules allow to evict. If there is no such image, returns True if more images
        may be left to check, otherwise False. The caller makes a series of calls. `started`: time at which the series
        began (seconds since 1970). An image that must stay is checked only once in a series. `by`: the actor that
        the audit log names.

        If the image to evict has very many tags, the call deletes only some of the tags, so that the transaction stays
        short, and returns True. The next call continues with this image. `EvictedImage.tags` then has only the tags
        that were left."""
        ...

    async def plan(
        self, upstreams: Sequence[str], rules: EvictionRules, bytes_to_free: int, usage_scope: str
    ) -> list[EvictedImage]:
        """Returns the images that would be evicted to free `bytes_to_free` bytes in the usage scope named
        `usage_scope`, in the order of their eviction. A *usage scope* is a set of repositories whose stored bytes are
        counted (`storage.usage`). Here `EvictedImage.bytes` counts only bytes freed in this scope. Changes nothing.
        Runs in a thread."""
        ...

    async def drop_unused_links(self, upstreams: Sequence[str], unused_since: float) -> DroppedLinks:
        """Removes unused links of mirrored repositories. A link is unused if no manifest of the repository refers to
        its blob, and no client has used the blob after the time `unused_since` (seconds since 1970). Removes at most a
        few hundred links. If it removes none, no unused link is left."""
        ...

    async def summary(self, upstream: str) -> CacheSummary:
        """Counts the images of an upstream. Runs in a thread."""
        ...

    async def images(
        self, upstreams: Sequence[str], text: str, order: ImageOrder, offset: int, limit: int
    ) -> CachedImagePage:
        """Lists the images of these upstreams in repositories whose name contains `text`. Returns a page: at most
        `limit` images, beginning at the position `offset` of the list. Reads at most `MAX_LISTED_IMAGES` images, to
        limit the work. If there are more and `text` is empty, the list has those that eviction would check first. If
        there are more and `text` is not empty, the list has those of the repositories whose names come first. Runs in a
        thread."""
        ...
