"""What lies in the data directory besides blobs: partial blobs that can still be completed, and what can be dropped on
a full disk."""

from __future__ import annotations

import os
from contextlib import suppress

from storage.blobs.files.partial_files import PartialPaths, expire_partial, partials_in
from storage.blobs.files.partial_state import PartialStatus, Progress, read_progress
from storage.content import PartialSummary
from storage.data_dir.blocking_calls import as_storage_errors
from storage.data_dir.layout import Layout
from storage.data_dir.locks import is_byte_locked
from storage.data_dir.system import System
from storage.errors import RegistryError

TRIES = 10
"""Reads of a state file that another process is writing."""


def list_partials(layout: Layout, boot: str) -> list[PartialSummary]:
    """Returns the partial blobs that the next request for them can continue. Locks and changes nothing. Raises
    OSError."""
    found = []
    for name, digest in partials_in(layout):
        try:
            state = os.open(layout.partial_state(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # completed or dropped since the directory was read
            continue
        try:
            progress = _read(state)
            if progress is not None and progress.status is PartialStatus.RUNNING and progress.boot == boot:
                received = sum(stop - start for start, stop in progress.extents)
                found.append(PartialSummary(digest, progress.size, received, is_byte_locked(state)))
        finally:
            os.close(state)
    return found


def _read(state: int) -> Progress | None:
    for _ in range(TRIES):
        if (progress := read_progress(state)) is not None:
            return progress
    return None


def free_disk_space(layout: Layout, system: System, boot: str) -> None:
    """Drops the trash and the partial blobs that no process is fetching, for a start that finds no space on the disk.
    Raises nothing."""
    for drop in (_empty_trash, _drop_partials):
        with suppress(RegistryError), as_storage_errors():
            drop(layout, system, boot)


def _empty_trash(layout: Layout, system: System, _boot: str) -> None:
    for file in list(layout.trash.iterdir()):
        with suppress(FileNotFoundError):
            system.unlink(file)


def _drop_partials(layout: Layout, system: System, boot: str) -> None:
    for name, digest in partials_in(layout):
        expire_partial(system, PartialPaths.of(layout, name, digest), float("inf"), boot)
