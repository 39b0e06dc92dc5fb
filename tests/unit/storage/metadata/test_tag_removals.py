"""What a removal of tags would delete."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.errors import NameUnknown
from storage.metadata.sqlite.upkeep import sqlite_tag_removals
from storage.names import Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import BY, NOWHERE, index_of, push_image
from tests.fakes.upkeep_store import APP, Clock, clocked_store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    async with clocked_store(tmp_path / "data", Clock()) as opened:
        yield opened


async def test_what_others_use_stays(store: StoredRegistry) -> None:
    """An image stays if it has another tag, if an index with a tag lists it, or if its subject stays."""
    tagged = await push_image(store, APP, "tagged", "a", "kept")
    child = await push_image(store, APP, "child", "b")
    referrer = await push_image(store, APP, "referrer", "c", subject=tagged.digest)
    own = await push_image(store, APP, "own", "d")
    await store.put_manifest(APP, index_of([child.descriptor]), [Tag("index")], by=BY)
    plan = await store.tag_removals.plan(APP, [Tag(name) for name in ("d", "a", "b", "c", "none")])
    assert [(tag.name, tag.digest) for tag in plan.tags] == [
        ("a", tagged.digest),
        ("b", child.digest),
        ("c", referrer.digest),
        ("d", own.digest),
    ]
    assert (list(plan.manifests), plan.freed_bytes) == ([own.digest], sum(blob.size for blob in own.blobs))


async def test_signatures_of_signatures(store: StoredRegistry) -> None:
    """The tag of a referrer is deleted with its image, and so are the referrers of its manifest. Other tags that begin
    with the same text stay."""
    image = await push_image(store, APP, "image", "v1")
    prefix = image.digest.replace(":", "-")
    first = await push_image(store, APP, "first", f"{prefix}.sig")
    await push_image(store, APP, "second", f"{first.digest.replace(':', '-')}.sig")
    await push_image(store, APP, "third", f"{prefix}-x", f"{prefix}x")
    plan = await store.tag_removals.plan(APP, [Tag("v1")])
    assert [tag.is_requested for tag in plan.tags] == [True, False, False]
    assert len(plan.manifests) == 3


async def test_large_removals_are_counted_in_part(store: StoredRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        await push_image(store, APP, str(number), f"v{number}")
    tags = [Tag(f"v{number}") for number in range(5)]
    assert (await store.tag_removals.plan(APP, tags)).is_complete
    monkeypatch.setattr(sqlite_tag_removals, "MAX_REMOVED_MANIFESTS", 3)
    plan = await store.tag_removals.plan(APP, tags)
    assert (len(plan.tags), len(plan.manifests), plan.is_complete) == (5, 3, False)


async def test_unknown(store: StoredRegistry) -> None:
    with pytest.raises(NameUnknown):
        await store.tag_removals.plan(NOWHERE, [Tag("v1")])
