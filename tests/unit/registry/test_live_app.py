"""The application of a worker while its settings change."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import weakref
from pathlib import Path

import pytest
from fastapi.routing import APIRoute

from registry.app import Entrepot, create_app
from registry.config import Settings
from registry.live_app import LiveApp
from registry.server.process.lifespan import Lifespan
from storage.composition import prepare_data_dir
from tests.fakes.asgi_client import AsgiClient


def make_app(settings: Settings, starts_work: bool) -> Entrepot:
    return create_app(settings, starts_work=starts_work)


async def change(live: LiveApp, settings: Settings) -> None:
    await live.prepare(pickle.dumps(settings))
    await live.switch()


async def may_push(live: LiveApp) -> bool:
    return (await AsgiClient(live)("POST", "/v2/a/blobs/uploads/")).status == 202


async def test_change(tmp_path: Path) -> None:
    """A prepared application answers requests after the switch and not before. It never does if it was discarded or
    cannot be opened."""
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
    """An application builds only the route of `/metrics`, which differs. `include_router` would build all of them."""
    routes, others = (create_app(Settings(data=tmp_path)).routes for _ in range(2))
    assert len(routes) > 50
    assert [route for route, other in zip(routes, others, strict=True) if route is not other] == [
        route for route in routes if isinstance(route, APIRoute) and route.path == "/metrics"
    ]


async def test_replaced_applications_are_freed(tmp_path: Path) -> None:
    """A replaced application is freed after its last request, so the memory does not grow with the number of
    changes."""
    prepare_data_dir(tmp_path)
    made: list[weakref.ref[Entrepot]] = []

    def make_and_remember(settings: Settings, starts_work: bool) -> Entrepot:
        app = make_app(settings, starts_work)
        made.append(weakref.ref(app))
        return app

    live = LiveApp(Settings(data=tmp_path), make_and_remember)
    lifespan = Lifespan(live)
    await lifespan.start()
    for _ in range(3):
        await AsgiClient(live)("GET", "/v2/")
        await change(live, Settings(data=tmp_path))
    await all_closed(live)
    async with asyncio.timeout(60):
        while any(app() is not None for app in made[:3]):  # a collection does nothing while a thread runs another one
            gc.collect()
            await asyncio.sleep(0.01)
    assert made[3]() is not None
    await lifespan.stop()


async def all_closed(live: LiveApp) -> None:
    async with asyncio.timeout(60):
        while live._old:  # noqa: ASYNC110 - there is no event for the end of the last one
            await asyncio.sleep(0.01)


async def test_the_first_application_is_emptied(tmp_path: Path) -> None:
    """A worker never frees the first application, but drops its caches."""
    prepare_data_dir(tmp_path)
    apps: list[Entrepot] = []

    def make_and_keep(settings: Settings, starts_work: bool) -> Entrepot:
        apps.append(make_app(settings, starts_work))
        return apps[-1]

    live = LiveApp(Settings(data=tmp_path), make_and_keep)
    lifespan = Lifespan(live)
    await lifespan.start()
    distribution = weakref.ref(apps[0].service.distribution)
    await AsgiClient(live)("GET", "/v2/")
    await change(live, Settings(data=tmp_path))
    await all_closed(live)
    gc.collect()
    assert distribution() is None
    await lifespan.stop()


def open_stores(data: Path) -> int:
    """Returns how many times this process has the store open."""
    files = [os.readlink(file) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return sum(file == f"{data}/locks/turns" for file in files)


async def test_a_preparation_that_is_cut_off(tmp_path: Path) -> None:
    """An application whose start takes too long is closed as soon as it has started."""
    prepare_data_dir(tmp_path)
    starting = asyncio.Event()

    def make_and_tell(settings: Settings, starts_work: bool) -> Entrepot:
        starting.set()
        return make_app(settings, starts_work)

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
    await all_closed(live)
    assert open_stores(tmp_path) == 1
    assert await may_push(live)
    await lifespan.stop()


async def test_work_that_takes_long_to_hand_over(tmp_path: Path) -> None:
    """New requests get the new settings even before the new background work has started."""
    prepare_data_dir(tmp_path)
    live = LiveApp(Settings(data=tmp_path), make_app)
    lifespan = Lifespan(live)
    await lifespan.start()
    async with live._passing_work:
        await change(live, Settings(data=tmp_path, read_only=True))
        assert not await may_push(live)
    await all_closed(live)
    assert live._current.app.work is not None
    assert live._current.app.work._is_started
    await lifespan.stop()
