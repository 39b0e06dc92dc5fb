"""The interface for copies of the metadata (`Snapshots`). A backup consists of such a copy, and of the blobs that the
copy names."""

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
    store has these bytes; empty if the blob was recorded as damaged. `created`: when its bytes were stored, in seconds
    since 1970; if they were damaged and stored again, the later time."""

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
    """An open copy of the metadata. The methods block; each reads at most `limit` rows, except `totals`. They raise
    BackupFailed if the copy cannot be read."""

    @property
    def table_version(self) -> int:
        """The version of the tables, which grows with the version of the program that wrote them."""
        ...

    @property
    def is_too_new(self) -> bool:
        """Whether a newer version of the program than this one wrote the tables."""
        ...

    @property
    def instance_id(self) -> str:
        """The random id of the registry that was copied. A restored registry keeps this id. Empty if the copy is from a
        version that gave registries no ids."""
        ...

    def totals(self) -> SnapshotTotals:
        """Counts all content that the copy names. The time grows with the size of the copy."""
        ...

    def blobs(self, after: str, limit: int, prefix: str = "") -> list[SnapshotBlob]:
        """Returns at most `limit` blobs whose digests sort after `after` (empty: from the first on) and begin with
        `prefix`, sorted by digest."""
        ...


class Snapshots(Protocol):
    """Makes and opens copies of the metadata in files."""

    async def write(self, path: Path, on_pages: Callable[[int, int], None]) -> None:
        """Copies the metadata, as it is at one moment, into the new file `path`. Upload sessions, events and login
        sessions are left out, and jobs that have not ended are marked as stopped. Other processes read and change the
        metadata meanwhile. Calls `on_pages` in the event loop with the number of copied pages and of all pages.
        Afterwards the content of the file is durable, but not yet its name in the directory. If the call is cancelled,
        a part of the file may be left. Raises BackupFailed."""
        ...

    def open(self, path: Path) -> AbstractContextManager[DatabaseSnapshot]:
        """Opens a copy for reading, in any thread. Raises BackupFailed if the file is no copy of the metadata."""
        ...

    def mark_damaged(self, path: Path, digests: Sequence[Digest], reason: str) -> None:
        """Marks blobs in a copy as damaged, so that a registry with this metadata does not try to serve them. Blocks.
        Raises BackupFailed."""
        ...

    def mark_healed(self, path: Path, places: Mapping[Digest, str]) -> None:
        """Marks damaged blobs in a copy as *healed*: the blob store has their right bytes again. `places`: for each
        blob, the key under which the blob store has its bytes. Blocks. Raises BackupFailed."""
        ...

    def mark_restored(self, path: Path, copied_at: float) -> None:
        """Marks a copy as restored at the present time. The copied registry may have recorded pulls and added events
        after the copy was made, and the copy lacks them. So pulls before the restore may lack a record, as
        `TagFacts.unrecorded_until` then says, and events after the restore get higher numbers than all events of the
        copied registry. `copied_at`: when the copy was made, in seconds since 1970. If `copied_at` or the time of an
        earlier restore is in the future, the clock is behind. Then the latest of these times counts as the time of the
        restore. Blocks. Raises BackupFailed."""
        ...
