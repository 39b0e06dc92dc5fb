"""How the content of a store gets into its search index."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.names import RepositoryName, Tag
from storage.patterns import ALL_NAMES
from storage.upkeep.schedule import cancel_all
from storage.upkeep.search_indexing import keep_indexed
from tests.fakes.registry_content import BY, push_image

from .conftest import SearchedStore

APP = RepositoryName("team/app")


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[SearchedStore]:
    prepare_data_dir(folder)
    async with open_registry(folder) as store:
        yield SearchedStore(store)


async def test_a_store_that_is_older_than_the_index(tmp_path: Path) -> None:
    """After the migration that adds the index, all existing content is indexed. Until then, the store reports that it
    is still indexing."""
    async with opened(tmp_path) as searched:
        await searched.push("team/app:v1", "team/app:v2-x", "other/db:v1", annotations={"color": "red"})
        digest = (await searched.store.resolve_manifest(APP, Tag("v1"))).digest
        await searched.store.search_index.rebuild()  # with the SQL of the migration
        assert await searched.store.search.is_indexing()
        assert await searched.names("app") == []
        await searched.index()
        assert await searched.names("app") == ["team/app"]
        assert sorted(await searched.tags("v1")) == ["other/db:v1", "team/app:v1"]
        assert await searched.tags("x") == ["team/app:v2-x"]
        assert len(await searched.labels("red")) == 3
        assert await searched.digests(digest) == [("team/app", True)]


async def test_content_of_several_batches_is_indexed(tmp_path: Path) -> None:
    """All tags, manifests and repositories are indexed, even if there are too many for one batch."""
    async with opened(tmp_path) as searched:
        image = await push_image(searched.store, APP, "seed", annotations={"color": "red"})
        for number in range(120):
            repo = RepositoryName(f"many/app{number}")
            await searched.store.metadata.put_manifest(
                repo, image, [Tag(f"t{tag}") for tag in range(3)], BY, True, None
            )
        await searched.store.search_index.rebuild()
        await searched.index()
        for text, find, count in (
            ("many/app", searched.store.search.find_repositories, 120),
            ("t", searched.store.search.find_tags, 360),
            ("red", searched.store.search.find_by_labels, 121),
        ):
            page = await find([text], ALL_NAMES, 0, 1000)
            assert (len(page.items), page.is_complete) == (count, True), text


async def test_tags_that_are_created_moved_and_deleted_between_two_batches(tmp_path: Path) -> None:
    """However often tags were created, moved and deleted since the last batch, the index has the tags that exist, each
    with all its words, and no others."""
    async with opened(tmp_path) as searched:
        metadata = searched.store.metadata
        images = [await push_image(searched.store, APP, seed) for seed in ("first", "second")]
        await searched.index()
        tags = [Tag(f"Rel-{number}_x") for number in range(40)]
        stored: set[Tag] = set()
        choices = random.Random(7)
        for _ in range(6):
            for tag in choices.choices(tags, k=70):
                if tag in stored and choices.random() < 0.5:
                    await searched.store.delete_tag(APP, tag, by=BY)
                    stored.remove(tag)
                else:
                    await metadata.put_manifest(APP, choices.choice(images), [tag], BY, True, None)
                    stored.add(tag)
            await searched.index()
            with closing(apsw.Connection(str(tmp_path / "entrepot.db"))) as db:
                indexed: set[Any] = set(db.execute("SELECT word, tag FROM search_tag").fetchall())
            assert indexed == {(word, tag) for tag in stored for word in (tag.lower(), tag[4:].lower(), "x")}


@pytest.mark.slow
async def test_the_background_task(tmp_path: Path) -> None:
    """Each process has a background task that updates the index. If the task of one process ends, the task of the other
    process continues."""
    async with opened(tmp_path) as searched, opened(tmp_path) as other:
        tasks = [
            asyncio.create_task(keep_indexed(each.store.search_indexer, each.store.leases))
            for each in (searched, other)
        ]
        try:
            await push_image(searched.store, APP, "first", "v1")
            await wait_until_found(searched, lambda found: found == ["team/app:v1"])
            await cancel_all(tasks[:1])
            await push_image(other.store, APP, "second", "v2")
            await wait_until_found(searched, lambda found: found == ["team/app:v1", "team/app:v2"])
        finally:
            await cancel_all(tasks)


async def wait_until_found(searched: SearchedStore, is_found: Callable[[list[str]], bool]) -> None:
    """Waits until `is_found` accepts the result of the search for tags."""
    while not is_found(await searched.tags("v")):  # noqa: ASYNC110 - another task writes the index
        await asyncio.sleep(0.02)
