"""A test of power cuts: computes the disks that a power cut after each tried durable step of the workload could leave,
and checks the registry on each of them (see `power_cut_disk` for the assumptions)."""

from __future__ import annotations

import random
import time
from pathlib import Path

from storage.composition import open_registry, prepare_data_dir
from tests.system.crash.crash_runs import assert_consistent
from tests.system.crash.durable_steps import choose_steps
from tests.system.crash.power_cut_disk import RecordingSystem, ReplayedDisk, kinds_of
from tests.system.crash.workload import RequestLog, StateCheck, Workload, files_below, referred_files, sweep

MIXTURES = 2
"""The number of random disks for each step, besides the three fixed ones."""


async def _record(data: Path) -> tuple[ReplayedDisk, RecordingSystem]:
    """Runs the workload. Returns the disk before it, and the system that has recorded the steps."""
    prepare_data_dir(data)
    system = RecordingSystem(data)
    disk = ReplayedDisk(system.snapshot())
    async with open_registry(data, grace=0, system=system, boot="first run") as registry:
        await Workload(registry, system.announce).run()
    return disk, system


async def _check(data: Path, request_log: RequestLog, thorough: bool) -> None:
    """Checks the registry on a disk after a power cut. `request_log`: the requests that had begun and were
    acknowledged. `thorough`: also checks the whole store, new pushes and garbage collection."""
    async with open_registry(data, grace=0, boot="second run") as registry:
        if thorough:
            await assert_consistent(registry)
        check = StateCheck(registry, request_log, survived=False)
        await check.blobs()
        await check.manifests()
        await check.uploads()
        await check.partials()
        if thorough:
            await check.push_again()
    if thorough:
        clock = lambda: time.time() + 3600  # noqa: E731
        async with open_registry(data, grace=0, expire=60, boot="second run", clock=clock) as registry:
            await sweep(registry)
            await StateCheck(registry, request_log).manifests()
        referred = {key for state in check.states for key in state.referred_blobs()}
        assert set(files_below(data / "blobs")) <= referred_files(data, sorted(referred)), "garbage is left"
        assert not list((data / "trash").iterdir())
        assert not list((data / "uploads").iterdir())
        assert not list((data / "partials").iterdir())


async def test_nothing_acknowledged_is_lost_in_a_power_cut_after_any_step(memory_folder: Path) -> None:
    """Checks the disks that a power cut after each of the tried durable steps of the workload could leave. The tried
    steps include each kind of step. Acknowledged content is there, byte for byte. No partial content is served. The
    reported offset of upload sessions is true, and the sessions can be completed."""
    disk, system = await _record(memory_folder / "recorded")
    data = memory_folder / "data"
    prepare_data_dir(data)
    different_disks: set[object] = set()
    log = system.log
    # The power is cut after these entries. An entry just before an `announced` entry is left out, because the disk is
    # the same after both.
    cut_points = [number for number, (after, *_) in enumerate([*log[1:], ("end",)]) if after != "announced"]
    kinds = kinds_of(log)
    chosen = {
        cut_points[step - 1]
        for step in choose_steps([kinds[cut_point] for cut_point in cut_points], random.Random(random.random()))
    }
    for number, entry in enumerate(log):
        disk.follow(entry)
        if number not in chosen:
            continue
        for disk_after_cut in disk.cuts(number, MIXTURES):
            disk_identity = (
                tuple(sorted(disk_after_cut.names.items())),
                disk_after_cut.metadata,
                len(disk.request_log.acknowledged),
                len(disk.request_log.unacknowledged),
            )
            if disk_identity in different_disks:
                continue
            different_disks.add(disk_identity)
            disk_after_cut.write_as_data_dir(data)
            try:
                await _check(data, disk.request_log, thorough=len(different_disks) % 16 == 0)
            except BaseException as error:
                names = sorted(disk_after_cut.names)
                error.add_note(f"power cut after step {number}, {entry[:3]!r:.100}; {disk_after_cut.how}: {names}")
                error.add_note(f"under way: {disk.request_log.unacknowledged}")
                raise
    assert not disk.request_log.unacknowledged
    assert len(cut_points) > 100
    assert len(different_disks) > 80
