"""SIGKILL at every durable step of retention: what is kept is whole, and the next run completes the work."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import all_tags
from tests.fakes.server_process import ROOT
from tests.fakes.upkeep_store import APP, START, Clock
from tests.system.crash.killed_retention import WEB, run_retention
from tests.system.crash.workload import files_below

KEPT = ["c", "d", "v1"]


async def pulled_blobs(store: StoredRegistry, repo: RepositoryName, reference: Reference) -> set[Digest]:
    """The blobs of an image with all platforms and referrers, each of which must be there."""
    manifest = await store.get_manifest(repo, reference)
    blobs = {blob.digest for blob in manifest.blobs}
    for digest in blobs:
        await store.resolve_blob(repo, digest)
    referrers = (await store.referrers(repo, manifest.digest, None, None, 100)).items
    for child in [*manifest.manifests, *referrers]:
        blobs |= await pulled_blobs(store, repo, child.digest)
    return blobs


async def check(data: Path) -> None:
    clock = Clock(START + 2_000_000)
    prepare_data_dir(data)
    async with open_registry(data, grace=0, clock=clock) as store:
        for repo in (APP, WEB):
            tags = await all_tags(store, repo)
            assert set(tags) >= set(KEPT)
            for tag in tags:
                await pulled_blobs(store, repo, Tag(tag))
        await run_retention(store, clock)
        clock.now += 1000
        for _ in range(2):
            await store.collector.collect()
        needed: set[Digest] = set()
        for repo in (APP, WEB):
            assert await all_tags(store, repo) == KEPT
            for tag in KEPT:
                needed |= await pulled_blobs(store, repo, Tag(tag))
    hashes = {digest.partition(":")[2] for digest in needed}
    assert {file.name for file in files_below(data / "blobs")} == hashes, "garbage is left"


@pytest.mark.slow
def test_retention_is_completed_after_a_kill(quick: Path) -> None:
    """For every durable step: all that has a tag can be pulled, the next run deletes the rest, and the collector then
    leaves no blob that nothing needs."""
    command = [sys.executable, "-m", "tests.system.crash.killed_retention", str(quick)]
    deaths = 0
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as helper:
        assert helper.stdout is not None
        for line in helper.stdout:
            report = json.loads(line)
            try:
                asyncio.run(check(quick / str(report["number"])))
            except BaseException as error:
                helper.kill()
                error.add_note(f"killed before step {report['number']}")
                raise
            deaths += report["code"] == -signal.SIGKILL
    assert helper.returncode == 0
    assert report["code"] == 0, "the last process should have come through"
    assert deaths > 10
