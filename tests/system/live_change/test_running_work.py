"""Downloads and jobs continue while the server changes."""

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
def test_a_download_goes_on(mirror: MirrorSite, command: str) -> None:
    """If a blob's download is running when the server changes, the worker that began it completes it. Its reader gets
    all bytes, and none is fetched twice. A later reader joins it."""
    mirror.start(settings='prefetch = "off"\nconnections = 1')
    mirror.inspect()
    mirror.hub.fault(on="blob", match=mirror.encoded, stall_after=MIB)
    readers = [mirror.get().reached(MIB)]
    done = entrepot(command, "--data", mirror.server.data, folder=mirror.folder)
    assert (done.returncode, done.stderr) == (0, "")
    readers.append(mirror.get().reached(MIB))
    mirror.hub.release()
    for reader in readers:
        assert reader.ended().body == mirror.blob
    wait_until(lambda: any("/blobs/" in path for path in mirror.kept()), "the blob is not kept")
    assert repeated(mirror.hub.sent(mirror.digest)) == []


async def test_a_job_goes_on(tmp_path: Path) -> None:
    """A job that runs during a reload is completed by the application that began it, which is then closed. The new
    application starts the next job."""
    prepare_data_dir(tmp_path)
    gates = [asyncio.Event(), asyncio.Event()]
    begun: list[int] = []
    apps: list[Entrepot] = []

    def make_app(settings: Settings, starts_work: bool) -> Entrepot:
        apps.append(create_app(settings, starts_work=starts_work))
        return apps[-1]

    async def until(job: int, state: JobState) -> None:
        while (await store.jobs.job(job)).state is not state:  # noqa: ASYNC110 - the store has no event for it
            await asyncio.sleep(0.05)

    def hold(number: int) -> None:
        """Replaces the work of an application's jobs by work that waits for its gate."""
        service = apps[number].service
        assert service.work is not None

        async def work(_: object) -> None:
            begun.append(number)
            await gates[number].wait()

        service.work._runner._works = {"count": work}

    live = LiveApp(Settings(data=tmp_path), make_app)
    lifespan = Lifespan(live)
    await lifespan.start()
    hold(0)
    async with open_registry(tmp_path) as store:
        first = await store.jobs.add("count", {}, actor="alice")
        await until(first.id, JobState.RUNNING)
        await live.prepare(pickle.dumps(Settings(data=tmp_path, read_only=True)))
        hold(1)
        await live.switch()
        assert (await store.jobs.job(first.id)).state is JobState.RUNNING
        gates[0].set()
        await until(first.id, JobState.DONE)
        second = await store.jobs.add("count", {}, actor="alice")
        gates[1].set()
        await until(second.id, JobState.DONE)
        assert begun == [0, 1]
    await lifespan.stop()
