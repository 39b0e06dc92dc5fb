"""The removals of garbage collection: a single one (`Removal`), and the totals of a round (`CollectionReport`).

A *round* is one run of garbage collection. A *partial blob* has the received bytes of an unfinished download from an
upstream registry."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum


class RemovalKind(StrEnum):
    """The kind of a removed item: an upload session, a partial blob, a deleted manifest (until its removal, it can be
    put back), a repository's link to a blob, a blob, or a stray (bytes for which the database has no row). `TRASH`:
    bytes that an interrupted round had removed without freeing their disk space."""

    UPLOAD = "upload"
    PARTIAL = "partial"
    MANIFEST = "manifest"
    LINK = "link"
    BLOB = "blob"
    STRAY = "stray"
    TRASH = "trash"


@dataclass(frozen=True, slots=True)
class Removal:
    """One item that was removed, or that a dry run would remove. `repository`: the item's repository; empty if it
    belongs to none. `item`: the item's digest, or the id of an upload session. `size`: number of bytes that the removal
    frees. The removal of a link frees no bytes; the removal of the blob, after its last link is removed, does.
    `reason`: why the item was removed, for people."""

    kind: RemovalKind
    repository: str
    item: str
    size: int
    reason: str


OnRemoval = Callable[[Removal], Awaitable[None]]
"""Called after each removal. An error that it raises ends the round."""


@dataclass(slots=True)
class CollectionReport:
    """The number of items of each kind that one round removed (`counts`), and the bytes that this freed (`sizes`).
    After a dry run, the numbers are those of a real round. `bool(report)` is False if `counts` is empty."""

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
        """Returns the counts as text, such as `blob: 2, link: 3`."""
        return ", ".join(f"{kind}: {count}" for kind, count in self.counts.items())
