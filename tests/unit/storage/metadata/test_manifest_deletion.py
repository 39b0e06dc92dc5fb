"""The deletion of a manifest with very many tags, which takes several transactions."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.content import Manifest
from storage.errors import Denied, ManifestUnknown
from storage.metadata.sqlite.manifest_deletion import MAX_TAGS_PER_TRANSACTION
from storage.names import RepositoryName, Tag
from storage.outbox import LIST_READER, EventAction, EventReader
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags
from storage.upkeep.tag_changes import TagChanger
from tests.fakes.registry_content import BY, index_of
from tests.fakes.upkeep_store import APP, Clock, clocked_store

WEB = RepositoryName("team/web")
IMAGE = index_of([])
TAGS = [Tag(f"t{number:05}") for number in range(4 * MAX_TAGS_PER_TRANSACTION)]


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    """A store whose repository `APP` has a manifest with `TAGS`. It lists the events of deletes."""
    async with clocked_store(tmp_path, Clock()) as opened:
        await opened.outbox.configure([EventReader(LIST_READER, frozenset({EventAction.DELETE}), ("**",))])
        await opened.put_manifest(APP, IMAGE, TAGS, by=BY)
        yield opened


async def all_tags(store: StoredRegistry) -> list[Tag]:
    return list((await store.tags(APP, None, 2 * len(TAGS))).items)


async def test_other_changes_do_not_wait_for_the_deletion_of_many_tags(store: StoredRegistry) -> None:
    """Other changes are committed between the steps of the deletion. At the end, the manifest and all its tags are
    deleted, also a tag that was pushed meanwhile. There is an event for each tag and then one for the manifest, and
    each tag can be restored with the manifest."""
    deletion = asyncio.create_task(store.delete_manifest(APP, IMAGE.digest, by=BY))
    await asyncio.sleep(0)  # starts the deletion
    await store.put_manifest(WEB, IMAGE, [Tag("v1")], by=BY)
    await store.put_manifest(APP, IMAGE, [Tag("zz-pushed-meanwhile")], by=BY)
    assert not deletion.done()
    await deletion
    assert not await all_tags(store)
    with pytest.raises(ManifestUnknown):
        await store.resolve_manifest(APP, IMAGE.digest)
    assert await store.resolve_manifest(WEB, Tag("v1")) == IMAGE.descriptor
    events = [event.content for event in (await store.outbox.after(0, 2 * len(TAGS))).events]
    assert [event.tag for event in events] == [*TAGS, "zz-pushed-meanwhile", None]
    assert {(event.digest, event.media_type, event.size) for event in events} == {
        (IMAGE.digest, IMAGE.media_type, len(IMAGE.body))
    }
    changes = TagChanger(store.tag_history, ImmutableTags())
    for tag in (TAGS[0], TAGS[-1]):
        assert (await changes.restore(APP, tag, by=BY)).digest == IMAGE.digest
    assert await all_tags(store) == [TAGS[0], TAGS[-1]]


@pytest.mark.slow
async def test_interrupted_deletion_of_many_tags_can_be_repeated(store: StoredRegistry) -> None:
    """If the deletion is cancelled between two steps, the manifest is still there with fewer tags. Another deletion
    deletes the manifest and its remaining tags."""
    deletion = asyncio.create_task(store.delete_manifest(APP, IMAGE.digest, by=BY))
    await asyncio.sleep(0)  # starts the deletion
    while (await store.tags(APP, None, 1)).items[0] == TAGS[0]:
        await store.put_manifest(WEB, IMAGE, [Tag("v1")], by=BY)  # waits for a step
    deletion.cancel()
    with pytest.raises(asyncio.CancelledError):
        await deletion
    assert await store.resolve_manifest(APP, TAGS[-1]) == IMAGE.descriptor
    assert 0 < len(await all_tags(store)) < len(TAGS)
    await store.delete_manifest(APP, IMAGE.digest, by=BY)
    assert not await all_tags(store)


@pytest.mark.parametrize("immutable_tag", [TAGS[0], TAGS[-1]])
async def test_no_tag_is_deleted_if_one_of_many_is_immutable(store: StoredRegistry, immutable_tag: Tag) -> None:
    """The deletion of a manifest with many tags is refused, and deletes no tag, if one of the tags is immutable."""
    with pytest.raises(Denied, match=immutable_tag):
        await store.metadata.delete_manifest(APP, IMAGE.digest, BY, True, lambda tag: tag == immutable_tag)
    assert await all_tags(store) == TAGS


class TagRule:
    """A rule that makes `immutable_tag` immutable. `checked_tags`: how many tags each thread has checked. When a thread
    other than the commit thread (`metadata`) checks a tag, it sets `is_checking`, and waits until `may_go_on` is
    set."""

    def __init__(self, immutable_tag: str = "") -> None:
        self.immutable_tag = immutable_tag
        self.checked_tags: Counter[str] = Counter()
        self.is_checking = threading.Event()
        self.may_go_on = threading.Event()

    def __call__(self, tag: str) -> bool:
        thread = threading.current_thread().name
        self.checked_tags[thread] += 1
        if thread != "metadata":
            self.is_checking.set()
            self.may_go_on.wait(60)
        return tag == self.immutable_tag


async def push_index(store: StoredRegistry) -> Manifest:
    """Pushes an index that lists `IMAGE`, with `TAGS`."""
    index = index_of([IMAGE.descriptor])
    await store.delete_manifest(APP, IMAGE.digest, by=BY)
    await store.put_manifest(APP, IMAGE, by=BY)
    await store.put_manifest(APP, index, TAGS, by=BY)
    return index


@pytest.mark.slow
async def test_many_tags_are_not_checked_during_a_transaction(store: StoredRegistry) -> None:
    """If very many tags need the manifest, because they point at an index that lists it, they are checked while no
    transaction runs. A transaction checks only the tags that have changed since then."""
    index = await push_index(store)
    rule = TagRule()
    rule.may_go_on.set()
    await store.metadata.delete_manifest(APP, IMAGE.digest, BY, True, rule)
    with pytest.raises(ManifestUnknown):
        await store.resolve_manifest(APP, IMAGE.digest)
    assert await store.resolve_manifest(APP, TAGS[0]) == index.descriptor
    assert rule.checked_tags["metadata"] < 100
    assert rule.checked_tags.total() >= len(TAGS)


@pytest.mark.parametrize("is_tag_of_index", [True, False])
@pytest.mark.slow
async def test_immutable_tag_that_is_pushed_during_the_deletion(store: StoredRegistry, is_tag_of_index: bool) -> None:
    """If an immutable tag that needs the manifest is pushed after the check of all tags, the deletion is refused."""
    pushed = await push_index(store) if is_tag_of_index else IMAGE
    rule = TagRule("release")
    deletion = asyncio.create_task(store.metadata.delete_manifest(APP, IMAGE.digest, BY, True, rule))
    await asyncio.to_thread(rule.is_checking.wait, 60)
    await store.put_manifest(APP, pushed, [Tag("release")], by=BY)
    rule.may_go_on.set()
    with pytest.raises(Denied, match="release is immutable"):
        await deletion
    assert len(await all_tags(store)) == len(TAGS) + 1
    assert await store.resolve_manifest(APP, Tag("release")) == pushed.descriptor
