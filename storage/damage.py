"""The interface that keeps records of damaged content, and of the scrub rounds that find it (`DamageRecords`).

The *scrub* reads and hashes all stored content again, because disks can lose or change bytes without reporting an
error. Content is *damaged* if its stored bytes are missing or do not have its digest. Damaged content is *healed* when
its right bytes are stored again.

The *place* of a blob is the key of its bytes in the blob store. The row of a blob contains the place. When a blob is
marked as damaged, its row and its links (the rights of repositories to serve it) stay, but the row loses the place: no
repository serves the blob any more. When a manifest is marked as damaged, its row stays, but the body moves from the
row to the record of the damage.
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
    """A blob to check. `row_id`: id of the blob's row; newer rows have higher ids. `size`: in bytes."""

    row_id: int
    digest: Digest
    size: int
    place: str


@dataclass(frozen=True, slots=True)
class DamagedBlob:
    """A damaged blob.

    - `found_at`: when the damage was found, in seconds since 1970.
    - `reason`: a text for people that says what is wrong with the bytes.
    - `quarantine_place`: the key of the damaged bytes in the *quarantine*, the part of the blob store that keeps
      damaged bytes for some time; empty if there were no bytes.
    - `former_place`: the place that the blob had before it was marked as damaged; empty if unknown.
    - `repositories`: some of the repositories that have the blob."""

    digest: Digest
    size: int
    found_at: float
    reason: str
    quarantine_place: str
    former_place: str
    repositories: Sequence[RepositoryName]


@dataclass(frozen=True, slots=True)
class DamagedManifest:
    """A damaged manifest of a repository. `found_at` and `reason`: as in `DamagedBlob`."""

    repository: RepositoryName
    digest: Digest
    found_at: float
    reason: str


@dataclass(frozen=True, slots=True)
class ManifestCheck:
    """The result of a check of some manifests.

    - `last_row_id`: row id of the last checked manifest.
    - `manifest_count`: number of checked manifests.
    - `read_bytes`: number of bytes that were read.
    - `damaged_row_ids`: row ids of the manifests whose bodies do not have the manifests' digests."""

    last_row_id: int
    manifest_count: int
    read_bytes: int
    damaged_row_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class ScrubRound:
    """A round of the scrub: one pass over all content. The round checks content in the order of the row ids.

    - `started`, `updated`, `ended`: times at which the round began, its progress was last stored, and the round ended;
      in seconds since 1970. `ended` is None while the round is not complete.
    - `until_blob`, `until_manifest`: highest row ids of the blobs and manifests to check.
    - `after_blob`, `after_manifest`: highest row ids of the blobs and manifests that are checked already.
    - `blobs`, `manifests`: numbers of checked blobs and manifests.
    - `checked_bytes`: total size of the checked blobs in bytes.
    - `total_bytes`: while the round runs: total size in bytes of all blobs to check, measured at the start. After the
      end of the round: the same as `checked_bytes`.
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
    Methods that change something may also raise StorageFull. Marking content as damaged or healed uses reserved disk
    space, so it works even on a full disk."""

    async def current_round(self) -> ScrubRound | None:
        """Returns the round that is not complete yet; None if all rounds are complete."""
        ...

    async def start_round(self) -> ScrubRound:
        """Deletes the record of a round that is not complete. Then starts a round over all content that is stored now,
        and returns the new round."""
        ...

    async def save_round(self, progress: ScrubRound) -> None:
        """Stores the progress of a round. A power cut may undo this."""
        ...

    async def end_round(self, progress: ScrubRound) -> ScrubRound:
        """Stores that the round is complete, and returns the round with the time of its end."""
        ...

    async def rounds(self, limit: int) -> Sequence[ScrubRound]:
        """Returns at most `limit` rounds, newest first. Only the newest twenty rounds are stored."""
        ...

    async def oldest_blob_created_at(self) -> float | None:
        """Returns the time at which the oldest blob was stored, in seconds since 1970; None if there is no blob."""
        ...

    async def blobs_after(self, after: int, until: int, limit: int) -> Sequence[StoredBlob]:
        """Returns at most `limit` blobs with row ids from `after` + 1 to `until`, in the order of the ids. Leaves out
        blobs that are marked as damaged."""
        ...

    async def place_of(self, digest: Digest) -> str | None:
        """Returns the place of a blob; an empty string if the blob is damaged; None if there is no such blob."""
        ...

    async def mark_blob_damaged(self, digest: Digest, former_place: str, reason: str, quarantine_place: str) -> bool:
        """If the place of the blob is `former_place`, removes the place from the blob's row and marks the blob as
        damaged. Returns whether the blob was marked. `quarantine_place`: the key under which the quarantine will keep
        the damaged bytes; empty if there are no bytes. The caller holds the lock of the digest."""
        ...

    async def mark_blob_healed(self, digest: Digest, place: str) -> bool:
        """Marks a damaged blob as healed, and sets its place to `place`. The right bytes are already stored at this
        place. Returns False if the blob is not marked as damaged. The caller holds the lock of the digest."""
        ...

    async def damaged_blobs(self, after: str | None, limit: int) -> Page[DamagedBlob]:
        """Returns a page of at most `limit` damaged blobs, in the order of their digests. `after`: the last digest of
        the previous page; None: returns the first page."""
        ...

    async def damaged_manifests(self, limit: int) -> Sequence[DamagedManifest]:
        """Returns at most `limit` damaged manifests, oldest damage first."""
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
        """Hashes the next manifests with row ids from `after` + 1 to `until`, in the order of the ids. One call may not
        hash all of them. Leaves out manifests that are marked as damaged. Returns None if no manifest is left."""
        ...

    async def mark_manifest_damaged(self, row_id: int) -> DamagedManifest | None:
        """Hashes a manifest's body again. If the body does not have the manifest's digest, marks the manifest as
        damaged and returns it. Otherwise returns None."""
        ...

    async def recheck_damaged_manifests(self) -> int:
        """Hashes the bodies of a few damaged manifests again, because faulty memory can make the hash of a right body
        wrong. If a body has the right digest, puts it back into the manifest's row, and marks the manifest as healed.
        Returns the number of healed manifests."""
        ...
