"""The interfaces of the search: `ContentSearch` finds stored content, `SearchIndex` updates the search index. In this
module, *index* means the search index; the manifest that lists the images of several platforms is an *image index*.

The caller passes the set of repositories to search: the repositories that the searching person may see. A search finds
only content in this set. If the set is large, and very many entries outside of the set match, a search may miss entries
in the set. Otherwise, content outside of the set has no influence on the result.

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
"""A search for a digest needs at least this number of hexadecimal digits."""
MAX_OFFSET: Final = 500
"""Largest offset of a page."""
MAX_TEXT_CHARACTERS: Final = 8192
"""Largest total size of the labels and annotations in the index for one manifest; the index leaves out the rest."""
MAX_VALUE_CHARACTERS: Final = 1024
"""Largest size of the value of one label or annotation in the index; the index cuts a longer value."""


@dataclass(frozen=True, slots=True)
class SearchPage(Generic[T]):
    """A page of search results. `more`: whether more entries follow this page.

    `is_complete`: False in two cases:

    - The search stopped at a limit of rows or time, so it may have missed entries.
    - The set of repositories is large but does not contain all repositories. Such a search also reads entries outside
      of the set, which are hidden from the client. If `is_complete` could be True here, True would reveal to the client
      that few hidden entries match."""

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
    search; long values are cut. `tag`: a tag that points at the manifest or at an image index that lists the manifest;
    None: there is no such tag."""

    repository: RepositoryName
    digest: Digest
    tag: Tag | None
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class DigestMatch:
    """A manifest or blob of a repository. `tag`: as in `LabelsMatch`; None for a blob."""

    repository: RepositoryName
    digest: Digest
    is_manifest: bool
    tag: Tag | None = None


def search_words(text: str) -> list[str]:
    """Returns the words of a search in lower case."""
    return [word[:MAX_WORD_CHARACTERS] for word in text.lower().split()[:MAX_WORDS]]


class ContentSearch(Protocol):
    """Finds stored content. `words`: the words of the search, in lower case. `within`: the repositories to search, by
    their names in the store (the name of a mirrored repository begins with its upstream). `offset`: the number of
    entries before the page, at most `MAX_OFFSET`. All methods raise StorageFailed, and on a full disk
    StorageFull."""

    async def find_repositories(
        self, words: Sequence[str], within: NameSet, offset: int, limit: int
    ) -> SearchPage[RepositoryName]:
        """Finds the repositories that have manifests and whose names contain all `words`. A *part* of
        a name is the text between two slashes. If `words` has only one word, and the word has one character, finds only
        names that begin with the word; if it has two characters, only names with a part that begins with the word. The
        first of the `words` determines the order of the result:

        1. names that begin with the word;
        2. names whose last part is equal to the word;
        3. names with a part that begins with the word;
        4. all other names."""
        ...

    async def find_tags(self, words: Sequence[str], within: NameSet, offset: int, limit: int) -> SearchPage[TagMatch]:
        """Finds tags. The tag, or the text after a '-' or '_' in the tag, must begin with the last word. Each other
        word must occur in the tag or in the name of its repository. An entry of `words` with a colon, such as
        `app:1.2`, counts as two words."""
        ...

    async def find_by_labels(
        self, words: Sequence[str], within: NameSet, offset: int, limit: int
    ) -> SearchPage[LabelsMatch]:
        """Finds the manifests whose labels and annotations contain all `words`, as whole words; newest
        first. If several of these manifests have the same repository and the same `LabelsMatch.tag`, finds only one of
        them. For example, the images of an image index have the same tag. Manifests whose `LabelsMatch.tag` is None are
        all found. An entry of `words` with punctuation, such as `git.example.com/team/app`, counts as several words; if
        it gives very many words, only the first ones count."""
        ...

    async def find_by_digest(self, prefix: str, within: NameSet, offset: int, limit: int) -> SearchPage[DigestMatch]:
        """Finds the manifests, and the blobs of manifests, whose digests begin with `prefix`: with or without the
        algorithm, such as `sha256:12ab34` or `12ab34`. Finds nothing for fewer than `MIN_HEX_DIGITS` hexadecimal
        digits."""
        ...

    async def first_tags(self, repo: RepositoryName, limit: int) -> list[tuple[Tag, Digest]]:
        """Returns the first `limit` tags of a repository, with the digests that they point at. Raises NameUnknown."""
        ...

    async def is_indexing(self) -> bool:
        """Returns whether much of the content is not in the index yet."""
        ...


@dataclass(frozen=True, slots=True)
class ManifestToIndex:
    """A manifest whose labels and annotations are to be indexed. Either the manifest is not in the index yet, or it is
    *incomplete*: the index does not have all labels of the manifest, because they could not be read.

    - `annotations`: the annotations of the manifest, as JSON in UTF-8; None if there are no annotations, or if they are
      too large.
    - `config`: the digest of the manifest's config; None if no config is known.
    - `is_damaged`: whether the manifest's body is known to be damaged."""

    id: int
    repository: RepositoryName
    digest: Digest
    annotations: bytes | None
    config: Digest | None
    is_damaged: bool = False


@dataclass(frozen=True, slots=True)
class ManifestLabels:
    """The labels and annotations of a manifest, for the index. `text`: the labels and annotations, one per line.
    `missing_config`: the digest of the manifest's config if the config could not be read; otherwise None."""

    manifest: ManifestToIndex
    text: str
    missing_config: Digest | None


@dataclass(frozen=True, slots=True)
class ManifestBatch:
    """A batch of manifests to add to the index. `start` and `end`: positions before and after these manifests, in a
    form that only the index understands. `is_full`: whether more manifests may be left."""

    manifests: Sequence[ManifestToIndex]
    start: tuple[int, int]
    end: tuple[int, int]
    is_full: bool


@dataclass(frozen=True, slots=True)
class IncompleteManifestPage:
    """A page of incomplete manifests (`ManifestToIndex`) whose labels may be readable now. `end`: the position after
    this page, in a form that only the index understands; None if this page is the last one."""

    manifests: Sequence[ManifestToIndex]
    end: tuple[str, int] | None


class SearchIndex(Protocol):
    """Reads and updates the index. Only one process at a time may change the index. Changes are short transactions,
    except `rebuild`. All methods raise StorageFailed (SearchIndexDamaged if the database is damaged) and
    StorageFull."""

    def has_unindexed(self) -> bool:
        """Returns whether some content is not in the index yet. Takes microseconds."""
        ...

    async def index_names(self) -> bool:
        """Adds some of the repositories and tags that are not in the index, and removes some deleted tags. Returns
        whether more of these changes may be left."""
        ...

    async def unindexed_manifests(self) -> ManifestBatch:
        """Returns some manifests to add: manifests that are not in the index, and indexed manifests whose config was
        missing and is stored now. If nothing is left to read, `start` and `end` of the batch are equal."""
        ...

    async def add_manifests(self, batch: ManifestBatch, labels: Sequence[ManifestLabels]) -> None:
        """Adds the manifests of `batch`. Leaves out manifests that have been deleted since they were read."""
        ...

    async def incomplete_manifests(self, after: tuple[str, int] | None) -> IncompleteManifestPage:
        """Returns a page of the incomplete manifests. Leaves out manifests that are still damaged, and manifests whose
        config is still missing or damaged. `after`: the `end` of the previous page; None for the first page."""
        ...

    async def replace_labels(self, labels: Sequence[ManifestLabels]) -> None:
        """Replaces the labels of incomplete manifests in the index. Leaves out manifests that have been deleted since
        they were read."""
        ...

    async def rebuild(self) -> None:
        """Drops the index, even if it is damaged, and creates an empty index. For a large index, this takes
        seconds, and other changes of the database wait."""
        ...
