"""A registry's own records and turns, and the stand-in for Hub with one image."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from storage.stored import StoredRegistry
from tests.clients.images import MIB
from tests.upstreams.content import Content, Holding, noise_image
from tests.upstreams.hub import Hub, hub

from .far import REPO, opened


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    async with opened(tmp_path / "data") as made:
        yield made


@pytest.fixture(scope="session")
def held() -> Holding:
    """An image of three blobs: a config, 1000 bytes, and 3 MiB and a bit."""
    return noise_image("app", 1000, 3 * MIB + 11)


@pytest.fixture
def content(held: Holding) -> Content:
    made = Content()
    made.add(REPO, held, "1", "latest")
    return made


@pytest.fixture
def upstream(tmp_path: Path, content: Content) -> Iterator[Hub]:
    with hub(tmp_path, content) as running:
        yield running
