"""Lists the partial blobs that are in the data directory (`list_partials`, `list_downloads`), and frees disk space when
the registry starts on a full disk (`free_disk_space`).

A *partial blob* is a blob whose download is running or was interrupted. Its *state file* says which of its bytes are
stored. Its *owner* is the process that downloads it. A partial blob whose download was interrupted has no owner.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from storage.blobs.files.partial_file_pairs import (
    PartialPaths,
    delete_file_pair_if_idle,
    is_file_pair_idle_and_readable,
    list_partial_names,
)
from storage.blobs.files.partial_state_format import PartialProgress, PartialStatus, read_progress
from storage.blobs.files.trash import Trash
from storage.blobs.files.unreadable_files import skip_unreadable
from storage.content import PartialSummary
from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.layout import Layout
from storage.data_dir.locks import is_byte_locked
from storage.data_dir.system import System
from storage.errors import RegistryError
from storage.names import Digest

READ_ATTEMPTS = 10
"""Largest number of attempts to read a state file. An attempt can fail because another process writes the file at the
same moment."""


def list_partials(layout: Layout, boot: str) -> list[PartialSummary]:
    """Returns the partial blobs whose download is running or can be continued. `boot`: id of the machine's present
    boot. Takes no locks and changes nothing. Raises OSError. Leaves out two kinds of partial blobs:

    - those from an earlier boot, because their bytes were not synced to the disk;
    - those whose state file cannot be read. Logs a warning for each (`skip_unreadable`)."""
    return [summary for _, summary in _read_partials(layout, boot) if summary is not None]


def list_downloads(layout: Layout, boot: str) -> set[Digest]:
    """Returns the digests of the blobs that any process is downloading now. Includes partial blobs whose state file
    cannot be read, because their download may be running. Takes no locks and changes nothing. Raises OSError."""
    return {digest for digest, summary in _read_partials(layout, boot) if summary is None or summary.is_downloading}


def _read_partials(layout: Layout, boot: str) -> list[tuple[Digest, PartialSummary | None]]:
    """Returns the digest and the summary of each partial blob whose download is running or can be continued. Also
    returns each partial blob whose state file cannot be read, with None as its summary. Raises OSError."""
    partials: list[tuple[Digest, PartialSummary | None]] = []
    for name, digest in list_partial_names(layout):
        path = layout.partial_state(name)
        with skip_unreadable(path):
            if (summary := _read_summary(path, digest, boot)) is not None:
                partials.append((digest, summary))
            continue
        partials.append((digest, None))  # reached only if the state file cannot be read
    return partials


def _read_summary(path: Path, digest: Digest, boot: str) -> PartialSummary | None:
    """Returns the summary of the partial blob whose state file is at `path`. Returns None if the download has just
    ended or cannot be continued. Raises OSError."""
    try:
        state_fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        progress = _read_progress_with_retries(state_fd)
        if progress is None or progress.status is not PartialStatus.INCOMPLETE or progress.boot != boot:
            return None
        received = sum(stop - start for start, stop in progress.extents)
        is_downloading = is_byte_locked(state_fd)  # the owner holds this lock
        return PartialSummary(digest, progress.size, received, is_downloading)
    finally:
        os.close(state_fd)


def _read_progress_with_retries(state_fd: int) -> PartialProgress | None:
    """Reads the progress from the state file, in up to `READ_ATTEMPTS` attempts. Returns None if all attempts fail."""
    for _ in range(READ_ATTEMPTS):
        if (progress := read_progress(state_fd)) is not None:
            return progress
    return None


def free_disk_space(layout: Layout, system: System, boot: str) -> None:
    """Empties the trash directory, which holds the files of deleted blobs. Deletes the partial blobs that no process is
    downloading. Called when the registry starts and finds the disk full. `boot`: id of the machine's present boot.
    Ignores errors of the disk."""
    for free_space in (Trash(layout.trash, system).empty, lambda: _delete_partials(layout, system, boot)):
        with suppress(RegistryError), as_storage_errors():
            free_space()


def _delete_partials(layout: Layout, system: System, boot: str) -> None:
    """Deletes the partial blobs that have no owner, of any age. Skips those whose files cannot be read."""
    for name, digest in list_partial_names(layout):
        paths = PartialPaths.of_blob(layout, name, digest)
        if is_file_pair_idle_and_readable(paths, before=float("inf"), boot=boot):
            delete_file_pair_if_idle(system, paths, before=float("inf"), boot=boot)
