"""SIGKILL before every durable step of scrub: damaged bytes are never served as right ones, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from storage.composition import open_registry, prepare_data_dir
from storage.errors import BlobUnknown
from storage.names import Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import read_blob
from tests.fakes.scrub_runs import file_of, quarantined_file, scrub
from tests.fakes.server_process import ROOT
from tests.system.crash.killed_at_step import BOOT
from tests.system.crash.killed_scrub import APP, BODIES, DAMAGE, digest, push_all
from tests.system.crash.workload import files_below, sweep


async def _is_served(registry: StoredRegistry, name: str) -> bool:
    try:
        return await read_blob(registry, APP, digest(name)) == BODIES[name]
    except BlobUnknown:
        return False


async def _check(data: Path) -> None:
    """Whatever the killed process left: the next scrub completes its work, a push of the image makes all whole, and
    there is no garbage that the collector does not find."""
    prepare_data_dir(data)
    async with open_registry(data, grace=0, boot=BOOT) as registry:
        known = {blob.digest for blob in (await registry.damage.damaged_blobs(None, 10)).items}
        for name in known & {digest(name) for name in BODIES}:
            assert await registry.damage.place_of(name) == ""
        result, _ = await scrub(registry, quarantine_bytes=30_000)
        damaged = {blob.digest for blob in (await registry.damage.damaged_blobs(None, 10)).items}
        assert damaged == {digest(name) for name in (*DAMAGE, "last")}
        assert result["damaged"] <= 3
        assert [await _is_served(registry, name) for name in BODIES] == [name == "whole" for name in BODIES]
        assert not any(file_of(registry, each).exists() for each in damaged)
        assert sum(quarantined_file(registry, each).exists() for each in damaged) == 1
        manifest = await push_all(registry)
        assert (await registry.get_manifest(APP, Tag("latest"))).body == manifest.body
        assert all([await _is_served(registry, name) for name in BODIES])
        assert (await scrub(registry))[0]["damaged"] == 0
        await sweep(registry)
        assert set(files_below(data / "blobs")) == {file_of(registry, digest(name)) for name in BODIES}
        assert not list((data / "trash").iterdir())


def test_scrub_killed_before_each_durable_step(quick: Path) -> None:
    command = [sys.executable, "-m", "tests.system.crash.killed_scrub", str(quick)]
    deaths = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as helper:
        assert helper.stdout is not None
        for line in helper.stdout:
            report = json.loads(line)
            data = quick / str(report["number"])
            try:
                asyncio.run(_check(data))
            except BaseException as error:
                helper.kill()
                error.add_note(f"killed before step {report['number']}")
                raise
            shutil.rmtree(data)
            deaths += report["code"] == -signal.SIGKILL
    assert helper.returncode == 0
    assert report["code"] == 0, "the last process should have come through"
    assert deaths >= 10, "scrub has fewer durable steps than it should"
