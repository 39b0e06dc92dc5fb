"""The interface for copies of the metadata database (`Snapshots`). A backup consists of a copy of the metadata and of
the blobs that the copy names."""

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
    """A blob that a copy of the metadata names. `size`: number of its bytes. `place`: the key under which the blob
    store keeps the bytes; empty if the blob was recorded as damaged. `created`: when the blob was added, in seconds
    since 1970; if the blob was damaged and then healed, when it was last healed."""

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
        """The version of the tables in the copy. A newer program writes the same or a higher version."""
        ...

    @property
    def is_too_new(self) -> bool:
        """Whether `table_version` is higher than the version that this program writes: a newer program wrote the
        copy."""
        ...

    @property
    def instance_id(self) -> str:
        """The random id of the registry that was copied. A restored registry keeps this id. Empty if the copy is from
        an old program, which gave registries no ids."""
        ...

    def totals(self) -> SnapshotTotals:
        """Counts all content that the copy names. Takes longer for a larger copy."""
        ...

    def blobs(self, after: str, limit: int, prefix: str = "") -> list[SnapshotBlob]:
        """Returns the first `limit` blobs whose digest begins with `prefix` and sorts after `after`, sorted by digest.
        The empty text sorts before all digests."""
        ...


class Snapshots(Protocol):
    """Copies the metadata into files, and opens and changes these copies."""

    async def write(self, path: Path, on_pages: Callable[[int, int], None]) -> None:
        """Copies the metadata, as it is at one moment, into the new file `path`. Leaves out upload sessions, events and
        login sessions, and marks jobs that have not ended as stopped. During the copy, other processes can read and
        change the metadata. Calls `on_pages(copied, total)`, two numbers of pages, in the event loop. Syncs the file,
        but not its directory, so a crash of the machine may still lose the file. If the call is cancelled, an
        incomplete file may be left. Raises BackupFailed."""
        ...

    def open(self, path: Path) -> AbstractContextManager[DatabaseSnapshot]:
        """Opens a copy for reading, in any thread. Raises BackupFailed if the file is no copy of the metadata."""
        ...

    def mark_damaged(self, path: Path, digests: Sequence[Digest], reason: str) -> None:
        """Marks blobs in a copy as damaged, so that a registry with this metadata does not try to serve them. Blocks.
        Raises BackupFailed."""
        ...

    def mark_healed(self, path: Path, places: Mapping[Digest, str]) -> None:
        """Marks damaged blobs in a copy as *healed*: the blob store has their right bytes again. `places`: maps the
        digest of each blob to the key under which the blob store keeps its bytes. Blocks. Raises BackupFailed."""
        ...

    def mark_restored(self, path: Path, copied_at: float) -> None:
        """Marks a copy as restored at the present time. After the copy was made, the copied registry may have recorded
        pulls and events that the copy lacks. So this method changes two things in the copy:

        - For the tags in the copy, `TagFacts.unrecorded_until` becomes the time of the restore, because pulls before
          it may lack a record.
        - Events after the restore get higher numbers than all events of the copied registry.

        `copied_at`: when the copy was made, in seconds since 1970. If `copied_at` or the time of an earlier restore is
        later than the present time, the latest of the three counts as the time of the restore, because the clock is
        behind. Blocks. Raises BackupFailed."""
        ...
