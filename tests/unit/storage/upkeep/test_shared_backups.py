"""Two registries make their backups in one directory, by mistake."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir, restore_data_dir
from storage.jobs import JSON
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.backup.restore import RestoreOptions
from storage.upkeep.reporter import PlainReporter
from tests.fakes.registry_content import push_image
from tests.fakes.second_connection import second_connection
from tests.unit.storage.upkeep.test_backup import REPO, backup, check_image, restore
from tests.unit.storage.upkeep.test_backup import store as store


def prepare_other_registry(data: Path) -> None:
    """Makes a data directory with a random name of its own; in unit tests, all new ones are copies of one database."""
    prepare_data_dir(data)
    with closing(second_connection(data / "entrepot.db")) as db:
        db.execute("UPDATE access SET instance = lower(hex(randomblob(16)))")


@pytest.mark.slow
async def test_a_backup_keeps_the_backups_of_another_registry(store: StoredRegistry, tmp_path: Path) -> None:
    """`keep` counts and removes only the backups of the same registry. Those of another one can be restored afterwards,
    and the backup warns about them."""
    target = tmp_path / "backups"
    image = await push_image(store, REPO, "one", "v1")
    first, steps = await backup(store, target, now=1e9, keep=1)
    assert "warning" not in [step["event"] for step in steps]
    prepare_other_registry(tmp_path / "other")
    async with open_registry(tmp_path / "other") as other:
        await push_image(other, REPO, "other", "v2")
        await backup(other, target, now=1.1e9, keep=1)
        result, steps = await backup(other, target, now=1.2e9, keep=1)

    assert (result["removed_snapshots"], result["removed_blobs"]) == (["2004-11-09T11-33-20Z"], 0)
    [reason] = [str(step["reason"]) for step in steps if step["event"] == "warning"]
    assert f"1 backup of another registry than this one, such as {first['snapshot']};" in reason
    await restore(target, tmp_path / "new", snapshot=first["snapshot"])
    await check_image(tmp_path / "new", "v1", image.digest)


@pytest.mark.slow
async def test_a_restore_warns_of_the_backups_of_another_registry(store: StoredRegistry, tmp_path: Path) -> None:
    """A restore without the name of a snapshot takes the newest backup of all registries, and says so. A restore of a
    backup that the operator names does not warn. A restored registry is the same registry: its backups replace those
    that were made before the restore."""
    target = tmp_path / "backups"
    first, _ = await backup(store, target, now=1e9)
    prepare_other_registry(tmp_path / "other")
    async with open_registry(tmp_path / "other") as other:
        second, _ = await backup(other, target, now=1.1e9)
    steps: list[Mapping[str, JSON]] = []
    reporter = PlainReporter(steps.append, lambda _: None)
    await restore_data_dir(tmp_path / "new", RestoreOptions(target), reporter)
    [reason] = [str(step["reason"]) for step in steps if step["event"] == "warning"]
    assert reason.startswith(f"restoring {second['snapshot']}; ")
    assert f"1 backup of another registry than that of this backup, such as {first['snapshot']};" in reason

    steps.clear()
    await restore_data_dir(tmp_path / "old", RestoreOptions(target, snapshot=first["snapshot"]), reporter)
    assert "warning" not in [step["event"] for step in steps]
    async with open_registry(tmp_path / "old") as restored:
        result, _ = await backup(restored, target, now=1.2e9, keep=1)
    assert result["removed_snapshots"] == [first["snapshot"]]
