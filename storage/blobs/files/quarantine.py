"""The directory of damaged blob files (`QuarantineDirectory`), and a text that identifies the content of a file
(`version_of_status`)."""

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
    """Returns a text that identifies a file and its bytes. If another file gets the same name, the text changes: the
    new file may reuse the inode number, but then has another modification time."""
    return f"{status.st_dev}-{status.st_ino}-{status.st_mtime_ns}-{status.st_size}"


def version_at_path(path: Path) -> str | None:
    """Returns the version of the file at `path` (`version_of_status`); `damaged` if the inode is damaged; None if there
    is no file. Raises StorageFailed if the directory of the file is missing too: the blobs are then probably not lost,
    but their file system is not mounted, or an operator has moved them. Raises other OSErrors."""
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
    """The damaged files of a data directory. All methods block and raise OSError."""

    def __init__(self, layout: Layout, system: System) -> None:
        self._layout = layout
        self._system = system

    def take_in(self, digest: Digest, place: str) -> None:
        """Moves the blob's file at `place` (a path relative to the data directory) into the quarantine. Three cases
        differ:

        - There is no file: does nothing.
        - The disk is too full for a new directory entry: unlinks the file.
        - The inode is so damaged that the move fails: leaves the file where it is."""
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
        """Returns the files in the order in which they were moved into the quarantine. Ignores files whose name is not
        a digest, and skips files that the disk cannot read (`skip_unreadable`)."""
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
        return sorted(quarantined, key=lambda item: (item.since, item.digest))

    def delete(self, digest: Digest) -> bool:
        """Unlinks the damaged file of a blob. Returns whether there was a file."""
        try:
            self._system.unlink(self._layout.path_of(self._layout.quarantine_place(digest)))
        except FileNotFoundError:
            return False
        return True
