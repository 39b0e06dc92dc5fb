"""The interface that lists and evicts cached images (`CachedImages`). A mirror caches images of other registries, its
*upstreams*.

- A *root manifest* is a manifest that no stored index of its repository lists, and whose subject is not stored.
- An *image* is a root manifest with all its children and referrers. The *children* of a manifest are the manifests that
  it lists. Its *referrers* are the manifests that name it as their `subject`. Children and referrers can have children
  and referrers, which are part of the image.
- A *link* is the right of a repository to serve a blob.
- The *last pull* of an image is the latest time at which a client pulled one of its manifests, or the mirror stored
  one.
- To *evict* an image is to delete four things. The next pull fetches the image from the upstream again.
  - Its root manifest.
  - The tags of the root manifest.
  - Its children and referrers. Those that something else needs are kept.
  - The repository's links to its blobs. A link is kept if a kept manifest of the repository refers to the blob.
- A *sighting* records when the mirror first saw a tag of the upstream point at a digest.
- A *cooldown* is the time that has to pass after a sighting before clients get the new digest.
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
"""Receives a mirrored repository, a tag, and the tag's sightings. Returns the older digest that clients get while a
cooldown holds back the newest digest. Returns None if no cooldown holds back the newest digest, or if clients may not
get an older digest either. Called in a thread."""


@dataclass(frozen=True, slots=True)
class Cooldowns:
    """The cooldowns of all upstreams. `longest`: the longest cooldown, in seconds."""

    longest: float
    digest_during_cooldown: FindDigestDuringCooldown


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
    """The images of one upstream. `images`: number of images. `oldest_pull`: time of the last pull of the least
    recently pulled image, in seconds since 1970; None if there is no image."""

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
    """A page of a list of images. `total`: number of images in the whole list. `is_complete`: False if more than
    `MAX_LISTED_IMAGES` images match the request, so that the list lacks some of them."""

    images: Sequence[CachedImage]
    total: int
    is_complete: bool


@dataclass(frozen=True, slots=True)
class EvictionRules:
    """Rules that protect images. An image must not be evicted in any of these cases:

    - `is_kept` returns True for the image's repository.
    - One of the image's blobs is being downloaded: `downloads` contains the blob's digest.
    - The image lacks some of its blobs, and its last pull is after the time `recent_pull_after` (seconds since 1970). A
      client may still be pulling such an image.
    - Clients get the image while a cooldown holds back a newer image. The upstream may no longer have the older image.
      `cooldowns` is None if there are no cooldowns.
    - A *frozen* tag (a tag that no longer follows the upstream) points at the image."""

    is_kept: IsKept
    downloads: Set[Digest]
    recent_pull_after: float
    cooldowns: Cooldowns | None = None


class CachedImages(Protocol):
    """The images of all mirrors. Methods that change something raise StorageFull, StorageFailed. On a full disk, these
    methods may use the whole reserve (disk space that is kept allocated for deletions)."""

    async def evict_next(
        self, upstreams: Sequence[str], rules: EvictionRules, started: float, by: Actor
    ) -> EvictedImage | bool:
        """Checks a few images of these upstreams, the least recently pulled image first, in one transaction. Evicts the
        first image that `rules` do not protect. The caller makes a series of calls, and each call continues the checks.
        `started`: time at which the series began, in seconds since 1970. `by`: the actor that the audit log names.
        Returns:

        - the evicted image.
        - True if this call has evicted no image, but images may be left to check.
        - False if no image is left to check.

        An image with very many tags takes several calls. Each of them deletes some of the tags and returns True. The
        last one evicts the image, and returns in `EvictedImage.tags` only the tags that were left."""
        ...

    async def plan(
        self, upstreams: Sequence[str], rules: EvictionRules, bytes_to_free: int, usage_scope: str
    ) -> list[EvictedImage]:
        """Plans an eviction. Evicts nothing. Returns the images in the order of their eviction. Runs in a thread.

        A *usage scope* is a set of repositories whose stored bytes are counted (`storage.usage`). `usage_scope` is the
        name of the scope in which the eviction has to free `bytes_to_free` bytes. `EvictedImage.bytes` counts only the
        bytes that become free in this scope."""
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
        """Lists the images of these upstreams whose repository name contains `text`. Returns a page: at most `limit`
        images, beginning at the position `offset` of the list. Runs in a thread. If more than `MAX_LISTED_IMAGES`
        images match, the list has only this number of images:

        - If `text` is empty, the images that eviction would check first.
        - Otherwise, the images of the repositories whose names come first."""
        ...
