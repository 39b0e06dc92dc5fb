"""Processes that are killed at a durable step: `python -m tests.system.crash.killed_at_step RESULTS_FOLDER before|after
SEED`.

For each tried step (`durable_steps`), a new process runs the script on its own data directory, FOLDER/n, and kills
itself with SIGKILL before (after) its nth durable step. One JSON line for each process says what it had acknowledged
until then. The last line is that of a process that completed the script.
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
from tests.system.crash.workload import Event, Workload


async def _day(data: Path, system: System, tell: Callable[[str, Event], None]) -> None:
    async with open_registry(data, grace=0, system=system, boot=BOOT) as registry:
        await Workload(registry, tell).run()


def _live(data: Path, number: int, after: bool, report: int) -> None:
    def tell(kind: str, event: Event) -> None:
        os.write(report, json.dumps([kind, event]).encode() + b"\n")

    prepare_data_dir(data)
    asyncio.run(_day(data, KillingSystem(number, after), tell))


def _chosen(data: Path, after: bool, chance: random.Random) -> tuple[list[int], int]:
    """Returns the numbers of the tried steps, and the number of all steps.

    A death after a step leaves the same disk as a death before the next step. But the last step of an event is then
    done and not acknowledged. So deaths after a step are tried only at the last steps of events."""
    prepare_data_dir(data)
    recorder, ends = StepRecorder(data), list[int]()

    def tell(kind: str, event: Event) -> None:
        recorder.during = tuple(event[: 2 if event[0] == "right" else 1]) if kind == "begin" else None
        if kind == "done" and recorder.kinds:
            ends.append(len(recorder.kinds))

    asyncio.run(_day(data, recorder, tell))
    steps = len(recorder.kinds)
    if not after:
        return choose_steps(recorder.kinds, chance), steps
    ends = sorted(set(ends))
    return [ends[number - 1] for number in choose_steps([recorder.kinds[end - 1] for end in ends], chance)], steps


def main(folder: Path, after: bool, chance: random.Random) -> None:
    chosen, steps = _chosen(folder / "recorded", after, chance)
    for number in chain(chosen, count(steps + 1)):
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
    main(Path(sys.argv[1]), sys.argv[2] == "after", random.Random(sys.argv[3]))
