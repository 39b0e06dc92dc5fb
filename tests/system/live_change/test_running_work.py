"""Tests that downloads from an upstream and background jobs continue while the server is reloaded or restarted."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from registry.app import Entrepot, create_app
from registry.config import Settings
from registry.live_app import LiveApp
from registry.server.process.lifespan import Lifespan
from storage.composition import open_registry, prepare_data_dir
from storage.jobs import JobState
from tests.fakes.client_images import MIB
from tests.fakes.commands import entrepot
from tests.fakes.hub.hub import repeated
from tests.fakes.mirror_site import MirrorSite, wait_until


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[MirrorSite]:
    with ExitStack() as stack:
        yield MirrorSite(tmp_path, stack)


@pytest.mark.parametrize("command", ["reload", "restart"])
def test_download_continues_during_a_reload_or_restart(mirror: MirrorSite, command: str) -> None:
    """A worker that downloads a blob from the upstream completes the download although the server is reloaded or
    restarted. A client that has requested the blob before, and a client that requests it afterwards, get all bytes. No
    byte is fetched twice."""
    mirror.start(settings='prefetch = "off"\nconnections = 1')
    mirror.get_manifest()
    mirror.hub.fault(on="blob", match=mirror.digest_hex, stall_after=MIB)
    readers = [mirror.get().wait_for_bytes(MIB)]
    process = entrepot(command, "--data", mirror.server.data, folder=mirror.folder)
    assert (process.returncode, process.stderr) == (0, "")
    readers.append(mirror.get().wait_for_bytes(MIB))
    mirror.hub.release()
    for reader in readers:
        assert reader.wait_for_end().body == mirror.blob
    wait_until(lambda: any("/blobs/" in path for path in mirror.stored_files()), "the blob is not kept")
    assert repeated(mirror.hub.sent_ranges(mirror.digest)) == []


async def test_job_continues_during_a_reload(tmp_path: Path) -> None:
    """The application object that has started a job completes the job although a reload has replaced the application.
    The new application starts the next job."""
    prepare_data_dir(tmp_path)
    gates = [asyncio.Event(), asyncio.Event()]
    started_by: list[int] = []
    apps: list[Entrepot] = []

    def make_app(settings: Settings, starts_background_work: bool) -> Entrepot:
        apps.append(create_app(settings, starts_background_work=starts_background_work))
        return apps[-1]

    async def wait_for_state(job: int, state: JobState) -> None:
        while (await store.jobs.job(job)).state is not state:  # noqa: ASYNC110 - the store has no event for it
            await asyncio.sleep(0.05)

    def replace_work(number: int) -> None:
        """Replaces the work of an application's jobs by work that waits until the gate of this application is open."""
        service = apps[number].service
        assert service.work is not None

        async def work(_: object) -> None:
            started_by.append(number)
            await gates[number].wait()

        service.work._runner._work_by_kind = {"count": work}

    live = LiveApp(Settings(data=tmp_path), make_app)
    lifespan = Lifespan(live)
    await lifespan.start()
    replace_work(0)
    async with open_registry(tmp_path) as store:
        first = await store.jobs.add("count", {}, actor="alice")
        await wait_for_state(first.id, JobState.RUNNING)
        await live.prepare(pickle.dumps(Settings(data=tmp_path, read_only=True)))
        replace_work(1)
        await live.switch()
        assert (await store.jobs.job(first.id)).state is JobState.RUNNING
        gates[0].set()
        await wait_for_state(first.id, JobState.DONE)
        second = await store.jobs.add("count", {}, actor="alice")
        gates[1].set()
        await wait_for_state(second.id, JobState.DONE)
        assert started_by == [0, 1]
    await lifespan.stop()
