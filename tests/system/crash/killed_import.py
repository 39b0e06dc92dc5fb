"""Kills processes before the durable steps (changes of the disk) of an import: `python -m
tests.system.crash.killed_import FOLDER OLD` (see `crash_runs`). OLD is the data directory of another registry, from
which the images are imported."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from registry.migration.directory_import import KIND, import_directory
from storage.composition import open_registry
from storage.data_dir.system import System
from tests.fakes.import_run import ImportRun
from tests.system.crash.crash_runs import die_before_each_step
from tests.system.crash.durable_steps import BOOT


async def import_once(old: Path, data: Path, system: System | None = None, boot: str = BOOT) -> None:
    """Imports the directory `old`, and checks that there were no problems."""
    async with open_registry(data, grace=0, system=system, boot=boot) as store:
        result = await ImportRun(store, KIND, import_directory, path=str(old))()
    assert result["problems"] == 0


if __name__ == "__main__":
    die_before_each_step(Path(sys.argv[1]), partial(import_once, Path(sys.argv[2])))
