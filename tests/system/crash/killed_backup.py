"""Kills processes before the durable steps (changes of the disk) of a backup or a restore: `python -m
tests.system.crash.killed_backup FOLDER SOURCE backup|restore` (see `crash_runs`).

Most steps make or sync one of the 512 directories of blobs. Only some of these steps are tried.
"""

from __future__ import annotations

import asyncio
import itertools
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from storage.composition import open_registry, prepare_data_dir, restore_data_dir
from storage.content import Manifest
from storage.data_dir.system import System
from storage.names import Tag
from storage.upkeep.backup.backup import BackupOptions, make_backup
from storage.upkeep.backup.restore import RestoreOptions
from storage.upkeep.reporter import PlainReporter
from tests.fakes.registry_content import BY, image_of, push_blob, push_image
from tests.fakes.upkeep_store import APP
from tests.system.crash.crash_runs import die_before_each_step
from tests.system.crash.durable_steps import BOOT, KillingSystem

FIRST_TIME, SECOND_TIME = 1e9, 15e8
"""The times of the two backups, in seconds since 1970."""
LARGE = bytes(range(256)) * 1000
"""The content of a blob that is too large to be read at once."""


async def make_source(data: Path, backups: Path) -> Manifest:
    """Makes a store and backs it up. Then deletes one of its images and pushes a new one. Returns an image that the
    store has before and after this change."""
    prepare_data_dir(data)
    async with open_registry(data, grace=0, boot=BOOT) as store:
        large = await push_blob(store, APP, LARGE)
        kept_image = image_of(await push_blob(store, APP, b"config"), [large])
        await store.put_manifest(APP, kept_image, [Tag("kept")], by=BY)
        old = await push_image(store, APP, "old", "old")
    await back_up(data, backups, System(), FIRST_TIME)
    async with open_registry(data, grace=0, boot=BOOT) as store:
        await store.delete_manifest(APP, old.digest, by=BY)
        await store.collector.collect()
        await push_blob(store, APP, LARGE[1:])
        new = await push_image(store, APP, "new", "new")
        await store.put_manifest(APP, new, [Tag("again")], by=BY)
    return kept_image


def quiet_reporter() -> PlainReporter:
    return PlainReporter(lambda _: None, lambda _: None)


async def back_up(source: Path, backups: Path, system: System, now: float = SECOND_TIME) -> None:
    """Backs up the data directory `source`, and keeps only this backup."""
    async with open_registry(source, grace=0, system=system, boot=BOOT) as store:
        parts = store.snapshots, store.blobs, store.leases, BackupOptions(backups, keep=1), quiet_reporter()
        result: Any = await make_backup(*parts, clock=lambda: now, holder="test", system=system)
    assert result["missing"] == []


async def back_up_in(source: Path, folder: Path, system: System) -> None:
    """Backs `source` up into the subdirectory `backups`."""
    await back_up(source, folder / "backups", system)


async def restore_in(backups: Path, folder: Path, system: System) -> None:
    """Restores the newest backup into the subdirectory `data`."""
    await restore_data_dir(folder / "data", RestoreOptions(backups), quiet_reporter(), system=system)


def chosen_steps(count: int) -> Iterator[int]:
    """Returns the numbers of the tried steps, out of `count`: many of the first and the last ones, and few of those
    between, which make and sync directories. With the number `count + 1`, a process completes the work. Sometimes a
    restore takes a few steps more, because it works in several threads: then a process with one of the next numbers
    completes it."""
    tried = sorted({*range(1, 12, 2), *range(12, count, 397), *range(max(count - 30, 1), count, 3), count})
    return itertools.chain(tried, itertools.count(count + 1))


def main(folder: Path, source: Path, command: str) -> None:
    run = partial(back_up_in if command == "backup" else restore_in, source)
    counting = KillingSystem(10**9, after=False)  # counts the steps, and never kills
    shutil.copytree(folder / "start", folder / "whole")
    asyncio.run(run(folder / "whole", counting))
    die_before_each_step(folder, run, chosen_steps(10**9 - counting.steps_left))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
