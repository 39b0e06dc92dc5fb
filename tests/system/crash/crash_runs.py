"""Functions that interrupt work at its durable steps, by SIGKILL or by a simulated power cut, and call a check after
each interruption.

A *durable step* is one change of the disk, such as a write, a sync, a rename, or a commit of the database. A *run* is a
coroutine function that does the work on a data directory, with a given `System` for the changes of the disk. For
SIGKILL, a program forks one process for each tried durable step (`die_before_each_step`), and the test checks the data
directory that each process has left (`check_killed_runs`). For a power cut, the test records one run and computes the
disks that a power cut could leave (`check_power_cuts`).
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Set
from itertools import chain, count
from pathlib import Path
from typing import Any

from storage.consistency import ProblemCode
from storage.data_dir.system import System
from storage.names import Digest, Reference, RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, ConfirmedProblem
from tests.fakes.server_process import ROOT
from tests.system.crash.durable_steps import KillingSystem, StepRecorder, choose_steps
from tests.system.crash.power_cut_disk import DiskAfterCut, RecordingSystem, ReplayedDisk

Run = Callable[[Path, System], Awaitable[object]]
NO_PROBLEMS: frozenset[ProblemCode] = frozenset()
CHOICE = "ENTREPOT_CHOICE"
"""The environment variable with the random seed for the choice of the steps that are tried."""


async def find_problems(store: StoredRegistry, options: CheckOptions | None = None) -> list[ConfirmedProblem]:
    """Checks the store and the bytes in it, as `entrepot fsck --hash` does. Returns the problems."""
    found: list[ConfirmedProblem] = []

    async def on_problem(finding: ConfirmedProblem) -> None:
        found.append(finding)

    async def on_progress(done: int, total: int, message: str) -> None:
        pass

    await store.checker.check(options or CheckOptions(hash_bytes=True), on_problem, on_progress)
    return found


async def assert_consistent(
    store: StoredRegistry, expected: Set[ProblemCode] = NO_PROBLEMS, options: CheckOptions | None = None
) -> None:
    """Checks that the store has no problems except those of the kinds in `expected`."""
    found = [finding.problem for finding in await find_problems(store, options)]
    unexpected = [problem for problem in found if problem.code not in expected]
    assert not unexpected, unexpected


async def pulled_blobs(store: StoredRegistry, repo: RepositoryName, reference: Reference) -> set[Digest]:
    """Returns the blobs of an image with all its platforms and referrers. Checks that each of them exists."""
    manifest = await store.get_manifest(repo, reference)
    blobs = {blob.digest for blob in manifest.blobs}
    for digest in blobs:
        await store.resolve_blob(repo, digest)
    referrers = (await store.referrers(repo, manifest.digest, None, None, 100)).items
    for child in [*manifest.manifests, *referrers]:
        blobs |= await pulled_blobs(store, repo, child.digest)
    return blobs


def die_before_each_step(folder: Path, run: Run, steps: Iterator[int] | None = None) -> None:
    """For each tried step n, forks a process that does the work on the directory FOLDER/n and kills itself with SIGKILL
    before its nth durable step. FOLDER/n is a copy of FOLDER/start, if that exists. The tried steps are `steps`, or
    those that the module `durable_steps` chooses. Prints one line for each process, with n and the exit code. The last
    process completes the work."""
    for number in steps or _chosen_steps(folder, run):
        data = folder / str(number)
        if (folder / "start").exists():
            shutil.copytree(folder / "start", data)
        child = os.fork()
        if child == 0:
            try:
                asyncio.run(_run_in_child(run, data, KillingSystem(number, after=False)))
                os._exit(0)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(number, code, flush=True)
        if code != -signal.SIGKILL:
            return


def _chosen_steps(folder: Path, run: Run) -> Iterator[int]:
    """Returns the numbers of the steps before which processes are killed. After them come numbers beyond the last step,
    so that the last process completes the work."""
    data = folder / "recorded"
    if (folder / "start").exists():
        shutil.copytree(folder / "start", data)
    recorder = StepRecorder(data)
    asyncio.run(_run_in_child(run, data, recorder))
    shutil.rmtree(data)
    return chain(choose_steps(recorder.kinds, random.Random(os.environ[CHOICE])), count(len(recorder.kinds) + 1))


async def _run_in_child(run: Run, data: Path, system: System) -> None:
    await run(data, system)


def check_killed_runs(
    module: str, folder: Path, *arguments: str, check: Callable[[Path, int], Coroutine[Any, Any, None]]
) -> int:
    """Runs the program `python -m module FOLDER ARGUMENTS…`, which calls `die_before_each_step`. For each process that
    the program kills, and for the last one, awaits `check(FOLDER/n, n)` with its data directory. Returns the number of
    durable steps."""
    command = [sys.executable, "-m", module, str(folder), *arguments]
    environment = {**os.environ, CHOICE: str(random.random())}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as helper:
        assert helper.stdout is not None
        for line in helper.stdout:
            number, code = map(int, line.split())
            data = folder / str(number)
            try:
                asyncio.run(check(data, number))
            except BaseException as error:
                helper.kill()
                error.add_note(f"killed before step {number}")
                raise
            shutil.rmtree(data)
    assert helper.returncode == 0
    assert code == 0, "the last process should have completed the work"
    return number - 1


async def check_power_cuts(
    recorded_data: Path,
    run: Run,
    check: Callable[[Path, int], Awaitable[None]],
    *,
    mixtures: int = 2,
    every: int = 1,
    system: RecordingSystem | None = None,
    write_disk: Callable[[DiskAfterCut, Path], None] = DiskAfterCut.write_as_data_dir,
    look_at: Callable[[DiskAfterCut], None] = lambda _: None,
    check_end: Callable[[Path], Awaitable[None]] | None = None,
) -> int:
    """Does the work on the directory `recorded_data`. Then computes the disks that a power cut after each durable step
    could leave, and awaits `check(data, n)` for the nth disk, with its content in the directory `data`. A disk that
    equals an earlier one is skipped. Returns the number of different disks.

    `mixtures`: number of disks per step that have a random part of the changes that are not durable yet. `every`: only
    each `every`th of the different disks is checked; the disks after the last step are all checked. `system` records
    the work. `write_disk` writes the content of a disk into a directory. `look_at` is called with every different disk.
    `check_end` is the last check. It gets the disk with the least content that a power cut after the last step could
    leave."""
    data = recorded_data.with_name(f"{recorded_data.name} after a cut")
    shutil.copytree(recorded_data, data)
    system = system or RecordingSystem(recorded_data)
    system.record_existing()
    disk = ReplayedDisk(system.snapshot())
    entries_before_run = len(system.log)
    await run(recorded_data, system)
    different_disks: set[object] = set()
    for number, entry in enumerate(system.log):
        disk.follow(entry)
        if number < entries_before_run - 1:
            continue  # this entry describes content that the directory had before the run
        for disk_after_cut in disk.cuts(number, mixtures):
            disk_identity = (tuple(sorted(disk_after_cut.names.items())), disk_after_cut.metadata)
            if disk_identity in different_disks:
                continue
            different_disks.add(disk_identity)
            try:
                look_at(disk_after_cut)
                if len(different_disks) % every and number + 1 < len(system.log):
                    continue
                write_disk(disk_after_cut, data)
                await check(data, len(different_disks))
            except BaseException as error:
                error.add_note(f"power cut after step {number}, {entry[:3]!r:.200}; disk: {disk_after_cut.how}")
                raise
    if check_end is not None:
        write_disk(next(disk.cuts(0, 0)), data)  # the first disk has the least content
        await check_end(data)
    return len(different_disks)
