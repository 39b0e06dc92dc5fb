"""The interface of the records of damaged content, and of the rounds of *scrub* that look for it (`DamageRecords`).

Scrub reads all stored content again and hashes it, because disks can lose or change bytes without reporting an error.
Content is *damaged* if its stored bytes no longer have its digest, or are missing. A damaged blob keeps its row and its
links (the rights of repositories to serve it). But the row then has no place (key of the bytes in the blob store), so
that no repository serves the blob. A damaged blob is *healed* when its right bytes are stored again, by a client that
pushes the image or by the mirror. A damaged manifest also keeps its row, but its body is moved from the row to the
record of the damage. It is healed in the same way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.content import Actor, Page
from storage.names import Digest, RepositoryName

UPKEEP_ACTOR = Actor(name="upkeep")
"""The actor that the audit log names for damage, and for content that is healed."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob to check. `row_id`: id of its row; ids grow with time. `place`: key of its bytes in the blob store."""

    row_id: int
    digest: Digest
    size: int
    place: str


@dataclass(frozen=True, slots=True)
class DamagedBlob:
    """A damaged blob. `found`: when the damage was found, in seconds since 1970. `reason`: what is wrong with the
    bytes, for people. `former_place`: the blob's place before it was marked as damaged; empty if it had none.
    `quarantine_place`: the key of the damaged bytes in the *quarantine*, the part of the blob store that keeps damaged
    bytes; empty if there were no bytes. The bytes may have been deleted there since. `repositories`: some of the
    repositories that have the blob."""

    digest: Digest
    size: int
    found: float
    reason: str
    quarantine_place: str
    former_place: str
    repositories: Sequence[RepositoryName]


@dataclass(frozen=True, slots=True)
class DamagedManifest:
    """A damaged manifest of a repository. `found` and `reason`: as for a blob."""

    repository: RepositoryName
    digest: Digest
    found: float
    reason: str


@dataclass(frozen=True, slots=True)
class ManifestCheck:
    """The outcome of a check of some manifests. `last`: the row id of the last one; `count`: number of checked
    manifests; `size`: number of bytes that were read; `damaged_rows`: row ids of the manifests whose body does not
    have the digest."""

    last: int
    count: int
    size: int
    damaged_rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class ScrubRound:
    """One round through all content. Times are in seconds since 1970; `ended` is None while the round is not complete.
    The round checks all blobs with row ids up to `until_blob`, and all manifests with row ids up to `until_manifest`.
    So far it has checked the blobs with row ids up to `after_blob`, and the manifests with row ids up to
    `after_manifest`. `blobs`, `manifests`: numbers of blobs and manifests that it has checked. `checked_bytes`: bytes
    of the blobs that it has checked. `total_bytes`: bytes of all blobs that it checks, as counted when it began; the
    same as `checked_bytes` once it has ended. `damaged`: how many blobs and manifests it has found damaged."""

    id: int
    started: float
    updated: float
    ended: float | None
    until_blob: int
    until_manifest: int
    total_bytes: int
    after_blob: int = 0
    after_manifest: int = 0
    blobs: int = 0
    manifests: int = 0
    checked_bytes: int = 0
    damaged: int = 0


class DamageRecords(Protocol):
    """The records, which all processes share. All methods may raise StorageFailed. Methods that change something may
    also raise StorageFull. Marking damage works on a full disk."""

    async def current_round(self) -> ScrubRound | None:
        """Returns the round that is not complete yet; None if there is none."""
        ...

    async def start_round(self) -> ScrubRound:
        """Starts a round over all content that is stored now, and returns the round. Abandons the previous round if
        that is not complete."""
        ...

    async def save_round(self, progress: ScrubRound) -> None:
        """Stores the progress of a round. A power cut may lose this change."""
        ...

    async def end_round(self, progress: ScrubRound) -> ScrubRound:
        """Stores that the round is complete, and returns it with the time of its end."""
        ...

    async def rounds(self, limit: int) -> Sequence[ScrubRound]:
        """Returns the newest rounds, newest first. The records of the newest twenty rounds are kept."""
        ...

    async def oldest_blob_created(self) -> float | None:
        """Returns the time at which the oldest blob was stored, in seconds since 1970; None if there is no blob."""
        ...

    async def blobs_after(self, after: int, until: int, limit: int) -> Sequence[StoredBlob]:
        """Returns at most `limit` blobs with row ids from `after` + 1 to `until`, in the order of the ids. Leaves out
        blobs that are known to be damaged."""
        ...

    async def place_of(self, digest: Digest) -> str | None:
        """Returns the place of a blob; an empty text if the blob is damaged, None if there is no such blob."""
        ...

    async def mark_blob(self, digest: Digest, former_place: str, reason: str, quarantine_place: str) -> bool:
        """Marks the blob as damaged if its place before this call is `former_place`. Afterwards the blob has no place.
        `quarantine_place`: the key under which the quarantine will keep the damaged bytes; empty if there are none.
        Returns whether the blob was marked. The caller holds the lock of the digest."""
        ...

    async def mark_blob_healed(self, digest: Digest, place: str) -> bool:
        """Marks a damaged blob as healed: the blob then has the place `place`, where its right bytes already are.
        Returns False if the blob is not damaged. The caller holds the lock of the digest."""
        ...

    async def damaged_blobs(self, after: str | None, limit: int) -> Page[DamagedBlob]:
        """Returns a page of the damaged blobs, in the order of their digests: those that follow `after` (None: from the
        first on)."""
        ...

    async def damaged_manifests(self, limit: int) -> Sequence[DamagedManifest]:
        """Returns at most `limit` damaged manifests, in the order in which they were found."""
        ...

    async def damaged_count(self) -> int:
        """Returns the number of damaged blobs and manifests."""
        ...

    async def holders(self, digest: Digest, limit: int) -> Sequence[RepositoryName]:
        """Returns at most `limit` repositories that have the blob."""
        ...

    async def mirrored_holders(
        self, digest: Digest, upstreams: Collection[str], limit: int
    ) -> Sequence[RepositoryName]:
        """Returns at most `limit` repositories that have the blob and are mirrored from one of `upstreams`."""
        ...

    async def check_manifests(self, after: int, until: int) -> ManifestCheck | None:
        """Hashes some of the manifests with row ids from `after` + 1 to `until`, in the order of the ids. Returns None
        if there are none. Leaves out manifests that are known to be damaged."""
        ...

    async def mark_manifest(self, row_id: int) -> DamagedManifest | None:
        """Hashes a manifest's body again, and marks the manifest as damaged if the body still does not have the digest.
        Returns the marked manifest, or None if it was not marked."""
        ...

    async def restore_manifests(self) -> int:
        """Hashes the bodies of damaged manifests again; the records of the damage keep these bodies. If a body has the
        right digest after all, because faulty memory gave it a wrong hash before, puts it back and marks its manifest
        as healed. Returns the number of healed manifests."""
        ...
