"""The plan for a removal of tags: which tags and manifests would be deleted, and how many bytes would be freed."""

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


async def test_manifests_in_use_are_not_removed(store: StoredRegistry) -> None:
    """A manifest stays if it has another tag, if an index with a tag lists it, or if it refers to a manifest that
    stays."""
    tagged = await push_image(store, APP, "tagged", "a", "kept")
    child = await push_image(store, APP, "child", "b")
    referrer = await push_image(store, APP, "referrer", "c", subject=tagged.digest)
    removed_image = await push_image(store, APP, "own", "d")
    await store.put_manifest(APP, index_of([child.descriptor]), [Tag("index")], by=BY)
    plan = await store.tag_removals.plan(APP, [Tag(name) for name in ("d", "a", "b", "c", "none")])
    assert [(tag.name, tag.digest) for tag in plan.tags] == [
        ("a", tagged.digest),
        ("b", child.digest),
        ("c", referrer.digest),
        ("d", removed_image.digest),
    ]
    assert (list(plan.manifests), plan.freed_bytes) == (
        [removed_image.digest],
        sum(blob.size for blob in removed_image.blobs),
    )


async def test_signatures_are_removed_with_their_image(store: StoredRegistry) -> None:
    """If an image is removed, the tag of its signature is removed as well, and so is the signature of this signature.
    Other tags that begin with the same text stay."""
    image = await push_image(store, APP, "image", "v1")
    prefix = image.digest.replace(":", "-")
    first = await push_image(store, APP, "first", f"{prefix}.sig")
    await push_image(store, APP, "second", f"{first.digest.replace(':', '-')}.sig")
    await push_image(store, APP, "third", f"{prefix}-x", f"{prefix}x")
    plan = await store.tag_removals.plan(APP, [Tag("v1")])
    assert [tag.is_requested for tag in plan.tags] == [True, False, False]
    assert len(plan.manifests) == 3


async def test_plan_of_a_large_removal_is_not_complete(store: StoredRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a removal deletes more manifests than the plan can list, the plan states that it is not complete."""
    for number in range(5):
        await push_image(store, APP, str(number), f"v{number}")
    tags = [Tag(f"v{number}") for number in range(5)]
    assert (await store.tag_removals.plan(APP, tags)).is_complete
    monkeypatch.setattr(sqlite_tag_removals, "MAX_REMOVED_MANIFESTS", 3)
    plan = await store.tag_removals.plan(APP, tags)
    assert (len(plan.tags), len(plan.manifests), plan.is_complete) == (5, 3, False)


async def test_unknown_repository(store: StoredRegistry) -> None:
    """There is no plan for an unknown repository."""
    with pytest.raises(NameUnknown):
        await store.tag_removals.plan(NOWHERE, [Tag("v1")])
