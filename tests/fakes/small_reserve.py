"""A small reserve for stores that a test opens in its own process.

The file system in memory fills the 16 MiB of each reserve with zeros, which takes more time than all other steps of a
new data directory. Tests of full disks use the reserve in its full size.
"""

from __future__ import annotations

import pytest

from storage.data_dir import reserve

SMALL_RESERVE_BYTES = 512 * 1024


@pytest.fixture(autouse=True)
def small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the reserves of this test small."""
    monkeypatch.setattr(reserve, "RESERVE_BYTES", SMALL_RESERVE_BYTES)
