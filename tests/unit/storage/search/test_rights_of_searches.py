"""A search finds all matching content that the user may see, and no other content. Its time and memory are limited."""

from __future__ import annotations

import random

import pytest

from storage.content_search import search_words
from storage.metadata.sqlite.search import search_queries, search_scope
from storage.names import RepositoryName
from storage.patterns import ALL_NAMES, NamePattern, NameSet
from tests.fakes.registry_content import push_image

from .conftest import SearchedStore

NAME_PARTS = ("app", "web", "db", "app-x", "ghcr.io")
PATTERNS = ("**", "*", "app/**", "app*", "web/app", "ghcr.io/**", "ghcr.io/app/*", "db/**", "a**", "*/app", "db/app-x")
WORDS = ("app", "we", "b", "x", "io app", "app/web", "ghcr")


async def push_images(searched: SearchedStore) -> dict[str, str]:
    """Pushes an image to all names that have one or two of `NAME_PARTS`, and to some names with three parts. Returns
    the digest for each name."""
    names = [first for first in NAME_PARTS if "." not in first]
    names += [f"{first}/{second}" for first in NAME_PARTS for second in NAME_PARTS]
    names += [f"ghcr.io/{second}/{third}" for second in NAME_PARTS for third in ("app", "web")]
    digests = {}
    for name in names:
        image = await push_image(
            searched.store, RepositoryName(name), name, "v1", "v2-app", annotations={"color": "red", "name": name}
        )
        digests[name] = str(image.digest)
    await searched.index()
    return digests


@pytest.mark.usefixtures("listed_repositories")
@pytest.mark.slow
async def test_a_search_finds_exactly_the_allowed_repositories(searched: SearchedStore) -> None:
    """The rights of a user are a set of names, made of patterns, guarded upstreams and limits. For many random sets,
    each search finds the content of a repository exactly if the repository's name is in the set."""
    digests = await push_images(searched)
    rng = random.Random(15)
    for _ in range(150):
        within = NameSet(
            frozenset(map(NamePattern, rng.sample(PATTERNS, rng.randrange(4)))),
            frozenset(["ghcr.io"] if rng.random() < 0.5 else []),
            frozenset(map(NamePattern, rng.sample(PATTERNS, 2))) if rng.random() < 0.3 else None,
        )
        allowed = {name for name in digests if name in within}
        for text in rng.sample(WORDS, 2):
            assert set(await searched.names(text, within)) == {name for name in allowed if found_by_name(text, name)}, (
                text,
                within,
            )
        assert set(await searched.tags("v2", within)) == {f"{name}:v2-app" for name in allowed}
        assert {name.partition(":")[0] for name in await searched.labels("red", within)} == allowed
        name = rng.choice(list(digests))
        assert await searched.digests(digests[name], within) == ([(name, True)] if name in allowed else [])


def found_by_name(text: str, name: str) -> bool:
    """Returns whether a search for `text` must find the repository `name`. One letter finds names that begin with it.
    Two letters find names with a part that begins with them."""
    words = search_words(text)
    if len(words) == 1 and len(text) < 3:
        parts = [name] if len(text) == 1 else name.split("/")
        return any(part.startswith(text) for part in parts)
    return all(word in name for word in words)


async def test_work_of_a_search_is_limited(searched: SearchedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a search would read too many rows of repositories that the user may not see, it ends, and its result states
    that it is not complete."""
    for module in (search_queries, search_scope):
        monkeypatch.setattr(module, "MAX_ROWS", 5)
    monkeypatch.setattr(search_scope, "MAX_LISTED_REPOSITORIES", 0)
    for number in range(10):
        await push_image(
            searched.store, RepositoryName(f"secret/app{number}"), str(number), "v1", annotations={"color": "red"}
        )
    await push_image(searched.store, RepositoryName("open/app"), "last", "v1", annotations={"color": "red"})
    await searched.index()
    search, within = searched.store.search, NameSet.of(["*/app"])  # no index of the database helps with this pattern
    for page in (
        await search.find_repositories(["app"], within, 0, 10),
        await search.find_tags(["v1"], within, 0, 10),
        await search.find_by_labels(["red"], within, 0, 10),
    ):
        assert not page.is_complete
    narrow_search = await search.find_repositories(["app"], NameSet.of(["open/**"]), 0, 10)
    assert list(narrow_search.items) == ["open/app"]


async def test_a_search_does_not_tell_whether_hidden_content_matches(
    searched: SearchedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user may see very many repositories, but not all. The result of a search is the same, whether nothing or very
    much of the content matches that the user may not see."""
    for module in (search_queries, search_scope):
        monkeypatch.setattr(module, "MAX_ROWS", 5)
    monkeypatch.setattr(search_scope, "MAX_LISTED_REPOSITORIES", 0)
    for number in range(10):
        repo = RepositoryName(f"secret/hidden{number}")
        await push_image(searched.store, repo, str(number), "hidden", annotations={"color": "hidden"})
    await push_image(searched.store, RepositoryName("open/app"), "last", "v1", annotations={"color": "red"})
    await searched.index()
    search, within = searched.store.search, NameSet.of(["*/app"])
    for find in (search.find_repositories, search.find_tags, search.find_by_labels):
        assert await find(["hidden"], within, 0, 10) == await find(["absent"], within, 0, 10)
        everything = await find(["absent"], ALL_NAMES, 0, 10)
        assert everything.is_complete


async def test_time_of_a_search_is_limited(searched: SearchedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a search takes too long, it ends, and its result states that it is not complete. The next search is not
    affected."""
    await searched.push("team/app:v1", annotations={"color": "red"})
    search = searched.store.search
    searches = (
        lambda: search.find_repositories(["app"], ALL_NAMES, 0, 10),
        lambda: search.find_tags(["v1"], ALL_NAMES, 0, 10),
        lambda: search.find_by_labels(["red"], ALL_NAMES, 0, 10),
        lambda: search.find_by_digest("sha256:" + "0" * 12, ALL_NAMES, 0, 10),
    )
    with monkeypatch.context() as patched:
        patched.setattr(search_scope, "MAX_SECONDS", -1.0)
        patched.setattr(search_scope, "STEPS_PER_CLOCK_CHECK", 1)
        for find in searches:
            page = await find()
            assert (list(page.items), page.is_complete) == ([], False)
    assert [(await find()).is_complete for find in searches] == [True] * 4
    assert await searched.labels("red") == ["team/app:v1"]


async def test_indexed_words_of_labels_are_limited(searched: SearchedStore) -> None:
    """A search has a limited number of words and parts of words. Only the first ones are compared with the labels."""
    parts = [f"p{number}" for number in range(20)]
    await searched.push("team/app:v1", annotations={"text": " ".join(parts[:8]), "more": " ".join(parts[10:18])})
    assert await searched.labels(".".join(parts)) == ["team/app:v1"]
    assert await searched.labels(f"{'.'.join(parts[:8])} {'.'.join(parts[10:])} nowhere") == ["team/app:v1"]
    assert await searched.labels(".".join(parts[1:9])) == []
