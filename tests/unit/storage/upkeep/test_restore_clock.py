"""Restores from a backup on a machine whose clock was ahead or behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.composition import open_registry
from storage.store.stored_registry import StoredRegistry
from storage.upkeep import collector
from tests.fakes.registry_content import push_image
from tests.unit.storage.upkeep.test_backup import EVENTS, REPO, backup, restore
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
        [tag] = await restored.retention.tag_facts(REPO, None)
        assert tag.unrecorded_until == 3e9
        assert not await restored.metadata.has_future_times()


async def test_a_restore_while_the_clock_is_behind(store: StoredRegistry, tmp_path: Path) -> None:
    """Pulls count as recorded since the latest of three times: the restore, the backup, and an earlier restore. So a
    clock that is behind does not make this time too early."""
    await push_image(store, REPO, "one", "v1")
    await backup(store, tmp_path / "first", now=2e9)
    await restore(tmp_path / "first", tmp_path / "second", now=1e9)
    async with open_registry(tmp_path / "second") as restored:
        [tag] = await restored.retention.tag_facts(REPO, None)
        assert tag.unrecorded_until == 2e9
        await backup(restored, tmp_path / "third", now=1.1e9)
    await restore(tmp_path / "third", tmp_path / "fourth", now=1.2e9)
    async with open_registry(tmp_path / "fourth") as restored:
        [tag] = await restored.retention.tag_facts(REPO, None)
        assert tag.unrecorded_until == 2e9


@pytest.mark.parametrize("is_on_at_backup", [True, False])
async def test_event_numbers_do_not_depend_on_the_clock(
    store: StoredRegistry, tmp_path: Path, is_on_at_backup: bool
) -> None:
    """Events after a restore have higher numbers than all earlier ones, also if the clock is behind during the restore,
    and if the backup was made before the first event."""
    if is_on_at_backup:
        await store.outbox.configure(EVENTS)
    await push_image(store, REPO, "one", "v1")
    await backup(store, tmp_path / "backups")
    await store.outbox.configure(EVENTS)
    await push_image(store, REPO, "after the backup", "v1")
    newest = await store.outbox.newest_number()
    assert newest > 0
    await restore(tmp_path / "backups", tmp_path / "new", now=1e8)
    async with open_registry(tmp_path / "new") as restored:
        assert await restored.outbox.newest_number() > newest
        assert await restored.outbox.first_complete_number() == await restored.outbox.newest_number() + 1
        await restored.outbox.configure(EVENTS)
        await push_image(restored, REPO, "after the restore", "v1")
        page = await restored.outbox.after(newest, 100)
        assert page.events
        assert min(event.number for event in page.events) > newest + 1
