"""Backups and restores after the clock of the machine was ahead for some time and was then set back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from storage.composition import restore_data_dir
from storage.jobs import JSON
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.backup.restore import RestoreOptions
from storage.upkeep.reporter import PlainReporter
from tests.fakes.registry_content import push_image
from tests.unit.storage.upkeep.test_backup import REPO, backup, check_image
from tests.unit.storage.upkeep.test_backup import store as store

YEAR = 365 * 86_400.0


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.slow
async def test_a_new_backup_replaces_backups_from_the_future(store: StoredRegistry, tmp_path: Path, keep: int) -> None:
    """Backups that were made while the clock was ahead count as the oldest ones. `keep` deletes them before others, and
    never deletes the backup that was just made."""
    now, target = time.time(), tmp_path / "backups"
    made = [(await backup(store, target, now=moment))[0]["snapshot"] for moment in (now + YEAR, now - 10)]
    result, _ = await backup(store, target, now=now, keep=keep)

    # Of three backups, the oldest `3 - keep` are deleted. The backup from the future counts as the oldest.
    assert result["removed_snapshots"] == made[: 3 - keep]
    names = {path.name for path in (target / "snapshots").iterdir()}
    assert names == {*made[3 - keep :], result["snapshot"]}


@pytest.mark.parametrize("future_backups", [1, 2])
@pytest.mark.slow
async def test_a_restore_prefers_a_backup_of_the_past(
    store: StoredRegistry, tmp_path: Path, future_backups: int
) -> None:
    """A restore takes the newest backup whose time is not in the future, and warns that other backups are from the
    future. If all are from the future, it takes the last of them, with the same warning. A restore of a backup that the
    operator names does not warn."""
    now, target = time.time(), tmp_path / "backups"
    await push_image(store, REPO, "old", "v1")
    first, _ = await backup(store, target, now=now + YEAR)
    new = await push_image(store, REPO, "new", "v2")
    second, _ = await backup(store, target, now=now if future_backups == 1 else now + 2 * YEAR)
    steps: list[Mapping[str, JSON]] = []
    await restore_data_dir(tmp_path / "new", RestoreOptions(target), PlainReporter(steps.append, lambda _: None))

    await check_image(tmp_path / "new", "v2", new.digest)
    [reason] = [str(step["reason"]) for step in steps if step["event"] == "warning"]
    last_of_the_future = first if future_backups == 1 else second
    assert f"{future_backups} of 2 backups are in the future, up to {last_of_the_future['snapshot']}:" in reason
    assert f"restoring {second['snapshot']};" in reason
    steps.clear()
    options = RestoreOptions(target, snapshot=first["snapshot"])
    await restore_data_dir(tmp_path / "old", options, PlainReporter(steps.append, lambda _: None))
    assert "warning" not in [step["event"] for step in steps]
