"""One item that garbage collection removes (`Removal`), and the totals of a round (`CollectionReport`). A *round* is
one run of garbage collection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum


class RemovalKind(StrEnum):
    """The kind of a removed item.

    - `UPLOAD`: an upload session.
    - `PARTIAL`: a partial blob, the received bytes of an unfinished download from an upstream registry.
    - `MANIFEST`: a deleted manifest. Until its removal, it can be put back.
    - `LINK`: a repository's link to a blob.
    - `BLOB`: a blob without links.
    - `STRAY`: bytes for which the database has no row.
    - `TRASH`: bytes whose disk space an interrupted round did not free when it removed them."""

    UPLOAD = "upload"
    PARTIAL = "partial"
    MANIFEST = "manifest"
    LINK = "link"
    BLOB = "blob"
    STRAY = "stray"
    TRASH = "trash"


@dataclass(frozen=True, slots=True)
class Removal:
    """One item that was removed, or that a dry run would remove. `repository` is empty if the item belongs to none.
    `item` is a digest, or the id of an upload session. `size` is the number of freed bytes, 0 for a link. `reason` is a
    text for people."""

    kind: RemovalKind
    repository: str
    item: str
    size: int
    reason: str


OnRemoval = Callable[[Removal], Awaitable[None]]
"""Called after each removal. An error that it raises ends the round."""


@dataclass(slots=True)
class CollectionReport:
    """The result of one round: the number of removed items of each kind (`counts`), and the freed bytes (`sizes`). The
    report of a dry run has the numbers that a real round would have. An empty report is false."""

    counts: dict[RemovalKind, int] = field(default_factory=dict)
    sizes: dict[RemovalKind, int] = field(default_factory=dict)

    def add(self, removal: Removal) -> None:
        """Counts a removal."""
        self.counts[removal.kind] = self.counts.get(removal.kind, 0) + 1
        self.sizes[removal.kind] = self.sizes.get(removal.kind, 0) + removal.size

    def count(self, kind: RemovalKind) -> int:
        """Returns the number of removed items of the kind."""
        return self.counts.get(kind, 0)

    @property
    def links(self) -> int:
        """Number of removed links."""
        return self.count(RemovalKind.LINK)

    @property
    def blobs(self) -> int:
        """Number of removed blobs."""
        return self.count(RemovalKind.BLOB)

    @property
    def partials(self) -> int:
        """Number of removed partial blobs."""
        return self.count(RemovalKind.PARTIAL)

    @property
    def strays(self) -> int:
        """Number of removed strays."""
        return self.count(RemovalKind.STRAY)

    @property
    def freed_bytes(self) -> int:
        """Total number of freed bytes."""
        return sum(self.sizes.values())

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """Returns text such as `blob: 2, link: 3`."""
        return ", ".join(f"{kind}: {count}" for kind, count in self.counts.items())
