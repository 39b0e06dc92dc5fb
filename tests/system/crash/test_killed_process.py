"""A test that kills a process at the durable steps of its requests. Acknowledged content is complete afterwards, no
partial content is visible, and later requests work."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from tests.fakes.server_process import ROOT
from tests.system.crash.crash_runs import assert_consistent
from tests.system.crash.durable_steps import BOOT
from tests.system.crash.workload import RequestLog, StateCheck, files_below, referred_files, sweep


async def _check(data: Path, request_log: RequestLog, *, thorough: bool) -> None:
    """Checks the data directory of a killed process. `request_log`: the requests that the process had begun and
    acknowledged. `thorough`: also checks the whole store, and covers every shard with garbage collection."""
    prepare_data_dir(data)
    async with open_registry(data, grace=0, boot=BOOT) as registry:
        if thorough:
            await assert_consistent(registry)
        check = StateCheck(registry, request_log)
        await check.check_all()
    async with open_registry(data, grace=0, expire=60, boot=BOOT, clock=lambda: time.time() + 3600) as registry:
        referred = referred_files(data, sorted({key for state in check.states for key in state.referred_blobs()}))
        for _ in range(2):
            await registry.collector.collect()
        if thorough or not set(files_below(data / "blobs")) <= referred:
            await sweep(registry)
        await StateCheck(registry, request_log).manifests()
        assert set(files_below(data / "blobs")) <= referred, "garbage is left"
        assert not list((data / "trash").iterdir())
        assert not list((data / "uploads").iterdir())
        assert not list((data / "partials").iterdir())


@pytest.mark.parametrize("when", ["before", "after"])
def test_nothing_acknowledged_is_lost_when_the_process_is_killed_at_a_durable_step(
    when: str, memory_folder: Path
) -> None:
    """Kills a process at each of the tried durable steps of the workload, which include each kind of step. The content
    that the process has acknowledged is then there, byte for byte. No partial blob is visible, the reported offset of
    upload sessions is true, and the collector finds all garbage. After every eighth kill, a check of the whole store
    finds no problem."""
    command = [
        sys.executable,
        "-m",
        "tests.system.crash.killed_at_step",
        str(memory_folder),
        when,
        str(random.random()),
    ]
    kills = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as helper:
        assert helper.stdout is not None
        for line in helper.stdout:
            report = json.loads(line)
            request_log = RequestLog()
            for kind, request in report["announcements"]:
                request_log.note(kind, request)
            data = memory_folder / str(report["number"])
            try:
                asyncio.run(_check(data, request_log, thorough=kills % 8 == 0))
            except BaseException as error:
                helper.kill()
                error.add_note(f"killed {when} step {report['number']}; under way: {request_log.unacknowledged}")
                raise
            shutil.rmtree(data)
            kills += report["code"] == -signal.SIGKILL
    assert helper.returncode == 0
    assert report["code"] == 0, "the last process should have completed the workload"
    assert not request_log.unacknowledged
    assert report["number"] > 100, "the workload has fewer durable steps than expected"
    assert kills > (60 if when == "before" else 20), "too few steps were tried"
