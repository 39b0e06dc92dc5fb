"""The interface that lists the tags of a repository with facts from the metadata (`TagListing`), such as who pushed a
tag and when its manifest was last pulled.

Manifest A is a *referrer* of manifest B if the `subject` field of A has the digest of B. A *referrer tag* contains the
digest of a manifest in its name. An example is `sha256-….sig`, under which older versions of cosign store a signature.
The *tree* of a manifest consists of the manifest and, for an index, of the stored manifests that it lists, directly or
through other indexes. The methods take the name of a repository in the store; for a mirrored repository, this name
begins with the name of the upstream registry. Times are in seconds since 1970.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, Protocol, Self

from storage.names import Digest, RepositoryName, Tag

MAX_PAGE_TAGS: Final = 200
"""Largest number of tags on a page."""
MAX_SORTED_BY_SIZE: Final = 2_000
"""Largest number of tags that a call sorts by size. The limit exists because each size is the sum over a tree."""
MAX_TREE_MANIFESTS: Final = 200
"""Largest number of manifests that a call reads in one tree. `ManifestFacts.stored_bytes` is None for a larger tree."""
MAX_READ_MANIFESTS: Final = 20_000
"""Largest number of manifests that a call reads in all trees together. `ManifestFacts.stored_bytes` is None for the
trees that exceed this limit."""
MAX_TAGS_OF_MANIFEST: Final = 100
"""Largest number of tags of one manifest in `ManifestFacts.tags`."""

BUNDLE_TYPE_PREFIX: Final = "application/vnd.dev.sigstore.bundle"
"""The artifact type of a Sigstore *bundle* begins with this text. cosign 3 stores a signature or an attestation as a
bundle."""
BUNDLE_PREDICATE_ANNOTATION: Final = "dev.sigstore.bundle.predicateType"
"""The annotation in which the manifest of a bundle states the *predicate type*: the kind of claim that the bundle makes
about an image. For example, a bundle may claim how the image was built."""

UNKNOWN_PREDICATE: Final = "unknown"
"""`ManifestFacts.bundle_predicates` has this text for a bundle whose annotations are too long to be read."""


class TagOrder(StrEnum):
    """The order of a list of tags. `NAME`: by the bytes of the names. `VERSION`: as people sort versions, for example
    `1.9` before `1.10` and `1.10-rc1` before `1.10` (`storage.version_order`). `PUSHED`: by the time of the last push.
    `SIZE`: by `ManifestFacts.stored_bytes`."""

    NAME = "name"
    VERSION = "version"
    PUSHED = "pushed"
    SIZE = "size"


@dataclass(frozen=True, slots=True)
class TagQuery:
    """The tags to list, and their order.

    - `text`: only tags whose name contains this text are listed. Upper and lower case count as the same.
    - `is_descending`: whether the order is reversed.
    - `includes_referrer_tags`: whether referrer tags are listed as well."""

    text: str = ""
    order: TagOrder = TagOrder.NAME
    is_descending: bool = False
    includes_referrer_tags: bool = False


class TagCursor(NamedTuple):
    """The position in a list right after the tag `name`. `sort_value`: in a list sorted by `PUSHED`, the time of the
    tag's last push; in a list sorted by `SIZE`, the tag's size; in other lists 0."""

    name: str
    sort_value: float = 0.0

    def __str__(self) -> str:
        return f"{self.sort_value!r} {self.name}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses the text that `__str__` returned. Raises ValueError."""
        sort_value, space, name = text.partition(" ")
        if not space:
            raise ValueError("the position in the list is not valid")
        return cls(name, float(sort_value))


@dataclass(frozen=True, slots=True)
class ManifestFacts:
    """The facts in the metadata about a manifest of a repository.

    - `size`: size of the manifest itself in bytes; 0 if its stored bytes are damaged.
    - `stored_at`: in a mirror, the time at which the manifest was stored. Otherwise the time of the manifest's last
      push to the repository. The time of the last push can be up to a minute too early: to save writes, a push does not
      update a time that is at most a minute old.
    - `last_pulled`: when a manifest of the tree was last pulled; None: no pull is recorded.
    - `pulls`: number of pulls of all manifests of the tree together.
    - `stored_bytes`: total size in bytes of the stored blobs of the tree, each counted once; None: not computed,
      because a limit of the call was reached.
    - `referrer_types`: the artifact types of the referrers, at most 20.
    - `bundle_predicates`: the predicate types of the Sigstore bundles among the referrers, each type once; an empty
      text for a bundle that states no type. At most 20 bundles are read.
    - `referrer_suffixes`: the texts after the digest in the names of the referrer tags, such as `.sig`; at most 20.
    - `tags`: the tags that point at the manifest, sorted, at most MAX_TAGS_OF_MANIFEST."""

    digest: Digest
    media_type: str
    size: int
    artifact_type: str | None
    stored_at: float
    last_pulled: float | None
    pulls: int
    stored_bytes: int | None
    referrer_types: tuple[str, ...]
    bundle_predicates: tuple[str, ...]
    referrer_suffixes: tuple[str, ...]
    tags: tuple[Tag, ...] = ()


@dataclass(frozen=True, slots=True)
class ListedTag:
    """A tag. `pushed`: when the tag was last pushed. `pushed_by`: name of the account that pointed the tag at its
    manifest; None: not recorded."""

    name: Tag
    pushed: float
    pushed_by: str | None
    manifest: ManifestFacts


@dataclass(frozen=True, slots=True)
class TagPage:
    """A page of a list. `next_after`: where the next page begins; None: this is the last page.

    `order`: the order of the list. It differs from the order in the query only in one case: a list for SIZE is sorted
    by NAME if more than MAX_SORTED_BY_SIZE tags match, or if their trees have more than MAX_READ_MANIFESTS
    manifests."""

    items: Sequence[ListedTag]
    order: TagOrder
    next_after: TagCursor | None = None


class TagListing(Protocol):
    """Lists tags with facts about their manifests. All methods read in a thread, and raise NameUnknown for a repository
    that never had content."""

    async def page(self, repo: RepositoryName, query: TagQuery, after: TagCursor | None, limit: int) -> TagPage:
        """Returns a page of at most `limit` tags; `limit` must not be larger than MAX_PAGE_TAGS. `after`:
        `TagPage.next_after` of the previous page; None: the first page. A tag that is pushed or deleted between the
        reads of two pages can be on both pages or on neither."""
        ...

    async def tag(self, repo: RepositoryName, tag: Tag) -> ListedTag:
        """Returns one tag. Raises ManifestUnknown if there is no such tag."""
        ...

    async def manifest(self, repo: RepositoryName, digest: Digest) -> ManifestFacts:
        """Returns the facts about a manifest, with its tags. Raises ManifestUnknown."""
        ...

    async def stored_sizes(
        self, repo: RepositoryName, manifests: Collection[Digest], blobs: Collection[Digest] = ()
    ) -> Mapping[Digest, int]:
        """Returns the sizes in bytes, by digest, of those `manifests` and `blobs` that the repository has. Leaves out
        damaged content."""
        ...
