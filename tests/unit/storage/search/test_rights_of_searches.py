"""A search finds all that its principal may see, and nothing else."""

from __future__ import annotations

import random

import pytest

from storage.content_search import search_words
from storage.metadata.sqlite.search import search_queries, search_scope
from storage.names import RepositoryName
from storage.patterns import ALL_NAMES, NamePattern, NameSet
from tests.fakes.registry_content import push_image

from .conftest import SearchedStore

PARTS = ("app", "web", "db", "app-x", "ghcr.io")
PATTERNS = ("**", "*", "app/**", "app*", "web/app", "ghcr.io/**", "ghcr.io/app/*", "db/**", "a**", "*/app", "db/app-x")
WORDS = ("app", "we", "b", "x", "io app", "app/web", "ghcr")


async def fill(searched: SearchedStore) -> dict[str, str]:
    """Pushes to all names of up to two parts, and to some of three. Returns the digests."""
    names = [first for first in PARTS if "." not in first]
    names += [f"{first}/{second}" for first in PARTS for second in PARTS]
    names += [f"ghcr.io/{second}/{third}" for second in PARTS for third in ("app", "web")]
    digests = {}
    for name in names:
        made = await push_image(
            searched.store, RepositoryName(name), name, "v1", "v2-app", annotations={"color": "red", "name": name}
        )
        digests[name] = str(made.digest)
    await searched.index()
    return digests


@pytest.mark.usefixtures("listed_repositories")
async def test_found_is_allowed(searched: SearchedStore) -> None:
    """For hundreds of sets of patterns, guarded upstreams and limits, each search finds content of a repository exactly
    if the repository's name is in the set."""
    digests = await fill(searched)
    chance = random.Random(15)
    for _ in range(150):
        within = NameSet(
            frozenset(map(NamePattern, chance.sample(PATTERNS, chance.randrange(4)))),
            frozenset(["ghcr.io"] if chance.random() < 0.5 else []),
            frozenset(map(NamePattern, chance.sample(PATTERNS, 2))) if chance.random() < 0.3 else None,
        )
        allowed = {name for name in digests if name in within}
        for text in chance.sample(WORDS, 2):
            assert set(await searched.names(text, within)) == {name for name in allowed if found_by_name(text, name)}, (
                text,
                within,
            )
        assert set(await searched.tags("v2", within)) == {f"{name}:v2-app" for name in allowed}
        assert {name.partition(":")[0] for name in await searched.labels("red", within)} == allowed
        name = chance.choice(list(digests))
        assert await searched.digests(digests[name], within) == ([(name, True)] if name in allowed else [])


def found_by_name(text: str, name: str) -> bool:
    """Returns whether a search for `text` finds `name`. One letter finds beginnings of names, two letters beginnings of
    their parts."""
    words = search_words(text)
    if len(words) == 1 and len(text) < 3:
        parts = [name] if len(text) == 1 else name.split("/")
        return any(part.startswith(text) for part in parts)
    return all(word in name for word in words)


async def test_work_is_bounded(searched: SearchedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that would read too many rows of other repositories ends, and says that it is not complete."""
    for module in (search_queries, search_scope):
        monkeypatch.setattr(module, "MAX_ROWS", 5)
    monkeypatch.setattr(search_scope, "MAX_LISTED_REPOSITORIES", 0)
    for number in range(10):
        await push_image(
            searched.store, RepositoryName(f"secret/app{number}"), str(number), "v1", annotations={"color": "red"}
        )
    await push_image(searched.store, RepositoryName("open/app"), "last", "v1", annotations={"color": "red"})
    await searched.index()
    search, within = searched.store.search, NameSet.of(["*/app"])  # a pattern that no index helps with
    for page in (
        await search.repositories(["app"], within, 0, 10),
        await search.tags(["v1"], within, 0, 10),
        await search.labels(["red"], within, 0, 10),
    ):
        assert not page.is_complete
    narrow = await search.repositories(["app"], NameSet.of(["open/**"]), 0, 10)
    assert (list(narrow.items), narrow.is_complete) == (["open/app"], True)


async def test_time_is_bounded(searched: SearchedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that takes too long ends, and says that it is not complete. The next one is not affected."""
    await searched.push("team/app:v1", annotations={"color": "red"})
    search = searched.store.search
    searches = (
        lambda: search.repositories(["app"], ALL_NAMES, 0, 10),
        lambda: search.tags(["v1"], ALL_NAMES, 0, 10),
        lambda: search.labels(["red"], ALL_NAMES, 0, 10),
        lambda: search.digests("sha256:" + "0" * 12, ALL_NAMES, 0, 10),
    )
    with monkeypatch.context() as patched:
        patched.setattr(search_scope, "MAX_SECONDS", -1.0)
        patched.setattr(search_scope, "STEPS_PER_LOOK", 1)
        for find in searches:
            page = await find()
            assert (list(page.items), page.is_complete) == ([], False)
    assert [(await find()).is_complete for find in searches] == [True] * 4
    assert await searched.labels("red") == ["team/app:v1"]


async def test_words_of_labels_are_bounded(searched: SearchedStore) -> None:
    """Of a word with many parts, and of many words, only the first parts are indexed."""
    parts = [f"p{number}" for number in range(20)]
    await searched.push("team/app:v1", annotations={"text": " ".join(parts[:8]), "more": " ".join(parts[10:18])})
    assert await searched.labels(".".join(parts)) == ["team/app:v1"]
    assert await searched.labels(f"{'.'.join(parts[:8])} {'.'.join(parts[10:])} nowhere") == ["team/app:v1"]
    assert await searched.labels(".".join(parts[1:9])) == []
