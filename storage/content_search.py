"""The interfaces of the search: `ContentSearch` finds stored content, `SearchIndex` updates the search index. In this
module, *index* means the search index; the manifest that lists the images of several platforms is an *image index*.

A search finds only content in a set of repositories. The caller passes the set of repositories that a person may see.
Content outside of the set has no influence on the result, with one exception: if the set is large and very many
entries outside of it match, a search may miss entries of the set.

A push does not write to the index. The index is updated afterwards, so a search finds pushed content after about a
second. After a deletion, no search finds the deleted content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

from storage.names import Digest, RepositoryName, Tag
from storage.patterns import NameSet

T = TypeVar("T")
MAX_WORDS: Final = 8
"""Largest number of words of a search; further words are ignored."""
MAX_WORD_CHARACTERS: Final = 128
"""Largest number of characters of a word; a longer word is cut."""
MIN_HEX_DIGITS: Final = 6
"""Smallest number of hexadecimal digits by which a digest is searched for."""
MAX_OFFSET: Final = 500
"""The largest offset of a page: a search shows no more than about this number of entries of each kind."""
MAX_TEXT_CHARACTERS: Final = 8192
"""Largest size of the labels and annotations of one manifest in the index; further ones are left out."""
MAX_VALUE_CHARACTERS: Final = 1024
"""Largest size of the value of one label or annotation in the index; a longer value is cut."""


@dataclass(frozen=True, slots=True)
class SearchPage(Generic[T]):
    """A page of search results. `more`: whether more entries follow this page.

    `is_complete`: False if the search has stopped at the limit of entries that one search may read, so that it may have
    missed some entries. This happens if very many entries match. For a search in a large set of repositories, except
    the set of all, it is always False. Such a search also reads entries outside of the set, about which the client must
    learn nothing. True would tell the client that few of them match."""

    items: Sequence[T]
    more: bool = False
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class TagMatch:
    """A tag, the digest that it points at, and the time at which it was last moved (`updated`), in seconds since
    1970."""

    repository: RepositoryName
    tag: Tag
    digest: Digest
    updated: float


@dataclass(frozen=True, slots=True)
class LabelsMatch:
    """A manifest with labels or annotations that match. `labels`: the labels and annotations that contain a word of the
    search; long values are cut. `tag`: a tag that points at the manifest, or at an image index that lists the manifest;
    None: there is none."""

    repository: RepositoryName
    digest: Digest
    tag: Tag | None
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DigestMatch:
    """A manifest or blob of a repository. `tag`: a tag that points at the manifest; None: there is none."""

    repository: RepositoryName
    digest: Digest
    is_manifest: bool
    tag: Tag | None = None


def search_words(text: str) -> list[str]:
    """Returns the words of a search in lower case."""
    return [word[:MAX_WORD_CHARACTERS] for word in text.lower().split()[:MAX_WORDS]]


class ContentSearch(Protocol):
    """Finds stored content. `within`: the repositories to search, by their names in the store (the name of a mirrored
    repository begins with its upstream). `offset`: the number of entries before the page, at most `MAX_OFFSET`. A
    search stops at a limit of rows or of time, and its page is then not complete. So its work is limited, whatever is
    stored and whatever patterns `within` has. All methods raise StorageFailed, and StorageFull, because on a full disk
    even a search can fail."""

    async def repositories(
        self, words: Sequence[str], within: NameSet, offset: int, limit: int
    ) -> SearchPage[RepositoryName]:
        """Finds the repositories that have manifests and whose names contain all `words`. The first of `words`
        determines the order: names that begin with it come first, then names whose last part (after the last slash) is
        equal to it, then names with a part that begins with it, and then the others. A single word of one character
        finds only names that begin with it, and a single word of two characters only names with a part that begins with
        it."""
        ...

    async def tags(self, words: Sequence[str], within: NameSet, offset: int, limit: int) -> SearchPage[TagMatch]:
        """Finds the tags with a part that begins with the last of `words`. A part of a tag is the whole tag, or the
        text after a '-' or '_' in the tag. The other `words` must occur in the tag or in the name of its repository. An
        entry of `words` with a colon, such as `app:1.2`, counts as two words."""
        ...

    async def labels(self, words: Sequence[str], within: NameSet, offset: int, limit: int) -> SearchPage[LabelsMatch]:
        """Finds the manifests whose labels and annotations contain all `words`, as whole words; newest first. Matching
        manifests of a repository with the same `LabelsMatch.tag` are one entry, for example those of one image with
        several platforms. An entry of `words` with punctuation, such as `git.example.com/team/app`, is split into
        several words. If this gives very many words, only the first ones count."""
        ...

    async def digests(self, digest: str, within: NameSet, offset: int, limit: int) -> SearchPage[DigestMatch]:
        """Finds the manifests, and the blobs of manifests, whose digests begin with `digest`: `sha256:12ab…`, or only
        the hexadecimal digits. Finds nothing for fewer than `MIN_HEX_DIGITS` digits."""
        ...

    async def tags_of(self, repo: RepositoryName, limit: int) -> list[tuple[Tag, Digest]]:
        """Returns the first `limit` tags of a repository, with the digests that they point at. Raises NameUnknown."""
        ...

    async def is_indexing(self) -> bool:
        """Returns whether much of the content is not in the index yet."""
        ...


@dataclass(frozen=True, slots=True)
class UnindexedManifest:
    """A manifest that is not in the index yet, or that is *incomplete*: the index does not have all of its labels
    (`IncompleteManifestPage`). `annotations`: its annotations, as JSON in UTF-8; None: it has none or too many.
    `config`: the digest of its config, which may have labels; None: it has none. `is_damaged`: its body, which names
    the config, is known to be damaged."""

    id: int
    repository: RepositoryName
    digest: Digest
    annotations: bytes | None
    config: Digest | None
    is_damaged: bool = False


@dataclass(frozen=True, slots=True)
class ManifestLabels:
    """The labels and annotations of a manifest, for the index. `text`: the labels and annotations, one per line.
    `missing_config`: the digest of a config that could not be read; None: none is missing."""

    manifest: UnindexedManifest
    text: str
    missing_config: Digest | None


@dataclass(frozen=True, slots=True)
class ManifestBatch:
    """Some manifests that are not in the index. `start` and `end`: positions before and after these manifests, in a
    form that only the index understands. `is_full`: whether the batch has reached its limit, so that more manifests
    may be left."""

    manifests: Sequence[UnindexedManifest]
    start: tuple[int, int]
    end: tuple[int, int]
    is_full: bool


@dataclass(frozen=True, slots=True)
class IncompleteManifestPage:
    """A page of *incomplete manifests*: the index does not have all labels of these manifests, because the labels could
    not be read. They may be readable now. `last`: where the next page begins, in a form that only the index
    understands; None: this page is the last one."""

    manifests: Sequence[UnindexedManifest]
    last: tuple[str, int] | None


class SearchIndex(Protocol):
    """Keeps the index up to date. Only one process at a time may change it. Changes are short transactions, except
    `rebuild`. All methods raise StorageFailed (SearchIndexDamaged if the database is damaged). Methods that make
    changes also raise StorageFull."""

    def has_unindexed(self) -> bool:
        """Returns whether there is content that is not in the index. Takes microseconds."""
        ...

    async def index_names(self) -> bool:
        """Adds some of the repositories and tags that are not in the index, and removes deleted tags. Returns whether
        more may be left."""
        ...

    async def unindexed_manifests(self) -> ManifestBatch:
        """Returns some of the manifests that are not in the index, and of those whose config was missing when they were
        indexed and has been stored since. If nothing is left to read, `start` and `end` of the batch are equal."""
        ...

    async def add_manifests(self, batch: ManifestBatch, labels: Sequence[ManifestLabels]) -> None:
        """Adds the manifests of `batch`. Leaves out manifests that were deleted meanwhile."""
        ...

    async def incomplete_manifests(self, after: tuple[str, int] | None) -> IncompleteManifestPage:
        """Returns a page of the incomplete manifests: they were damaged, or their config could not be read. Leaves out
        those that certainly cannot be read yet. `after`: the `last` of the previous page; None: returns the first
        page."""
        ...

    async def replace_labels(self, labels: Sequence[ManifestLabels]) -> None:
        """Stores the labels of incomplete manifests, which are in the index already, but without all labels. Leaves out
        manifests that were deleted meanwhile."""
        ...

    async def rebuild(self) -> None:
        """Drops the index, even if it is damaged, and creates an empty index. All content is then unindexed. Takes
        seconds for a large index, and other changes wait meanwhile."""
        ...
