"""The interface for copies of the metadata database (`Snapshots`). A backup consists of two parts: a copy of the
metadata, and the blobs that this copy names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from storage.errors import RegistryError
from storage.names import Digest


class BackupFailed(RegistryError):
    """A backup or a restore cannot continue, for example because the directory cannot be written."""

    code = "BACKUP_FAILED"
    default = "the backup failed"


class BackupTargetUnknown(RegistryError):
    """The settings name no directory for backups."""

    code = "BACKUP_TARGET_UNKNOWN"
    default = "the settings name no directory for backups; set `target` in [backup]"


class ImageFileFailed(RegistryError):
    """A file or directory with images cannot be read or written, or its content is not valid."""

    code = "IMAGE_FILE_FAILED"
    default = "the file with images cannot be used"


class SnapshotBlob(NamedTuple):
    """A blob that a copy of the metadata names.

    - `size`: number of the blob's bytes.
    - `place`: the key under which the blob store keeps the bytes; empty if the blob was recorded as damaged.
    - `created`: when the blob was added or last healed, in seconds since 1970. (A damaged blob is *healed* when the
      blob store has the right bytes again.)"""

    digest: Digest
    size: int
    place: str
    created: float


@dataclass(frozen=True, slots=True)
class SnapshotTotals:
    """The totals of the content that a copy of the metadata names. `size`: total size of the blobs in bytes."""

    repositories: int
    manifests: int
    tags: int
    blobs: int
    size: int


class DatabaseSnapshot(Protocol):
    """An open copy of the metadata. The methods and properties block, and raise BackupFailed if the copy cannot be
    read."""

    @property
    def table_version(self) -> int:
        """The version of the tables in the copy."""
        ...

    @property
    def is_too_new(self) -> bool:
        """Whether a newer program wrote the copy: `table_version` is higher than the version that this program
        writes."""
        ...

    @property
    def instance_id(self) -> str:
        """The random id of the registry that was copied. A restored registry has the same id. Empty if the copy was
        written by an old program, which gave registries no ids."""
        ...

    def totals(self) -> SnapshotTotals:
        """Counts all content that the copy names. Takes longer for a larger copy."""
        ...

    def blobs(self, after: str, limit: int, prefix: str = "") -> list[SnapshotBlob]:
        """Returns at most `limit` blobs, sorted by digest: the first ones whose digest begins with `prefix` and sorts
        after `after`. The empty text sorts before all digests."""
        ...


class Snapshots(Protocol):
    """Copies the metadata into files, and opens and changes these copies."""

    async def write(self, path: Path, on_pages: Callable[[int, int], None]) -> None:
        """Copies the metadata, as it is at one moment, into the new file `path`. Leaves out upload sessions, events and
        login sessions. In the copy, marks jobs that have not ended as stopped. Other processes can read and change the
        metadata during this call.

        Calls `on_pages(copied, total)` in the event loop, with the number of copied pages and of all pages. Syncs the
        file but not its directory: a crash of the machine may lose the file until the caller syncs the directory. A
        cancelled call may leave an incomplete file. Raises BackupFailed."""
        ...

    def open(self, path: Path) -> AbstractContextManager[DatabaseSnapshot]:
        """Opens a copy for reading, in any thread. Raises BackupFailed if the file is no copy of the metadata."""
        ...

    def mark_damaged(self, path: Path, digests: Sequence[Digest], reason: str) -> None:
        """Marks blobs in a copy as damaged, so that a registry that is restored from the copy does not serve them.
        Blocks. Raises BackupFailed."""
        ...

    def mark_healed(self, path: Path, places: Mapping[Digest, str]) -> None:
        """Marks damaged blobs in a copy as healed. `places`: maps the digest of each blob to the key under which the
        blob store keeps its bytes. Blocks. Raises BackupFailed."""
        ...

    def mark_restored(self, path: Path, copied_at: float) -> None:
        """Marks a copy as restored now. Changes two things in the copy, because the copied registry may have recorded
        pulls and events after the copy was made:

        - The copy then says that it may lack pulls before the time of the restore (`TagFacts.unrecorded_until`).
        - Events after the restore will get higher numbers than all events of the copied registry.

        `copied_at`: when the copy was made, in seconds since 1970. The clock may have been set back since then, so the
        time of the restore is the latest of these times:

        - The present time.
        - `copied_at`.
        - The time before which the copy may already lack pulls, for example the time of an earlier restore.

        Blocks. Raises BackupFailed."""
        ...
