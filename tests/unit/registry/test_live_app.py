"""`LiveApp` replaces the application of a worker when the settings change. It prepares a new application with the new
settings, switches to it, and closes the old one."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import weakref
from pathlib import Path

import httpx2
import pytest
from fastapi.routing import APIRoute

from registry.app import Entrepot, create_app
from registry.config import Settings
from registry.live_app import LiveApp
from registry.server.process.lifespan import Lifespan
from storage.composition import open_registry, prepare_data_dir
from storage.names import RepositoryName
from tests.fakes.asgi_client import AsgiClient
from tests.fakes.open_files import open_files
from tests.fakes.registry_content import index_of


def make_app(settings: Settings, starts_background_work: bool) -> Entrepot:
    return create_app(settings, starts_background_work=starts_background_work)


async def change(live: LiveApp, settings: Settings) -> None:
    await live.prepare(pickle.dumps(settings))
    await live.switch()


async def may_push(live: LiveApp) -> bool:
    return (await AsgiClient(live)("POST", "/v2/a/blobs/uploads/")).status == 202


async def is_ready(live: LiveApp) -> bool:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=live), base_url="http://registry.test") as client:
        return (await client.get("/readyz")).status_code == 200


async def test_a_prepared_application_answers_only_after_the_switch(tmp_path: Path) -> None:
    """A prepared application answers requests only after the switch. If it was discarded or cannot be opened, the old
    application continues to answer."""
    prepare_data_dir(tmp_path / "data")
    settings, other = Settings(data=tmp_path / "data"), Settings(data=tmp_path / "data", read_only=True)
    live = LiveApp(settings, make_app)
    lifespan = Lifespan(live)
    await lifespan.start()
    await live.prepare(pickle.dumps(other))
    assert await may_push(live)
    await live.discard()
    await live.switch()
    assert await may_push(live)
    with pytest.raises(FileNotFoundError):
        await change(live, Settings(data=tmp_path / "missing", read_only=True))
    assert await may_push(live)
    await change(live, other)
    assert not await may_push(live)
    await change(live, settings)
    assert await may_push(live)
    await lifespan.stop()


def test_applications_share_their_routes(tmp_path: Path) -> None:
    """A new application uses the route objects of the previous one, except the route of `/metrics`, which differs. This
    saves time, because `include_router` would build all routes again."""
    routes, others = (create_app(Settings(data=tmp_path)).routes for _ in range(2))
    assert len(routes) > 50
    assert [route for route, other in zip(routes, others, strict=True) if route is not other] == [
        route for route in routes if isinstance(route, APIRoute) and route.path == "/metrics"
    ]


@pytest.mark.slow
async def test_replaced_applications_are_freed(tmp_path: Path) -> None:
    """A replaced application is freed after its last request, so memory does not grow with the number of changes."""
    prepare_data_dir(tmp_path)
    app_references: list[weakref.ref[Entrepot]] = []

    def make_and_remember(settings: Settings, starts_background_work: bool) -> Entrepot:
        app = make_app(settings, starts_background_work)
        app_references.append(weakref.ref(app))
        return app

    live = LiveApp(Settings(data=tmp_path), make_and_remember)
    lifespan = Lifespan(live)
    await lifespan.start()
    for _ in range(3):
        await AsgiClient(live)("GET", "/v2/")
        await change(live, Settings(data=tmp_path))
    await wait_until_old_apps_are_closed(live)
    async with asyncio.timeout(60):
        # `gc.collect` does nothing while another thread runs it.
        while any(app() is not None for app in app_references[:3]):
            gc.collect()
            await asyncio.sleep(0.01)
    assert app_references[3]() is not None
    await lifespan.stop()


async def wait_until_old_apps_are_closed(live: LiveApp) -> None:
    async with asyncio.timeout(60):
        while live._old:  # noqa: ASYNC110 - no event signals that the last one is closed
            await asyncio.sleep(0.01)


@pytest.mark.slow
async def test_the_first_application_drops_its_caches(tmp_path: Path) -> None:
    """A worker keeps its first application in memory until it ends. When the application is replaced, its distribution
    API with the caches is freed."""
    prepare_data_dir(tmp_path)
    apps: list[Entrepot] = []

    def make_and_keep(settings: Settings, starts_background_work: bool) -> Entrepot:
        apps.append(make_app(settings, starts_background_work))
        return apps[-1]

    live = LiveApp(Settings(data=tmp_path), make_and_keep)
    lifespan = Lifespan(live)
    await lifespan.start()
    distribution = weakref.ref(apps[0].service.distribution)
    await AsgiClient(live)("GET", "/v2/")
    await change(live, Settings(data=tmp_path))
    await wait_until_old_apps_are_closed(live)
    gc.collect()
    assert distribution() is None
    await lifespan.stop()


def open_stores(data: Path) -> int:
    """Returns how many times this process has the store open."""
    return len(open_files(os.getpid(), f"{data}/locks/turns"))


async def test_a_cancelled_preparation(tmp_path: Path) -> None:
    """If the preparation of an application is cancelled, for example because it takes too long, the application is
    closed as soon as it has started."""
    prepare_data_dir(tmp_path)
    starting = asyncio.Event()

    def make_and_tell(settings: Settings, starts_background_work: bool) -> Entrepot:
        starting.set()
        return make_app(settings, starts_background_work)

    live = LiveApp(Settings(data=tmp_path), make_and_tell)
    lifespan = Lifespan(live)
    await lifespan.start()
    starting.clear()
    preparing = asyncio.create_task(live.prepare(pickle.dumps(Settings(data=tmp_path))))
    await starting.wait()
    preparing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await preparing
    assert live._old
    await wait_until_old_apps_are_closed(live)
    assert open_stores(tmp_path) == 1
    assert await may_push(live)
    await lifespan.stop()


async def test_new_settings_apply_before_background_work_is_handed_over(tmp_path: Path) -> None:
    """After a switch, the new settings apply to new requests at once, even if the background work of the old
    application has not been handed over yet."""
    prepare_data_dir(tmp_path)
    live = LiveApp(Settings(data=tmp_path), make_app)
    lifespan = Lifespan(live)
    await lifespan.start()
    async with live._handover_lock:
        await change(live, Settings(data=tmp_path, read_only=True))
        assert not await may_push(live)
    await wait_until_old_apps_are_closed(live)
    assert live._current.app.work is not None
    assert live._current.app.work._is_started
    await lifespan.stop()


async def test_pulls_are_stored_although_the_background_work_was_not_started(tmp_path: Path) -> None:
    """An application answers pulls, and the server stops before the work of the application before it has been handed
    over. The pulls are stored."""
    prepare_data_dir(tmp_path)
    settings = Settings(data=tmp_path)
    live = LiveApp(settings, make_app)
    lifespan = Lifespan(live)
    await lifespan.start()
    index = index_of([])
    client, path = AsgiClient(live), "/v2/a/manifests/t"
    assert (await client("PUT", path, body=index.body, headers={"content-type": index.media_type})).status == 201
    async with live._handover_lock:
        await change(live, settings)
        assert (await client("GET", path)).status == 200
        await lifespan.stop()
    async with open_registry(tmp_path) as registry:
        record = await registry.pulls.record_of(RepositoryName("a"), index.digest)
    assert record is not None
    assert record.pulls == 1


async def test_a_change_of_the_settings_opens_a_replaced_data_directory(tmp_path: Path) -> None:
    """If the data directory was replaced, the application refuses pushes with 503 and says where the operator learns
    what to do. An application with new settings opens the new directory, so pushes work again and it is ready."""
    data = tmp_path / "data"
    prepare_data_dir(data)
    live = LiveApp(Settings(data=data), make_app)
    lifespan = Lifespan(live)
    await lifespan.start()
    client = AsgiClient(live)
    data.rename(tmp_path / "old")
    prepare_data_dir(data)
    answer = await client("POST", "/v2/a/blobs/uploads/")
    assert (answer.status, b"/readyz says what to do" in answer.body) == (503, True)
    assert (await client("GET", "/v2/_catalog")).status == 200
    assert not await is_ready(live)
    await change(live, Settings(data=data, read_only=True))
    await change(live, Settings(data=data))
    index, path = index_of([]), "/v2/pushed/manifests/v1"
    assert (await client("PUT", path, body=index.body, headers={"content-type": index.media_type})).status == 201
    assert await is_ready(live)
    async with open_registry(data) as store:
        assert await store.is_known_repository(RepositoryName("pushed"))
    await lifespan.stop()
