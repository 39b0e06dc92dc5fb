"""The interfaces of the search: `ContentSearch` finds stored content, `SearchIndex` updates the search index. In this
module, *index* means the search index; the manifest that lists the images of several platforms is an *image index*.

A search finds only content in a set of repositories: those that the searching person may see. The caller passes the
set. Content outside of the set has no influence on the result, with one exception: if the set is large and very many
entries outside of the set match, a search may miss entries of the set.

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
"""The largest offset of a page. So a search shows only about this number of entries of each kind."""
MAX_TEXT_CHARACTERS: Final = 8192
"""Largest total size of the labels and annotations that the index stores for one manifest; it leaves out the rest."""
MAX_VALUE_CHARACTERS: Final = 1024
"""Largest size of the value of one label or annotation in the index; the index cuts a longer value."""


@dataclass(frozen=True, slots=True)
class SearchPage(Generic[T]):
    """A page of search results. `more`: whether more entries follow this page.

    `is_complete`: False if the search may have missed some entries, because it stopped at a limit of rows or time. This
    happens if very many entries match. A search in a large set of repositories also reads entries outside of the set,
    unless the set has all repositories. The `is_complete` of such a search is always False: the value True would reveal
    to the client that few of these hidden entries match."""

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
    entries before the page, at most `MAX_OFFSET`. A search that reaches a limit of rows or time stops, and its page is
    not complete. All methods raise StorageFailed, and on a full disk StorageFull."""

    async def repositories(
        self, words: Sequence[str], within: NameSet, offset: int, limit: int
    ) -> SearchPage[RepositoryName]:
        """Finds the repositories that have manifests and whose names contain all `words`. A single word of one
        character finds only names that begin with it. A single word of two characters finds only names with a part
        (between slashes) that begins with it. The first word determines the order:

        1. names that begin with the word;
        2. names whose last part is equal to the word;
        3. names with a part that begins with the word;
        4. all other names."""
        ...

    async def tags(self, words: Sequence[str], within: NameSet, offset: int, limit: int) -> SearchPage[TagMatch]:
        """Finds tags. The tag, or the text after a '-' or '_' in the tag, must begin with the last word. Each other
        word must occur in the tag or in the name of its repository. An entry of `words` with a colon, such as
        `app:1.2`, counts as two words."""
        ...

    async def labels(self, words: Sequence[str], within: NameSet, offset: int, limit: int) -> SearchPage[LabelsMatch]:
        """Finds the manifests whose labels and annotations contain all `words`, as whole words; newest first. If
        several matching manifests of a repository have the same `LabelsMatch.tag` (not None), such as the images of an
        image index, the page has one entry for them. An entry of `words` with punctuation, such as
        `git.example.com/team/app`, is split into several words. If the split gives very many words, only the first ones
        count."""
        ...

    async def digests(self, digest: str, within: NameSet, offset: int, limit: int) -> SearchPage[DigestMatch]:
        """Finds the manifests, and the blobs of manifests, whose digests begin with `digest`. `digest`: the beginning
        of a digest, such as `sha256:12ab34`, or only of its hexadecimal digits. Finds nothing for fewer than
        `MIN_HEX_DIGITS` digits."""
        ...

    async def tags_of(self, repo: RepositoryName, limit: int) -> list[tuple[Tag, Digest]]:
        """Returns the first `limit` tags of a repository, with the digests that they point at. Raises NameUnknown."""
        ...

    async def is_indexing(self) -> bool:
        """Returns whether much of the content is not in the index yet."""
        ...


@dataclass(frozen=True, slots=True)
class UnindexedManifest:
    """A manifest that is not in the index yet, or that is *incomplete*: the index does not have all of its labels,
    because they could not be read. `annotations`: its annotations, as JSON in UTF-8; None if it has no annotations or
    they are too large. `config`: the digest of its config, which may have labels; None if no config is known.
    `is_damaged`: whether its body, which names the config, is known to be damaged."""

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

    manifest: UnindexedManifest
    text: str
    missing_config: Digest | None


@dataclass(frozen=True, slots=True)
class ManifestBatch:
    """A batch of manifests to add to the index. `start` and `end`: positions before and after these manifests, in a
    form that only the index understands. `is_full`: whether more manifests may be left."""

    manifests: Sequence[UnindexedManifest]
    start: tuple[int, int]
    end: tuple[int, int]
    is_full: bool


@dataclass(frozen=True, slots=True)
class IncompleteManifestPage:
    """A page of incomplete manifests (`UnindexedManifest`) whose labels may be readable now. `last`: the position where
    the next page begins, in a form that only the index understands; None: this page is the last one."""

    manifests: Sequence[UnindexedManifest]
    last: tuple[str, int] | None


class SearchIndex(Protocol):
    """Reads and updates the index. Only one process at a time may change the index. Changes are short transactions,
    except `rebuild`. All methods raise StorageFailed (SearchIndexDamaged if the database is damaged) and
    StorageFull."""

    def has_unindexed(self) -> bool:
        """Returns whether there is content that is not in the index. Takes microseconds."""
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
        """Adds the manifests of `batch`. Leaves out manifests that were deleted meanwhile."""
        ...

    async def incomplete_manifests(self, after: tuple[str, int] | None) -> IncompleteManifestPage:
        """Returns a page of the incomplete manifests. Leaves out manifests that are still damaged, and manifests whose
        config is still missing or damaged. `after`: the `last` of the previous page; None: returns the first page."""
        ...

    async def replace_labels(self, labels: Sequence[ManifestLabels]) -> None:
        """Replaces the labels of incomplete manifests in the index. Leaves out manifests that were deleted
        meanwhile."""
        ...

    async def rebuild(self) -> None:
        """Drops the index, even if it is damaged, and creates an empty index. All content is then unindexed. Takes
        seconds for a large index. All other changes of the database wait meanwhile."""
        ...
