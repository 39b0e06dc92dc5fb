"""The results of garbage collection: each removed item (`Removal`), and the totals of one round (`CollectionReport`). A
*round* is one run of garbage collection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum


class RemovalKind(StrEnum):
    """The kind of a removed item.

    - `UPLOAD`: an upload session.
    - `PARTIAL`: a partial blob, the received bytes of an unfinished download from an upstream registry.
    - `MANIFEST`: a manifest that was deleted earlier, and that could be restored until its removal.
    - `LINK`: a repository's link to a blob.
    - `BLOB`: a blob without links.
    - `STRAY`: bytes for which the database has no row.
    - `TRASH`: bytes of blobs that an earlier, interrupted round removed without freeing their disk space."""

    UPLOAD = "upload"
    PARTIAL = "partial"
    MANIFEST = "manifest"
    LINK = "link"
    BLOB = "blob"
    STRAY = "stray"
    TRASH = "trash"


@dataclass(frozen=True, slots=True)
class Removal:
    """One item that a round has removed. In a dry run, an item that a real round would remove.

    - `repository`: the repository of the item; empty if the item belongs to no repository.
    - `item`: a digest; for `UPLOAD`, the id of the upload session; for `TRASH`, empty.
    - `size`: the number of freed bytes; 0 for a link.
    - `reason`: why the item is removed, as a text for people."""

    kind: RemovalKind
    repository: str
    item: str
    size: int
    reason: str


OnRemoval = Callable[[Removal], Awaitable[None]]
"""A function that the collector calls after each removal. If the function raises an error, the round ends."""


@dataclass(slots=True)
class CollectionReport:
    """The result of one round: for each kind, the number of removed items (`counts`) and the freed bytes (`sizes`). The
    report of a dry run has the numbers that a real round would have. `bool` of a report is False if nothing was
    removed."""

    counts: dict[RemovalKind, int] = field(default_factory=dict)
    sizes: dict[RemovalKind, int] = field(default_factory=dict)

    def add(self, removal: Removal) -> None:
        """Adds a removal to the totals."""
        self.counts[removal.kind] = self.counts.get(removal.kind, 0) + 1
        self.sizes[removal.kind] = self.sizes.get(removal.kind, 0) + removal.size

    def count_of(self, kind: RemovalKind) -> int:
        """Returns the number of removed items of the kind."""
        return self.counts.get(kind, 0)

    @property
    def links(self) -> int:
        """Number of removed links."""
        return self.count_of(RemovalKind.LINK)

    @property
    def blobs(self) -> int:
        """Number of removed blobs."""
        return self.count_of(RemovalKind.BLOB)

    @property
    def partials(self) -> int:
        """Number of removed partial blobs."""
        return self.count_of(RemovalKind.PARTIAL)

    @property
    def strays(self) -> int:
        """Number of removed strays."""
        return self.count_of(RemovalKind.STRAY)

    @property
    def freed_bytes(self) -> int:
        """Total number of freed bytes."""
        return sum(self.sizes.values())

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        """Returns the numbers of removed items as text, such as `blob: 2, link: 3`."""
        return ", ".join(f"{kind}: {count}" for kind, count in self.counts.items())
