"""SIGKILL before every durable step of scrub, and a power cut after each: damaged bytes are never served as right ones,
and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.errors import BlobUnknown
from storage.names import Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import read_blob
from tests.fakes.scrub_runs import file_of, quarantined_file, scrub
from tests.fakes.server_process import ROOT
from tests.system.crash.killed_at_step import BOOT
from tests.system.crash.killed_scrub import APP, BODIES, DAMAGE, QUARANTINE_BYTES, digest, push_all
from tests.system.crash.power_cut_disk import RecordingSystem, ReplayedDisk
from tests.system.crash.workload import files_below, sweep


async def _is_served(registry: StoredRegistry, name: str) -> bool:
    try:
        return await read_blob(registry, APP, digest(name)) == BODIES[name]
    except BlobUnknown:
        return False


async def _check(data: Path, *, kept: tuple[int, ...] = (1,), thorough: bool) -> None:
    """Whatever the process left: the next scrub completes its work, a push of the image makes all whole, and, looked at
    if `thorough`, there is no garbage that the collector does not find. `kept`: how many blobs' damaged bytes the
    quarantine may have."""
    prepare_data_dir(data)
    async with open_registry(data, grace=0, boot=BOOT) as registry:
        for blob in (await registry.damage.damaged_blobs(None, 10)).items:
            assert await registry.damage.place_of(blob.digest) == ""
        await scrub(registry, quarantine_bytes=QUARANTINE_BYTES)
        damaged = {blob.digest for blob in (await registry.damage.damaged_blobs(None, 10)).items}
        assert damaged == {digest(name) for name in (*DAMAGE, "last")}
        assert [await _is_served(registry, name) for name in BODIES] == [name == "whole" for name in BODIES]
        assert not any(file_of(registry, each).exists() for each in damaged)
        assert sum(quarantined_file(registry, each).exists() for each in damaged) in kept
        manifest = await push_all(registry)
        assert (await registry.get_manifest(APP, Tag("latest"))).body == manifest.body
        assert all([await _is_served(registry, name) for name in BODIES])
        assert (await scrub(registry))[0]["damaged"] == 0
        if thorough:
            await sweep(registry)
            assert set(files_below(data / "blobs")) == {file_of(registry, digest(name)) for name in BODIES}
            assert not list((data / "trash").iterdir())


@pytest.mark.slow
def test_scrub_killed_before_each_durable_step(quick: Path) -> None:
    command = [sys.executable, "-m", "tests.system.crash.killed_scrub", str(quick)]
    deaths = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as helper:
        assert helper.stdout is not None
        for line in helper.stdout:
            report = json.loads(line)
            data = quick / str(report["number"])
            try:
                asyncio.run(_check(data, thorough=report["number"] % 4 == 0))
            except BaseException as error:
                helper.kill()
                error.add_note(f"killed before step {report['number']}")
                raise
            shutil.rmtree(data)
            deaths += report["code"] == -signal.SIGKILL
    assert helper.returncode == 0
    assert report["code"] == 0, "the last process should have come through"
    assert deaths >= 10, "scrub has fewer durable steps than it should"


class _DamagingSystem(RecordingSystem):
    """Records durable steps, and can damage a file so that the replayed disk has the damage too."""

    def damage(self, name: str, file: Path) -> None:
        if name == "deleted":
            self.unlink(file)
            fd = self.open(file.parent, os.O_RDONLY)
        else:
            fd = self.open(file, os.O_RDWR)
            if name == "cut":
                self.truncate(fd, file.stat().st_size - 1)
            else:
                self.write(fd, [bytes([file.read_bytes()[0] ^ 1])], 0)
        self.sync(fd)
        os.close(fd)


@pytest.mark.slow
async def test_a_power_cut_after_each_durable_step_of_scrub(quick: Path) -> None:
    recorded, data = quick / "recorded", quick / "data"
    prepare_data_dir(recorded)
    prepare_data_dir(data)
    system = _DamagingSystem(recorded)
    disk = ReplayedDisk(system.snapshot())
    async with open_registry(recorded, system=system, boot=BOOT) as registry:
        await push_all(registry)
        for name in (*DAMAGE, "last"):
            system.damage(name, file_of(registry, digest(name)))
        before = len(system.log)
        await scrub(registry, quarantine_bytes=QUARANTINE_BYTES)
    done: set[object] = set()
    for number, entry in enumerate(system.log):
        disk.follow(entry)
        if number < before - 1:
            continue
        for left in disk.cuts(number, 2):
            mark = (tuple(sorted(left.names.items())), left.metadata)
            if mark not in done:
                done.add(mark)
                left.lay_out(data)
                try:
                    # The cut may undo the move of the bytes, or only a half of it.
                    await _check(data, kept=(0, 1), thorough=len(done) % 8 == 0)
                except BaseException as error:
                    error.add_note(f"power cut after step {number}, {entry[:3]!r:.100}; left: {left.how}")
                    raise
    assert len(done) > 10
