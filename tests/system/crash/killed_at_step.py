"""Kills processes at the durable steps (changes of the disk) of the workload, which is the module `workload`: `python
-m tests.system.crash.killed_at_step FOLDER before|after SEED`.

For each step n that `durable_steps` chooses, a new process runs the workload on its own data directory, FOLDER/n, and
kills itself with SIGKILL before (or after) its nth durable step. The program prints one JSON line for each process,
with the requests that the process had begun and acknowledged. The last line is for a process that completed the
workload.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.system import System
from tests.system.crash.durable_steps import BOOT, KillingSystem, StepRecorder, choose_steps
from tests.system.crash.workload import Request, Workload


async def _run_workload(data: Path, system: System, announce: Callable[[str, Request], None]) -> None:
    async with open_registry(data, grace=0, system=system, boot=BOOT) as registry:
        await Workload(registry, announce).run()


def _run_until_killed(data: Path, number: int, after: bool, report: int) -> None:
    """Runs the workload, and writes its announcements to the descriptor `report`."""

    def announce(kind: str, request: Request) -> None:
        os.write(report, json.dumps([kind, request]).encode() + b"\n")

    prepare_data_dir(data)
    asyncio.run(_run_workload(data, KillingSystem(number, after), announce))


def _choose_steps(data: Path, after: bool, chance: random.Random) -> tuple[list[int], int]:
    """Returns the numbers of the tried steps, and the number of all steps.

    A kill after a step leaves the same disk as a kill before the next step. Only the last step of a request differs:
    the step is done, but the request is not acknowledged. So kills after a step are tried only at the last steps of
    requests."""
    prepare_data_dir(data)
    recorder, last_steps = StepRecorder(data), list[int]()

    def announce(kind: str, request: Request) -> None:
        # A request `right` is one of several changes of accounts and rights. Its second word names the change.
        recorder.during = tuple(request[: 2 if request[0] == "right" else 1]) if kind == "begin" else None
        if kind == "done" and recorder.kinds:
            last_steps.append(len(recorder.kinds))

    asyncio.run(_run_workload(data, recorder, announce))
    steps = len(recorder.kinds)
    if not after:
        return choose_steps(recorder.kinds, chance), steps
    last_steps = sorted(set(last_steps))
    return [
        last_steps[number - 1] for number in choose_steps([recorder.kinds[end - 1] for end in last_steps], chance)
    ], steps


def main(folder: Path, after: bool, chance: random.Random) -> None:
    chosen, steps = _choose_steps(folder / "recorded", after, chance)
    for number in chain(chosen, count(steps + 1)):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                _run_until_killed(folder / str(number), number, after, writing)
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading, "rb") as pipe:
            announcements = [json.loads(line) for line in pipe]
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        print(json.dumps({"number": number, "code": code, "announcements": announcements}), flush=True)
        if code != -signal.SIGKILL:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "after", random.Random(sys.argv[3]))
