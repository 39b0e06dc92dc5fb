"""A command evicts images while a server with other settings uses the same data directory. The quotas and the usage
scopes (the sets of repositories that are counted together) of the server stay."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ByteSize

from registry.config import Quota, Settings, Upstream
from registry.naming import NamingRules
from registry.router import Router
from registry.upkeep import eviction
from registry.upkeep.budgets import scope_definitions
from registry.upkeep.components import upkeep_components
from registry.upkeep.eviction import EVICTION_KIND, eviction_arguments
from storage.errors import QuotaExceeded, Unsupported
from storage.jobs import JSON
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import run_in_command
from storage.upkeep.usage_counting import configure_and_count
from tests.fakes.registry_content import BY, image_of, push_blob
from tests.fakes.upkeep_store import Clock, clocked_store

APP = RepositoryName("docker.io/library/app")
HUB, GITHUB = Upstream(name="docker.io"), Upstream(name="ghcr.io", cache_max=ByteSize(10**9))
SERVER = Settings(upstream=[HUB, GITHUB], quota=[Quota(prefix="team/", max_size=ByteSize(5))])
COMMAND = Settings(upstream=[HUB])
"""The settings of the server, and those of a command without the environment of the server's service."""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StoredRegistry]:
    """A store with one mirrored image."""
    monkeypatch.setattr(eviction, "SCOPES_WAIT_SECONDS", 0.0)
    async with clocked_store(tmp_path / "data", clock) as opened:
        image = image_of(await push_blob(opened, APP, b"config"), [])
        await opened.put_manifest(APP, image, by=BY, sparse=True)
        clock.now += 1
        yield opened


async def evict(
    store: StoredRegistry,
    clock: Clock,
    settings: Settings,
    upstream: str | None = None,
    to: int | None = 0,
    *,
    dry_run: bool = False,
) -> JSON:
    """Runs `entrepot cache evict` with these settings, and returns its result."""
    router = Router(store, {}, store.is_known_repository, NamingRules(["docker.io"]))
    work = upkeep_components(settings, store, router, clock).work_by_kind[EVICTION_KIND]
    arguments = eviction_arguments(to, upstream, dry_run=dry_run)
    return await run_in_command(store.jobs, store.leases, EVICTION_KIND, arguments, work, actor="cli:alice")


@pytest.mark.parametrize("dry_run", [True, False])
async def test_a_command_leaves_the_quotas_and_budgets_of_the_server(
    store: StoredRegistry, clock: Clock, dry_run: bool
) -> None:
    """A command whose settings lack a quota and an upstream of the server evicts images, or shows which it would evict.
    The quota is still enforced, and the other upstream's content is still counted."""
    await configure_and_count(store.usage, store.leases, scope_definitions(SERVER))
    before = {use.definition.name: use.definition for use in await store.usage.scopes()}
    result: Any = await evict(store, clock, COMMAND, "docker.io", dry_run=dry_run)
    assert [image["repository"] for image in result["evicted"]] == [APP]
    uses = await store.usage.scopes()
    assert {use.definition.name: use.definition for use in uses} == before
    assert all(use.is_complete for use in uses)
    expected_bytes = len(b"config") if dry_run else 0
    assert {use.bytes for use in uses if use.definition.upstream == "docker.io"} == {expected_bytes}
    with pytest.raises(QuotaExceeded):
        await push_blob(store, RepositoryName("team/app"), b"too large")


@pytest.mark.parametrize("dry_run", [True, False])
async def test_a_command_refuses_if_the_server_counts_other_content(
    store: StoredRegistry, clock: Clock, dry_run: bool
) -> None:
    """If the server has other upstreams than the command's settings, or has not counted the cache yet, the size of the
    cache is not known. The command says so, and evicts nothing."""
    message = "the server counts the cache of all upstreams with other settings"
    with pytest.raises(Unsupported, match=message):
        await evict(store, clock, COMMAND, dry_run=dry_run)
    assert await store.usage.scopes() == []
    await configure_and_count(store.usage, store.leases, scope_definitions(SERVER))
    before = await store.usage.scopes()
    with pytest.raises(Unsupported, match=message):
        await evict(store, clock, COMMAND, dry_run=dry_run)
    with_budget = COMMAND.model_copy(update={"upstream": [HUB, Upstream(name="quay.io", cache_max=ByteSize(1))]})
    with pytest.raises(Unsupported, match=r"the server counts the cache of quay\.io with other settings"):
        await evict(store, clock, with_budget, to=None, dry_run=dry_run)
    assert await store.usage.scopes() == before


async def test_a_command_completes_the_count_of_a_stopped_server(store: StoredRegistry, clock: Clock) -> None:
    """If the server was stopped while it counted the cache, the command completes the count before it evicts."""
    await store.usage.configure(scope_definitions(SERVER))
    assert not any(use.is_complete for use in await store.usage.scopes())
    result: Any = await evict(store, clock, SERVER)
    assert result["images"] == 1
    assert all(use.is_complete for use in await store.usage.scopes())
