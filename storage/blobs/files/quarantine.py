"""The directory of damaged blob files (`QuarantineDirectory`), and the *version* of a file (`version_of_status`):
a text that identifies the file at a path. Another file at the same path has another version."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from storage.blobs.blob_store import QuarantinedBytes
from storage.blobs.files.unreadable_files import DAMAGE_ERRNOS, skip_unreadable
from storage.data_dir.layout import Layout
from storage.data_dir.system import DISK_FULL_ERRNOS, System
from storage.errors import DigestInvalid, StorageFailed
from storage.names import Digest


def version_of_status(status: os.stat_result) -> str:
    """Returns the version of a file. It contains the modification time, because a new file may reuse the inode
    number."""
    return f"{status.st_dev}-{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def version_at_path(path: Path) -> str | None:
    """Returns the version of the file at `path`. Returns `damaged` if the inode is damaged, and None if there is no
    file. Raises StorageFailed if the directory of the file is missing, because its file system may not be mounted.
    Raises OSError if the file cannot be examined for another reason."""
    try:
        return version_of_status(os.stat(path))
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise StorageFailed(f"the directory {path.parent} is missing; is its file system mounted?") from None
        return None
    except OSError as error:
        if error.errno not in DAMAGE_ERRNOS:
            raise
        return "damaged"


class QuarantineDirectory:
    """The quarantine of a data directory: the directory with its damaged blob files. All methods block and raise
    OSError."""

    def __init__(self, layout: Layout, system: System) -> None:
        self._layout = layout
        self._system = system

    def take_in(self, digest: Digest, place: str) -> None:
        """Moves the blob's file at `place` (a path relative to the data directory) into the quarantine. Special cases:

        - If there is no file, does nothing.
        - If the disk is too full for the move, unlinks the file.
        - If the move fails because the inode is damaged, leaves the file at `place`."""
        path = self._layout.path_of(place)
        with suppress(FileNotFoundError):
            try:
                if not self._layout.quarantine.is_dir():  # an operator has deleted it
                    with suppress(FileExistsError):
                        self._system.mkdir(self._layout.quarantine)
                self._system.rename(path, self._layout.path_of(self._layout.quarantine_place(digest)))
            except OSError as error:
                if error.errno in DISK_FULL_ERRNOS:
                    self._system.unlink(path)
                elif error.errno not in DAMAGE_ERRNOS:
                    raise

    def entries(self) -> list[QuarantinedBytes]:
        """Returns the files in the order in which they were moved into the quarantine. Leaves out files whose name is
        not a digest, and files that cannot be read (`skip_unreadable`)."""
        quarantined: list[QuarantinedBytes] = []
        if not self._layout.quarantine.is_dir():
            return quarantined
        for entry in os.scandir(self._layout.quarantine):
            with suppress(DigestInvalid, FileNotFoundError), skip_unreadable(entry.path):
                digest = Digest(entry.name.replace("-", ":", 1))
                status = entry.stat()
                place = self._layout.quarantine_place(digest)
                # `st_ctime` is the time of the move into the quarantine, because a rename sets it.
                quarantined.append(QuarantinedBytes(digest, place, status.st_size, status.st_ctime))
        return sorted(quarantined, key=lambda file: (file.since, file.digest))

    def delete(self, digest: Digest) -> bool:
        """Unlinks the blob's file in the quarantine. Returns whether there was a file."""
        try:
            self._system.unlink(self._layout.path_of(self._layout.quarantine_place(digest)))
        except FileNotFoundError:
            return False
        return True
