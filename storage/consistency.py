"""The interface for checks that the tables of the metadata store agree with each other (`Consistency`), and the
problems that a check of the whole store finds (`Problem`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from storage.names import Digest

Key = tuple[int | str, ...]
"""Identifies a row of the metadata store, in a form that only this store can interpret."""


class ProblemCode(StrEnum):
    """The kinds of problems that a check can find. Programs may rely on these texts.

    A *link* is a row that lets a repository serve a blob. `BLOB_PLACE`: the row of a blob has no place
    (`BlobRecord.place`), although the blob is not recorded as damaged. `BLOB_FILE_FORBIDDEN`: the process has no
    permission to read the file of a blob, or to list the files in a directory. `BLOB_NOT_QUEUED`, `LINK_NOT_QUEUED`: a
    blob or link that nothing refers to is missing in the queue of the garbage collection, so it would never be removed.
    `STRAY`: the blob store has bytes under a digest that no blob row has. `REPOSITORY_COUNT`: the stored number of a
    repository's manifests is wrong. `USAGE_LINKS`: the stored number of links to a blob is wrong for a *usage scope* (a
    set of repositories with a quota, or the mirrored content of an upstream). `USAGE_TOTALS`: the stored number of
    blobs, bytes or tags of a usage scope is wrong."""

    DATABASE = "database-damaged"
    SEARCH_INDEX = "search-index-damaged"
    BLOB_FILE_MISSING = "blob-bytes-missing"
    BLOB_FILE_SIZE = "blob-size-wrong"
    BLOB_FILE_DIGEST = "blob-digest-wrong"
    BLOB_FILE_FORBIDDEN = "blob-unreadable"
    BLOB_PLACE = "blob-without-place"
    BLOB_NOT_QUEUED = "blob-not-queued"
    STRAY = "stray"
    LINK_WITHOUT_BLOB = "link-without-blob"
    LINK_WITHOUT_REPOSITORY = "link-without-repository"
    LINK_NOT_QUEUED = "link-not-queued"
    MANIFEST_WITHOUT_REPOSITORY = "manifest-without-repository"
    MANIFEST_DIGEST = "manifest-digest-wrong"
    MANIFEST_FIELDS = "manifest-fields-wrong"
    MANIFEST_REFERENCES = "manifest-references-wrong"
    MANIFEST_BLOB_MISSING = "manifest-blob-missing"
    INDEX_CHILD_MISSING = "index-child-missing"
    REFERENCE_WITHOUT_MANIFEST = "reference-without-manifest"
    TAG_WITHOUT_REPOSITORY = "tag-without-repository"
    TAG_WITHOUT_MANIFEST = "tag-without-manifest"
    REPOSITORY_COUNT = "repository-count-wrong"
    USAGE_LINKS = "usage-links-wrong"
    USAGE_TOTALS = "usage-totals-wrong"


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in a store. `repository`: the name of the repository with the problem, or empty. `item`: the digest or
    tag with the problem, or empty. `text`: what is wrong and what to do, for people. `area` and `key`: where in the
    metadata store the problem is; both are empty for a problem that is not in the metadata store."""

    code: ProblemCode
    text: str
    repository: str = ""
    item: str = ""
    area: str = ""
    key: Key = ()


@dataclass(frozen=True, slots=True)
class CheckedPage:
    """The result of a check of some rows of an area: the number of rows, their problems, and the key of the last row
    (`last`). If `last` is None, the area has no further rows. If `last` is a key, further rows may follow; if none do,
    the next page is empty."""

    rows: int
    problems: Sequence[Problem]
    last: Key | None


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """A blob as the metadata store records it. `size`: in bytes. `place`: the key of its bytes in the blob store; empty
    while the blob is known to be damaged or missing."""

    id: int
    digest: Digest
    size: int
    place: str


class Consistency(Protocol):
    """Checks and repairs the metadata store while other processes change it. Each `check` sees the store at one moment,
    so that a change at the same time causes no false alarm. All methods may raise StorageFailed; `repair` and
    `set_size` may also raise StorageFull."""

    areas: Sequence[str]
    """The parts of the metadata that `check` checks, in the order in which they should be checked and repaired."""

    async def count_rows(self) -> int:
        """Returns the approximate number of rows in all areas together."""
        ...

    async def check_database(self) -> list[Problem]:
        """Checks the database file itself. Returns problems of the kind DATABASE, and at most one problem of the kind
        SEARCH_INDEX. If there is one of the kind DATABASE, nothing else can be checked."""
        ...

    async def check(self, area: str, after: Key | None) -> CheckedPage:
        """Checks the next rows of an area: those that follow the key `after` (None: from the first on)."""
        ...

    async def confirm(self, problem: Problem) -> Problem | None:
        """Checks again the row of a problem that `check` found. Returns the problem as it is now; None if it does not
        exist any more."""
        ...

    async def repair(self, problem: Problem) -> str | None:
        """Repairs a problem that `check` found, or one of the kind SEARCH_INDEX, if the repair loses no content.
        Returns a text for people that says what was done; None if the problem cannot be repaired."""
        ...

    async def blobs(self, after: int, limit: int) -> list[BlobRecord]:
        """Returns at most `limit` blobs with an id above `after`, in the order of their ids."""
        ...

    async def blob(self, digest: Digest) -> BlobRecord | None:
        """Returns a blob; None if there is none with this digest."""
        ...

    async def set_size(self, digest: Digest, place: str, size: int) -> bool:
        """Corrects the size of a blob, in bytes. Returns False if its bytes are not at `place` any more. The caller
        holds the lock of the digest."""
        ...
