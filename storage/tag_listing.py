"""The interface that lists the tags of a repository with facts from the metadata (`TagListing`), such as who pushed a
tag and when its manifest was last pulled.

A *referrer* of a manifest is a manifest whose `subject` field has the digest of that manifest. A *referrer tag* belongs
to the manifest whose digest its name contains; older versions of cosign store signatures under tags like
`sha256-….sig`. The *tree* of a manifest consists of the manifest and, for an index, of the stored manifests that it
lists, directly or through other indexes. The methods take the name of a repository in the store; for a mirrored
repository, this name begins with the name of its upstream registry. Times are in seconds since 1970.
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
"""Largest number of manifests that a call reads in one tree. A larger tree counts as too large to add up."""
MAX_READ_MANIFESTS: Final = 20_000
"""Largest number of manifests that a call reads in all trees together. Trees beyond this limit count as too large to
add up."""
MAX_TAGS_OF_MANIFEST: Final = 100
"""Largest number of tags of one manifest in `ManifestFacts.tags`."""

BUNDLE_TYPE_PREFIX: Final = "application/vnd.dev.sigstore.bundle"
"""Artifact types of Sigstore bundles begin with this. cosign 3 writes a bundle for signatures and for attestations."""
BUNDLE_PREDICATE: Final = "dev.sigstore.bundle.predicateType"
"""The annotation in which the manifest of a Sigstore bundle states the bundle's predicate type: the kind of claim that
the bundle makes about an image, such as how it was built."""

UNKNOWN_PREDICATE: Final = "unknown"
"""Stands for the predicate type of a bundle whose annotations are too long to be read."""


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
    """The tags to list, and their order. `text`: only tags whose name contains this text are listed, ignoring case.
    `is_descending`: whether the order is reversed. `includes_referrer_tags`: whether referrer tags are listed as
    well."""

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
    - `stored`: the recorded time of the manifest's last push to the repository; in a mirror, the time at which the
      manifest was stored. A push within a minute after the recorded time does not change it. So the true last push may
      be up to a minute later.
    - `last_pulled`: when a manifest of the tree was last pulled; None: no pull is recorded.
    - `pulls`: total number of pulls of the manifests of the tree.
    - `stored_bytes`: size in bytes of the stored blobs of the tree, each counted once; None: the tree is too large to
      add up.
    - `referrer_types`: the artifact types of the referrers, at most 20.
    - `bundle_predicates`: the different predicate types of the Sigstore bundles among the referrers, from the
      annotation `BUNDLE_PREDICATE`; an empty text for a bundle without this annotation. At most 20 bundles are read.
    - `referrer_suffixes`: the texts after the digest in the names of the referrer tags, such as `.sig`; at most 20.
    - `tags`: the tags that point at the manifest, sorted, at most MAX_TAGS_OF_MANIFEST."""

    digest: Digest
    media_type: str
    size: int
    artifact_type: str | None
    stored: float
    last_pulled: float | None
    pulls: int
    stored_bytes: int | None
    referrer_types: tuple[str, ...]
    bundle_predicates: tuple[str, ...]
    referrer_suffixes: tuple[str, ...]
    tags: tuple[Tag, ...] = ()


@dataclass(frozen=True, slots=True)
class ListedTag:
    """A tag. `pushed`: when it was last pushed. `pushed_by`: name of the account that pointed it at its manifest; None:
    not recorded."""

    name: Tag
    pushed: float
    pushed_by: str | None
    manifest: ManifestFacts


@dataclass(frozen=True, slots=True)
class TagPage:
    """A page of a list. `order`: the order of the list. This is the order in the query, with one exception: a list that
    should be sorted by SIZE is sorted by NAME if more than MAX_SORTED_BY_SIZE tags match, or if their trees have more
    than MAX_READ_MANIFESTS manifests. `next_after`: where the next page begins; None: this is the last page."""

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
        """Returns the sizes in bytes, by digest, of those `manifests` and `blobs` that the repository has and that are
        not damaged. A mirror may lack content that its manifests refer to."""
        ...
