"""What the management API and `entrepot scrub` show about damaged content. *Scrub* reads the stored content in rounds
to find damage. The *quarantine* keeps damaged bytes for inspection. The docstrings of the models and the descriptions
of their fields appear in the OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Self

from pydantic import BaseModel, Field

from registry.admin import models
from registry.admin.job_models import JobResponse
from storage.blobs.blob_store import QuarantinedBytes
from storage.damage import DamagedBlob, DamagedManifest, ScrubRound
from storage.errors import BlobUnknown
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.scrubber import SCRUB_KIND

# The largest numbers of entries in a response.
SHOWN_ROUNDS = 20
MAX_DAMAGED_MANIFESTS = 1000
MAX_QUARANTINED = 1000


class RoundResponse(BaseModel):
    """A round of scrub. `ended` is null until the round is complete. `blobs`, `manifests` and `bytes`: what the round
    has read so far. `total_bytes`: total size of the blobs that the round reads."""

    id: int
    started: datetime
    updated: datetime
    ended: datetime | None
    blobs: int
    manifests: int
    bytes: int
    total_bytes: int
    damaged: int = Field(description="How many damaged blobs and manifests the round has found")

    @classmethod
    def from_stored(cls, stored: ScrubRound) -> Self:
        """Converts a stored round."""
        return cls(
            id=stored.id,
            started=models.to_datetime(stored.started),
            updated=models.to_datetime(stored.updated),
            ended=models.to_datetime_or_none(stored.ended),
            blobs=stored.blobs,
            manifests=stored.manifests,
            bytes=stored.checked_bytes,
            total_bytes=stored.total_bytes,
            damaged=stored.damaged,
        )


class DamagedBlobResponse(BaseModel):
    """A damaged blob, which is not served until it is stored again."""

    digest: str
    size: int
    found: datetime
    reason: str
    repositories: list[str] = Field(description="Some of the repositories that have the blob, at most twenty")

    @classmethod
    def from_stored(cls, stored: DamagedBlob) -> Self:
        """Converts a stored record."""
        return cls(
            digest=stored.digest,
            size=stored.size,
            found=models.to_datetime(stored.found_at),
            reason=stored.reason,
            repositories=list(stored.repositories),
        )


class DamagedManifestResponse(BaseModel):
    """A damaged manifest, which is not served until it is pushed again."""

    repository: str
    digest: str
    found: datetime
    reason: str

    @classmethod
    def from_stored(cls, stored: DamagedManifest) -> Self:
        """Converts a stored record."""
        return cls(
            repository=stored.repository,
            digest=stored.digest,
            found=models.to_datetime(stored.found_at),
            reason=stored.reason,
        )


class ScrubStatus(BaseModel):
    """The rounds of scrub, the newest first; the scrub job that is running or queued; and the damaged manifests."""

    rounds: list[RoundResponse]
    job: JobResponse | None
    damaged_manifests: list[DamagedManifestResponse]


class QuarantinedResponse(BaseModel):
    """Damaged bytes of a blob that the registry keeps for inspection. `damaged`: whether the blob is still damaged."""

    digest: str
    place: str = Field(description="Where the bytes are: a path in the data directory, if blobs are stored as files")
    size: int
    since: datetime
    damaged: bool

    @classmethod
    def from_stored(cls, stored: QuarantinedBytes, *, damaged: bool) -> Self:
        """Converts an entry of the quarantine."""
        return cls(
            digest=stored.digest,
            place=stored.place,
            size=stored.size,
            since=models.to_datetime(stored.since),
            damaged=damaged,
        )


async def read_scrub_status(store: StoredRegistry) -> ScrubStatus:
    """Returns the status that `GET /scrub` and `entrepot scrub status` show."""
    active = await store.jobs.active(SCRUB_KIND)
    return ScrubStatus(
        rounds=[RoundResponse.from_stored(stored) for stored in await store.damage.rounds(SHOWN_ROUNDS)],
        job=JobResponse.from_stored(active[0]) if active else None,
        damaged_manifests=[
            DamagedManifestResponse.from_stored(manifest)
            for manifest in await store.damage.damaged_manifests(MAX_DAMAGED_MANIFESTS)
        ],
    )


async def read_quarantine(store: StoredRegistry) -> list[QuarantinedResponse]:
    """Returns the entries of the quarantine, oldest first, at most `MAX_QUARANTINED`."""
    # If the blob of an entry is still damaged, `damage.place_of` returns an empty string.
    return [
        QuarantinedResponse.from_stored(entry, damaged=await store.damage.place_of(entry.digest) == "")
        for entry in (await store.blobs.list_quarantine())[:MAX_QUARANTINED]
    ]


async def delete_quarantined(store: StoredRegistry, digest_text: str) -> None:
    """Deletes the bytes that the quarantine keeps of the blob with this digest. Raises DigestInvalid. Raises
    BlobUnknown if the quarantine has no bytes of the blob."""
    digest = Digest(digest_text)
    async with store.locks.hold(digest):
        if not await store.blobs.delete_quarantined(digest):
            raise BlobUnknown(f"the quarantine has no bytes of {digest}")
