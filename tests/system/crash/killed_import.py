"""Imports of a directory that are killed at a durable step: `python -m tests.system.crash.killed_import OLD
RESULTS_FOLDER`.

For n = 1, 2, … a fresh process imports the directory OLD into a data directory of its own, RESULTS_FOLDER/n, and kills
itself with SIGKILL before its nth durable step. One line a process says how it ended; the last came through.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from registry.migration.directory_import import KIND, import_directory
from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.system import System
from tests.fakes.import_run import ImportRun
from tests.system.crash.killed_at_step import BOOT, KillingSystem


async def import_once(old: Path, data: Path, system: System | None = None, boot: str = BOOT) -> None:
    """Imports the directory `old`, and demands that all of it could be imported."""
    async with open_registry(data, grace=0, system=system, boot=boot) as store:
        result = await ImportRun(store, KIND, import_directory, path=str(old))()
    assert result["problems"] == 0


def main(old: Path, folder: Path) -> None:
    for number in range(1, 1000):
        child = os.fork()
        if child == 0:
            try:
                data = folder / str(number)
                prepare_data_dir(data)
                asyncio.run(import_once(old, data, KillingSystem(number, after=False)))
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(number, code, flush=True)
        if code != -signal.SIGKILL:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
