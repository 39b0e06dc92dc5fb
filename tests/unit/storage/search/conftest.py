"""Fixtures of the search tests: a store with a search index, and searches that return their results as short texts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.content_search import search_words
from storage.metadata.sqlite.search import search_scope
from storage.names import RepositoryName
from storage.patterns import ALL_NAMES, NameSet
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import push_image

RESULT_LIMIT = 100
"""More results than a search in a test has."""


@dataclass
class SearchedStore:
    """A store and its search index. `names`, `tags`, `labels` and `digests` search in it. `within`: the repositories
    that the user who searches may see."""

    store: StoredRegistry

    async def push(self, *references: str, **fields: Any) -> None:
        """Pushes an image for each reference, such as `team/app:v1`, and indexes it."""
        for reference in references:
            repo, _, tag = reference.partition(":")
            await push_image(self.store, RepositoryName(repo), reference, *([tag] if tag else []), **fields)
        await self.index()

    async def index(self) -> None:
        await self.store.search_indexer.run()
        assert not await self.store.search.is_indexing()

    async def names(self, text: str, within: NameSet = ALL_NAMES) -> list[str]:
        page = await self.store.search.find_repositories(search_words(text), within, 0, RESULT_LIMIT)
        assert not page.more  # there is no further page
        # A search in all repositories has found everything. A search in some of them may not say so.
        assert page.is_complete or not within.has_every_name
        return list(page.items)

    async def tags(self, text: str, within: NameSet = ALL_NAMES) -> list[str]:
        page = await self.store.search.find_tags(search_words(text), within, 0, RESULT_LIMIT)
        return [f"{result.repository}:{result.tag}" for result in page.items]

    async def labels(self, text: str, within: NameSet = ALL_NAMES) -> list[str]:
        page = await self.store.search.find_by_labels(search_words(text), within, 0, RESULT_LIMIT)
        return [f"{result.repository}:{result.tag}" for result in page.items]

    async def digests(self, text: str, within: NameSet = ALL_NAMES) -> list[tuple[str, bool]]:
        """Searches for digests. Returns for each result the repository, and whether it is a manifest."""
        page = await self.store.search.find_by_digest(text, within, 0, RESULT_LIMIT)
        return [(result.repository, result.is_manifest) for result in page.items]


@pytest.fixture(autouse=True)
def late_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives each search a minute. Otherwise, a search on a busy machine could reach its time limit and find too
    little."""
    monkeypatch.setattr(search_scope, "MAX_SECONDS", 60.0)


@pytest.fixture
async def searched(tmp_path: Path) -> AsyncIterator[SearchedStore]:
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path) as store:
        yield SearchedStore(store)


@pytest.fixture(params=[search_scope.MAX_LISTED_REPOSITORIES, 0], ids=["few", "many"])
def listed_repositories(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test twice. In the first run, a search lists the repositories that the user may see. In the second run, it
    compares each result with the user's rights, as it does if the user may see many repositories."""
    monkeypatch.setattr(search_scope, "MAX_LISTED_REPOSITORIES", request.param)
