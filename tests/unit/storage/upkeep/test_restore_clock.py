"""Restores from a backup on a machine whose clock was ahead or behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.composition import open_registry
from storage.store.stored_registry import StoredRegistry
from storage.upkeep import collector
from tests.fakes.registry_content import push_image
from tests.unit.storage.upkeep.test_backup import REPO, backup, restore
from tests.unit.storage.upkeep.test_backup import store as store


async def test_a_restore_while_the_clock_was_ahead(
    store: StoredRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the clock was set back, the time since which all pulls are recorded is not in the future: a round of
    garbage collection replaces it by the present time. Otherwise retention would delete nothing for years."""
    monkeypatch.setattr(collector, "CONFIRM_FUTURE_SECONDS", 0.0)
    await push_image(store, REPO, "one", "v1")
    await backup(store, tmp_path / "backups")
    await restore(tmp_path / "backups", tmp_path / "new", now=4e9)
    async with open_registry(tmp_path / "new", clock=lambda: 3e9) as restored:
        await restored.collector.collect()
        [tag] = await restored.retention.tags(REPO, None)
        assert tag.unrecorded_until == 3e9
        assert not await restored.metadata.has_future_times()
