"""The reports of workers, and the status that is made of them and of the store."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.admin.server_status import read_server_status
from registry.backend import open_backend
from registry.config import Settings
from storage.composition import layout_of, prepare_data_dir


@pytest.mark.full_store
async def test_an_error_of_the_store_leaves_the_rest(tmp_path: Path) -> None:
    """If a part of the store cannot be read, the status has what could be read, and says why."""
    prepare_data_dir(tmp_path)
    async with open_backend(Settings(data=tmp_path)) as backend:
        assert (await read_server_status(backend.upkeep)).store_problem is None
        database = layout_of(tmp_path).metadata
        database.rename(tmp_path / "away")
        try:
            status = await read_server_status(backend.upkeep)
        finally:
            (tmp_path / "away").rename(database)
    assert "cannot read" in (status.store_problem or "")
    assert status.uploads is None
    assert status.disk.free > 0
