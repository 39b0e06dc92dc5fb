"""Fixtures for the tests of the import over the network. The tests import from an *old registry* into *this registry*,
which has the store `store`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from registry.config import Upstream
from registry.migration.remote_import import KIND, import_remote
from registry.router import Router
from storage.composition import open_registry, prepare_data_dir
from storage.jobs import JSON
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.import_run import ImportRun
from tests.fakes.upstream_content import UpstreamContent

APP = RepositoryName("team/app")


@pytest.fixture
def content() -> UpstreamContent:
    return UpstreamContent()


@pytest.fixture
def old_registry(tmp_path: Path) -> Iterator[Hub]:
    """An old registry without content, which does not list its repositories."""
    with hub(tmp_path, UpstreamContent()) as running:
        yield running


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as opened:
        yield opened


class Pauses(list[float]):
    """Records the lengths of the pauses before retries, in seconds, and ends each pause at once."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def configured_upstreams() -> list[Upstream]:
    """The upstreams in the settings of this registry. A test can add some."""
    return []


@pytest.fixture
def run_import(
    store: StoredRegistry, old_registry: Hub, pauses: Pauses, configured_upstreams: list[Upstream]
) -> ImportRun:
    return import_into(store, old_registry, pauses, configured_upstreams)


def import_into(
    store: StoredRegistry, old_registry: Hub, pauses: Pauses, configured_upstreams: Sequence[Upstream] = ()
) -> ImportRun:
    async def work(store: StoredRegistry, router: Router, context: JobContext) -> JSON:
        return await import_remote(store, router, context, configured_upstreams, pauses)

    return ImportRun(store, KIND, work, url=old_registry.url, repositories=[str(APP)])
