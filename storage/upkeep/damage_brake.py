"""Stops work that takes damaged blobs out of use if too many blobs in a row are damaged (`DamageBrake`)."""

from __future__ import annotations

from typing import Final

from storage.errors import StorageFailed

MAX_IN_A_ROW: Final = 20
"""After this number of damaged blobs without an undamaged blob between them, the work stops: a disk that fails, or a
file system that is not mounted, should not take all blobs out of use."""


class DamageBrake:
    """Counts how many blobs in a row were taken out of use. `is_on`: whether `note` stops the work."""

    def __init__(self, *, is_on: bool = True) -> None:
        self._is_on = is_on
        self._in_a_row = 0

    def note(self, *, is_damaged: bool) -> None:
        """Notes the next blob. `is_damaged`: whether it was taken out of use. Raises StorageFailed after `MAX_IN_A_ROW`
        damaged blobs in a row."""
        self._in_a_row = self._in_a_row + 1 if is_damaged else 0
        if self._in_a_row >= MAX_IN_A_ROW and self._is_on:
            raise StorageFailed(
                f"the last {self._in_a_row} blobs are all damaged; look at the disk first, then go on with "
                "`entrepot scrub --keep-going`"
            )
