"""Processes that are killed at a durable step: `python -m tests.system.crash.killed_at_step RESULTS_FOLDER
before|after`.

For n = 1, 2, … (1, 4, …) a fresh process runs the script on a data directory of its own, FOLDER/n, and kills itself
with SIGKILL before (after) its nth durable step. One JSON line a process says what it had been told until then; the
last line is of the process that came through.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.system import System
from tests.system.crash.workload import Event, Workload

T = TypeVar("T")
BOOT = "first run of the machine"


class KillingSystem(System):
    """Kills its process before or after durable step `number`, counted from 1. An open counts where it may create."""

    def __init__(self, number: int, after: bool) -> None:
        super().__init__()
        self.left = number
        self._after = after

    def _step(self, step: Callable[[], T]) -> T:
        self.left -= 1
        if self.left == 0 and not self._after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return step()
        finally:
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        if flags & os.O_EXCL:
            return self._step(lambda: System.open(self, path, flags, mode))
        return super().open(path, flags, mode)

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        return self._step(lambda: System.write(self, fd, chunks, offset))

    def truncate(self, fd: int, size: int) -> None:
        self._step(lambda: System.truncate(self, fd, size))

    def sync(self, fd: int) -> None:
        self._step(lambda: System.sync(self, fd))

    def rename(self, source: Path, target: Path) -> None:
        self._step(lambda: System.rename(self, source, target))

    def link(self, fd: int, target: Path) -> None:
        self._step(lambda: System.link(self, fd, target))

    def unlink(self, path: Path) -> None:
        self._step(lambda: System.unlink(self, path))

    def mkdir(self, path: Path) -> None:
        self._step(lambda: System.mkdir(self, path))

    def rmdir(self, path: Path) -> None:
        self._step(lambda: System.rmdir(self, path))

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        self._step(lambda: System.commit(self, commit, durable=durable))


async def _day(data: Path, system: System, tell: Callable[[str, Event], None]) -> None:
    async with open_registry(data, grace=0, system=system, boot=BOOT) as registry:
        await Workload(registry, tell).run()


def _live(data: Path, number: int, after: bool, report: int) -> None:
    def tell(kind: str, event: Event) -> None:
        os.write(report, json.dumps([kind, event]).encode() + b"\n")

    prepare_data_dir(data)
    asyncio.run(_day(data, KillingSystem(number, after), tell))


def main(folder: Path, after: bool) -> None:
    # Dead after a step or before the next one: the disk is the same, so a few of these are enough.
    for number in range(1, 1000, 3 if after else 1):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                _live(folder / str(number), number, after, writing)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading, "rb") as pipe:
            told = [json.loads(line) for line in pipe]
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"number": number, "code": code, "told": told}), flush=True)
        if code != -signal.SIGKILL:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "after")
