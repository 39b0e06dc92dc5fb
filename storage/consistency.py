"""The interface that checks whether the tables of the metadata store agree with each other (`Consistency`), and the
problems that a check of the metadata store or the blob store can find (`Problem`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from storage.names import Digest

Key = tuple[int | str, ...]
"""Identifies a row of the metadata store, in a form that only this store can interpret."""


class ProblemCode(StrEnum):
    """The kinds of problems that a check can find. Programs may rely on the values. A *link* is a row that lets a
    repository serve a blob. A *usage scope* is a set of repositories with a quota, or the mirrored content of an
    upstream.

    - `BLOB_FILE_FORBIDDEN`: the process may not read the file of a blob, or may not list a directory of the blob store.
    - `BLOB_PLACE`: the row of a blob has no place (`BlobRecord.place`), but the blob is not recorded as damaged.
    - `BLOB_NOT_QUEUED`: a blob has no links, but the garbage collector's queue lacks the blob.
    - `LINK_NOT_QUEUED`: no manifest of the repository refers to the linked blob, but the garbage collector's queue
      lacks the link.
    - `STRAY`: the blob store has bytes under a digest that no blob row has.
    - `REPOSITORY_COUNT`: the stored number of a repository's manifests is wrong.
    - `USAGE_LINKS`: for a usage scope, the stored number of links to a blob is wrong.
    - `USAGE_TOTALS`: for a usage scope, the stored number of blobs, bytes or tags is wrong."""

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
    """A problem in the metadata store or the blob store.

    - `text`: tells people what is wrong and what to do.
    - `repository`: the name of the repository with the problem, or empty.
    - `item`: the digest or tag with the problem, or empty.
    - `area` (`Consistency.areas`) and `key`: the row with the problem; both are empty if the problem is not in a row of
      the metadata store."""

    code: ProblemCode
    text: str
    repository: str = ""
    item: str = ""
    area: str = ""
    key: Key = ()


@dataclass(frozen=True, slots=True)
class CheckedPage:
    """The result of a check of some rows of an area (`Consistency.areas`). `rows`: number of checked rows. `last`: the
    key of the last checked row; None if this is the last page. The last page can have no rows."""

    rows: int
    problems: Sequence[Problem]
    last: Key | None


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """A blob as the metadata store records it. `size`: in bytes. `place`: the key of its bytes in the blob store; empty
    if the blob is recorded as damaged."""

    id: int
    digest: Digest
    size: int
    place: str


class Consistency(Protocol):
    """Checks and repairs the metadata store while other processes change it. Each call of `check` sees the state of the
    store at one moment, so that other changes cause no false alarm. All methods may raise StorageFailed. `repair` and
    `set_size` may raise StorageFull as well."""

    areas: Sequence[str]
    """The parts of the metadata that `check` checks, in the order in which they should be checked and repaired."""

    async def count_rows(self) -> int:
        """Returns the approximate number of rows in all areas together."""
        ...

    async def check_database(self) -> list[Problem]:
        """Checks the database file. Returns DATABASE problems, and at most one SEARCH_INDEX problem. After a DATABASE
        problem, the other checks are not possible."""
        ...

    async def check(self, area: str, after: Key | None) -> CheckedPage:
        """Checks the next rows of an area: the rows after the key `after`, or the first rows if `after` is None."""
        ...

    async def recheck(self, problem: Problem) -> Problem | None:
        """Checks the row of a problem again. `problem`: a problem that `check` found. Returns the problem as it is now;
        None if the problem does not exist any more."""
        ...

    async def repair(self, problem: Problem) -> str | None:
        """Repairs a problem, if the repair loses no content. `problem`: a problem that `check` found, or a SEARCH_INDEX
        problem. Returns a text that tells people what was done; None if the problem cannot be repaired."""
        ...

    async def list_blobs(self, after: int, limit: int) -> list[BlobRecord]:
        """Returns at most `limit` blobs with an id above `after`, in the order of their ids."""
        ...

    async def find_blob(self, digest: Digest) -> BlobRecord | None:
        """Returns the record of a blob; None if there is no blob with this digest."""
        ...

    async def set_size(self, digest: Digest, place: str, size: int) -> bool:
        """Sets the recorded size of a blob to `size` bytes. Changes nothing and returns False if the place of the
        blob is not `place` any more. The caller must hold the lock of the digest."""
        ...
