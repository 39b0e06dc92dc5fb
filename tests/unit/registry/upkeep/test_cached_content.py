"""The deletion of cached content (`purge_image`) does not block the event loop."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from registry.naming import NamingRules
from registry.router import Router
from registry.upkeep.cached_content import MANIFESTS_AT_A_TIME, purge_image
from storage.composition import open_registry, prepare_data_dir
from storage.content import OCI_INDEX, OCI_MANIFEST, Actor, Descriptor, Manifest
from storage.names import ImageReference, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry

REPO = RepositoryName("example.com/app")
CHILDREN = 10 * MANIFESTS_AT_A_TIME
FROZEN_TAGS = 5
BY = Actor("cli:ann")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path) as opened:
        yield opened


async def put(store: StoredRegistry, media_type: str, tag: str | None = None, **document: Any) -> Descriptor:
    body = json.dumps({"schemaVersion": 2, "mediaType": media_type, **document}).encode()
    manifest = Manifest.parse(body, media_type)
    tags = [Tag(tag)] if tag else []
    return await store.put_manifest(REPO, manifest, tags, by=BY, sparse=True)


async def put_image(store: StoredRegistry, number: int, tag: str | None = None) -> Descriptor:
    config = {"mediaType": "application/x.test", "digest": f"sha256:{number:064x}", "size": 2}
    return await put(store, OCI_MANIFEST, tag, config=config, layers=[])


async def test_other_tasks_run_while_a_purge_reads_many_manifests(store: StoredRegistry, tmp_path: Path) -> None:
    """Several tags of a repository are frozen at indexes that list many manifests. The purge of another tag reads these
    manifests, to find out whether a frozen tag needs what it deletes. Other tasks can run after every
    `MANIFESTS_AT_A_TIME` manifests."""
    children = [(await put_image(store, number)).as_json() for number in range(CHILDREN)]
    for number in range(FROZEN_TAGS):
        tag = f"frozen-{number}"
        index = await put(store, OCI_INDEX, tag, manifests=children, annotations={"number": str(number)})
        await store.upstream_tags.freeze(REPO, Tag(tag), index.digest, by=BY)
    await put_image(store, CHILDREN, "other")
    router = Router(store, {"example.com": store}, store.is_known_repository, NamingRules(("example.com",)))
    statements = 0
    statements_per_turn = list[int]()

    def count_statement(_: dict[str, Any]) -> None:
        nonlocal statements
        statements += 1

    async def count_turns() -> None:
        while True:
            before = statements
            await asyncio.sleep(0)
            statements_per_turn.append(statements - before)

    store.metadata._cache._shared_reads._db.trace_v2(apsw.SQLITE_TRACE_PROFILE, count_statement)  # type: ignore[attr-defined]
    counting = asyncio.create_task(count_turns())
    result = await purge_image(router, store, ImageReference(REPO, Tag("other")), data=tmp_path, by=BY)
    counting.cancel()
    assert (result.tags, result.manifests) == (1, 1)
    assert sum(statements_per_turn) >= CHILDREN
    # A turn also begins and ends a transaction.
    assert max(statements_per_turn) <= MANIFESTS_AT_A_TIME + 5
