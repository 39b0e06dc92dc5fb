"""The descriptions of repositories in the store, which users write."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.access import AuditQuery
from storage.composition import open_registry
from storage.content import Actor
from storage.descriptions import Description
from storage.errors import NameUnknown, PreconditionFailed
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import NOWHERE, push_image
from tests.fakes.upkeep_store import APP, START, Clock, clocked_store

ALICE = Actor("alice", "192.0.2.1")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    async with clocked_store(tmp_path / "data", Clock()) as opened:
        await push_image(opened, APP, "one", "v1")
        yield opened


async def test_each_change_has_a_revision_and_an_audit_entry(store: StoredRegistry, tmp_path: Path) -> None:
    """Each change of a description has a new revision and an entry in the audit log. Other processes see the change. A
    change of an old revision is refused."""
    descriptions = store.descriptions
    assert await descriptions.find_description(APP) is None
    await descriptions.put_description(APP, "one", by=ALICE, revision=0)
    async with open_registry(tmp_path / "data", clock=Clock()) as other:
        assert await other.descriptions.find_description(APP) == Description("one", 1, START, "alice")
        with pytest.raises(PreconditionFailed, match="changed the description of team/app meanwhile"):
            await other.descriptions.put_description(APP, "two", by=ALICE, revision=0)
        assert (await other.descriptions.put_description(APP, "", by=ALICE, revision=1)).revision == 2
    assert await descriptions.find_description(APP) == Description("", 2, START, "alice")
    entries = store.accounts.audit(AuditQuery(action="description.put"), 10).items
    assert [(entry.target, entry.detail) for entry in entries] == [
        (APP, {"revision": 2, "bytes": 0}),
        (APP, {"revision": 1, "bytes": 3}),
    ]


async def test_an_unknown_repository_has_no_description(store: StoredRegistry) -> None:
    """An unknown repository has no description, and none can be written."""
    assert await store.descriptions.find_description(NOWHERE) is None
    with pytest.raises(NameUnknown):
        await store.descriptions.put_description(NOWHERE, "x", by=ALICE)
