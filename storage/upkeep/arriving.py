"""Which blobs are on their way in, and how far they are, for a person to see. Nothing is locked or changed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from storage.blobs.layout import Layout
from storage.blobs.partials import partials_in
from storage.blobs.progress import Progress, Status, read_progress
from storage.locks import is_locked
from storage.names import Digest
from storage.system import boot_id

TRIES = 10
"""Readings of a state that is being written just then."""


@dataclass(frozen=True, slots=True)
class Arriving:
    """A partial blob: its bytes, those that are here, and whether a process fetches it now."""

    digest: Digest
    size: int
    here: int
    owned: bool


def arriving(data: Path) -> list[Arriving]:
    """Those that the next who asks for them can go on with. Raises OSError."""
    layout = Layout(data.absolute())
    boot = boot_id()
    found = []
    for name, digest in partials_in(layout):
        try:
            state = os.open(layout.partial_state(name), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # it is whole, or was given up, since the directory was read
            continue
        try:
            progress = _read(state)
            if progress is not None and progress.status is Status.RUNNING and progress.boot == boot:
                here = sum(stop - start for start, stop in progress.extents)
                found.append(Arriving(digest, progress.size, here, is_locked(state)))
        finally:
            os.close(state)
    return found


def _read(state: int) -> Progress | None:
    for _ in range(TRIES):
        if (progress := read_progress(state)) is not None:
            return progress
    return None
