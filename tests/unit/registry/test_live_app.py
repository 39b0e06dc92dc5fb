"""A worker's application whose settings change."""

from __future__ import annotations

import asyncio
import gc
import pickle
import weakref
from pathlib import Path

import pytest

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
    """What was prepared answers after the switch, not before, and never if it was discarded or cannot be opened."""
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


async def test_replaced_applications_are_freed(tmp_path: Path) -> None:
    """Nothing keeps an application after its last request, so any number of changes takes no memory."""
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
    async with asyncio.timeout(60):
        while live._old:  # noqa: ASYNC110 - there is no event for the end of the last one
            await asyncio.sleep(0.01)
    gc.collect()
    assert [app() is None for app in made] == [True, True, True, False]
    await lifespan.stop()
