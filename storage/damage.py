"""The interface that keeps records of damaged content, and of the scrub rounds that find it (`DamageRecords`).

Disks can lose or change bytes without reporting an error. Therefore the *scrub* reads and hashes all stored content
again. Content is *damaged* if its stored bytes no longer have its digest, or are missing. Damaged content is *healed*
when its right bytes are stored again, for example because a client pushes the content.

The *place* of a blob is the key of its bytes in the blob store. A damaged blob keeps its row and its links (the rights
of repositories to serve it), but the row has no place, so that no repository serves the blob. A damaged manifest also
keeps its row, but its body is moved from the row to the record of the damage.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from storage.content import Actor, Page
from storage.names import Digest, RepositoryName

UPKEEP_ACTOR = Actor(name="upkeep")
"""The actor that the audit log names when content is marked as damaged or healed."""


@dataclass(frozen=True, slots=True)
class StoredBlob:
    """A blob to check. `row_id`: id of its row; newer rows have higher ids."""

    row_id: int
    digest: Digest
    size: int
    place: str


@dataclass(frozen=True, slots=True)
class DamagedBlob:
    """A damaged blob. `found`: when the damage was found, in seconds since 1970. `reason`: tells people what is wrong
    with the bytes. `former_place`: the blob's place before the blob was marked as damaged; empty if it had no place.
    `quarantine_place`: the key of the damaged bytes in the *quarantine*, the part of the blob store that keeps damaged
    bytes for some time; empty if there were no bytes. `repositories`: some of the repositories that have the blob."""

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
    """The result of a check of some manifests. `last`: row id of the last checked manifest. `count`: number of checked
    manifests. `size`: number of bytes that were read. `damaged_rows`: row ids of the manifests whose bodies do not have
    their digests."""

    last: int
    count: int
    size: int
    damaged_rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class ScrubRound:
    """A round of the scrub: one pass over all content. Times are in seconds since 1970; `ended` is None while the round
    is not complete.

    - `until_blob`, `until_manifest`: the round checks all blobs and manifests with row ids up to these.
    - `after_blob`, `after_manifest`: the round has checked the blobs and manifests with row ids up to these.
    - `blobs`, `manifests`: numbers of blobs and manifests that the round has checked.
    - `checked_bytes`: bytes of the blobs that the round has checked.
    - `total_bytes`: bytes of all blobs to check, counted when the round began. Equal to `checked_bytes` after the end.
    - `damaged`: number of blobs and manifests that the round has found damaged."""

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
    """The records of damage and of scrub rounds, which all processes share. All methods may raise StorageFailed.
    Methods that change something may also raise StorageFull. Content can be marked as damaged even on a full disk."""

    async def current_round(self) -> ScrubRound | None:
        """Returns the round that is not complete yet; None if there is none."""
        ...

    async def start_round(self) -> ScrubRound:
        """Starts a round over all content that is stored now, and returns the round. If the previous round is not
        complete, deletes its record."""
        ...

    async def save_round(self, progress: ScrubRound) -> None:
        """Stores the progress of a round. A power cut may lose this change."""
        ...

    async def end_round(self, progress: ScrubRound) -> ScrubRound:
        """Stores that the round is complete, and returns the round with the time of its end."""
        ...

    async def rounds(self, limit: int) -> Sequence[ScrubRound]:
        """Returns at most `limit` rounds, newest first. Only the newest twenty rounds are kept."""
        ...

    async def oldest_blob_created(self) -> float | None:
        """Returns the time at which the oldest blob was stored, in seconds since 1970; None if there is no blob."""
        ...

    async def blobs_after(self, after: int, until: int, limit: int) -> Sequence[StoredBlob]:
        """Returns at most `limit` blobs with row ids from `after` + 1 to `until`, in the order of the ids. Leaves out
        blobs that are known to be damaged."""
        ...

    async def place_of(self, digest: Digest) -> str | None:
        """Returns the place of a blob; an empty string if the blob is damaged; None if there is no such blob."""
        ...

    async def mark_blob(self, digest: Digest, former_place: str, reason: str, quarantine_place: str) -> bool:
        """Marks the blob as damaged if its place is `former_place`. Returns whether the blob was marked. A marked blob
        has no place. `quarantine_place`: the key under which the quarantine will keep the damaged bytes; empty if there
        are no bytes. The caller holds the lock of the digest."""
        ...

    async def mark_blob_healed(self, digest: Digest, place: str) -> bool:
        """Marks a damaged blob as healed, and sets its place to `place`, where its right bytes already are. Returns
        False if the blob is not damaged. The caller holds the lock of the digest."""
        ...

    async def damaged_blobs(self, after: str | None, limit: int) -> Page[DamagedBlob]:
        """Returns a page of at most `limit` damaged blobs, in the order of their digests. `after`: the page has only
        blobs whose digests follow this digest; None: returns the first page."""
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
        """Heals damaged manifests whose bodies are right after all: faulty memory can give a right body a wrong hash.
        Hashes the bodies in a few of the records again. Puts each body that has the right digest back into its row, and
        marks its manifest as healed. Returns the number of healed manifests."""
        ...
