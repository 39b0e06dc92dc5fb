"""A push of a stored manifest with another media type, if the body of the manifest does not say its media type."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.access import AuditQuery
from storage.content import DOCKER_LIST, OCI_INDEX, Actor, Manifest
from storage.errors import Denied, ManifestUnknown
from storage.names import Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import BY, index_of, manifest_from
from tests.fakes.scrub_runs import scrub
from tests.fakes.upkeep_store import APP, Clock, clocked_store
from tests.unit.storage.metadata.test_manifest_deletion import TagRule
from tests.unit.storage.upkeep.test_damaged_manifests import change_body

INDEX = manifest_from({"schemaVersion": 2, "manifests": []}, OCI_INDEX)
OTHER_TYPE = Manifest.parse(INDEX.body, DOCKER_LIST)
MANY_TAGS = [Tag(f"t{number:05}") for number in range(2000)]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    async with clocked_store(tmp_path, Clock()) as opened:
        yield opened


async def push_other_type(store: StoredRegistry, rule: TagRule) -> None:
    await store.metadata.put_manifest(APP, OTHER_TYPE, [], BY, False, None, rule)


async def stored_type(store: StoredRegistry) -> str:
    return (await store.resolve_manifest(APP, INDEX.digest)).media_type


async def test_many_tags_are_not_checked_during_a_transaction(store: StoredRegistry) -> None:
    """If very many tags need the manifest, they are checked while no transaction runs. A push with the same media type
    checks no tags."""
    await store.put_manifest(APP, INDEX, MANY_TAGS, by=BY)
    rule = TagRule()
    rule.may_go_on.set()
    await store.metadata.put_manifest(APP, INDEX, [], BY, False, None, rule)
    assert rule.checked_tags.total() == 0
    await push_other_type(store, rule)
    assert await stored_type(store) == DOCKER_LIST
    assert rule.checked_tags["metadata"] < 100
    assert rule.checked_tags.total() >= len(MANY_TAGS)


async def test_one_of_many_tags_is_immutable(store: StoredRegistry) -> None:
    """The push is refused if one of very many tags is immutable."""
    await store.put_manifest(APP, INDEX, MANY_TAGS, by=BY)
    rule = TagRule(MANY_TAGS[-1])
    rule.may_go_on.set()
    with pytest.raises(Denied, match=f"{MANY_TAGS[-1]} is immutable and needs {INDEX.digest}"):
        await push_other_type(store, rule)
    assert await stored_type(store) == OCI_INDEX


@pytest.mark.parametrize("immutable_tag", ["", "release"])
async def test_many_indexes_are_not_checked_during_a_transaction(store: StoredRegistry, immutable_tag: str) -> None:
    """If many indexes without a tag list the manifest, the tags that need it are searched while no transaction runs. An
    immutable tag of one of these indexes is found."""
    await store.put_manifest(APP, INDEX, by=BY)
    indexes = [index_of([INDEX.descriptor], annotations={"number": str(number)}) for number in range(100)]
    for index in indexes:
        await store.put_manifest(APP, index, by=BY)
    await store.put_manifest(APP, indexes[50], [Tag("release")], by=BY)
    rule = TagRule(immutable_tag)
    rule.may_go_on.set()
    if immutable_tag:
        with pytest.raises(Denied, match=f"release is immutable and needs {INDEX.digest}"):
            await push_other_type(store, rule)
    else:
        await push_other_type(store, rule)
        assert await stored_type(store) == DOCKER_LIST
    assert set(rule.checked_tags) - {"metadata"}


async def test_immutable_tag_that_is_pushed_during_the_check(store: StoredRegistry) -> None:
    """If an immutable tag is pushed after the check of very many tags, the push with another media type is refused."""
    await store.put_manifest(APP, INDEX, MANY_TAGS, by=BY)
    rule = TagRule("release")
    push = asyncio.create_task(push_other_type(store, rule))
    await asyncio.to_thread(rule.is_checking.wait, 60)
    await store.put_manifest(APP, INDEX, [Tag("release")], by=BY)
    rule.may_go_on.set()
    with pytest.raises(Denied, match="release is immutable"):
        await push
    assert await stored_type(store) == OCI_INDEX


@pytest.mark.slow
async def test_a_manifest_that_is_deleted_during_the_check_is_stored_again(store: StoredRegistry) -> None:
    """If the manifest is deleted while the tags that need it are checked, the push stores it with the new media
    type."""
    await store.put_manifest(APP, INDEX, by=BY)
    await store.put_manifest(APP, index_of([INDEX.descriptor]), MANY_TAGS, by=BY)
    rule = TagRule()
    push = asyncio.create_task(push_other_type(store, rule))
    await asyncio.to_thread(rule.is_checking.wait, 60)
    await store.delete_manifest(APP, INDEX.digest, by=BY)
    rule.may_go_on.set()
    await push
    assert await stored_type(store) == DOCKER_LIST


async def test_a_damaged_manifest_keeps_its_media_type(store: StoredRegistry) -> None:
    """A push that would heal a damaged manifest is refused if it has another media type and an immutable tag needs the
    manifest."""
    await store.put_manifest(APP, INDEX, [Tag("v1")], by=BY)
    change_body(store, INDEX.digest, b"{}")
    await scrub(store)
    with pytest.raises(Denied, match="v1 is immutable"):
        await push_other_type(store, TagRule("v1"))
    with pytest.raises(ManifestUnknown):
        await store.resolve_manifest(APP, INDEX.digest)
    await store.put_manifest(APP, INDEX, by=BY)
    assert await stored_type(store) == OCI_INDEX


async def test_the_audit_log_records_another_media_type(store: StoredRegistry) -> None:
    """A push that changes the media type of a manifest has an entry in the audit log, also if the push has tags. The
    entry has both media types."""
    await store.put_manifest(APP, INDEX, [Tag("latest")], by=BY)
    await store.put_manifest(APP, OTHER_TYPE, [Tag("latest")], by=Actor(name="alice"))
    [entry] = store.accounts.audit(AuditQuery(action="manifest.put"), 10).items
    assert (entry.actor, entry.target) == ("alice", f"{APP}@{INDEX.digest}")
    assert entry.detail == {"media_type": DOCKER_LIST, "previous": OCI_INDEX}
