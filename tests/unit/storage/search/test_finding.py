"""Which repositories, tags, labels and digests a search finds, and in which order."""

from __future__ import annotations

import json

import pytest

from storage.content import OCI_MANIFEST, Descriptor
from storage.content_search import MAX_TEXT_CHARACTERS, search_words
from storage.metadata.sqlite.search.index_tables import words_of_tag
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import ALL_NAMES, NO_NAMES, NameSet
from tests.fakes.registry_content import BY, descriptor_of, image_of, index_of, push_blob, push_image

from .conftest import SearchedStore

APP = RepositoryName("team/app")


async def test_repository_names(searched: SearchedStore) -> None:
    """The names of repositories are found in this order: names that begin with the word, names whose last part is the
    word, names with a part that begins with the word, and all other names that contain the word."""
    await searched.push("hub/library/nginx", "nginx-tools/x", "hub/nginx-unit/y", "a/my-nginx", "other/app")
    assert await searched.names("nginx") == ["nginx-tools/x", "hub/library/nginx", "hub/nginx-unit/y", "a/my-nginx"]
    assert await searched.names("NGINX hub") == ["hub/library/nginx", "hub/nginx-unit/y"]
    assert await searched.names("ginx y") == ["a/my-nginx", "hub/library/nginx", "hub/nginx-unit/y"]
    for text in ("", " ", "nginxx", "näme", 'ng"x', "ng*", "^other", "nginx:latest", "\0", "%"):
        assert await searched.names(text) == [], text


@pytest.mark.parametrize(("text", "expected"), [("o", ["other/app"]), ("ot", ["other/app"]), ("ap", ["other/app"])])
async def test_words_of_one_or_two_letters(searched: SearchedStore, text: str, expected: list[str]) -> None:
    """A word of one letter finds names that begin with this letter. A word of two letters finds names with a part that
    begins with these letters."""
    await searched.push("other/app", "x/yz")
    assert await searched.names(text) == expected


async def test_pages_of_names(searched: SearchedStore) -> None:
    """Pages of results have each name once. A page after the last result is empty."""
    await searched.push(*(f"team/app{number}" for number in range(5)))
    names: list[str] = []
    for offset in (0, 2, 4):
        page = await searched.store.search.find_repositories(["app"], ALL_NAMES, offset, 2)
        assert page.more == (offset < 4)
        names += page.items
    assert names == [f"team/app{number}" for number in range(5)]
    assert (await searched.store.search.find_repositories(["app"], ALL_NAMES, 2000, 2)).items == []


def test_words_of_a_tag() -> None:
    """The words under which a tag is indexed are the whole tag and its ends after a hyphen or underscore, at most
    five."""
    assert words_of_tag("3.18-Alpine_slim") == ["3.18-alpine_slim", "alpine_slim", "slim"]
    assert words_of_tag("_a--b") == ["_a--b", "a--b", "b"]
    assert len(words_of_tag("-".join("a" * 60))) == 5


async def test_tags(searched: SearchedStore) -> None:
    """A tag is found by the beginning of one of its words, regardless of case. If the search has several words, the
    other words must be in the repository's name or in the tag."""
    await searched.push("team/app:1.2-Alpine", "team/app:latest", "other/db:1.2", "other/db:alpine")
    assert sorted(await searched.tags("alp")) == ["other/db:alpine", "team/app:1.2-Alpine"]
    assert await searched.tags("app 1.2") == await searched.tags("team/app:1.2") == ["team/app:1.2-Alpine"]
    assert await searched.tags("lpine") == await searched.tags("app v9") == await searched.tags("") == []


async def test_deleted_content_is_not_found(searched: SearchedStore) -> None:
    """Deleted content is not found any more as soon as it is deleted. A tag that is pushed again is found again."""
    await searched.push("team/app:v1", "team/app:v2", annotations={"org.note": "hello"})
    store = searched.store
    await store.delete_tag(APP, Tag("v1"), by=BY)
    assert await searched.tags("v") == ["team/app:v2"]
    digest = (await store.resolve_manifest(APP, Tag("v2"))).digest
    await store.delete_manifest(APP, digest, by=BY)
    assert await searched.tags("v") == [] == await searched.digests(digest)
    assert await searched.labels("hello") == ["team/app:None"]  # the other manifest stays, without a tag
    [untagged] = (await store.search.find_by_labels(["hello"], ALL_NAMES, 0, 10)).items
    await store.delete_manifest(APP, untagged.digest, by=BY)
    assert await searched.labels("hello") == [] == await searched.names("app")
    await searched.index()
    await searched.push("team/app:v1")
    assert await searched.tags("v") == ["team/app:v1"]


async def test_labels(searched: SearchedStore) -> None:
    """The labels in configs and the annotations of manifests are found by whole words. An image with two platforms is
    found once."""
    store = searched.store
    labels = {"maintainer": "Alice <alice@example.com>", "lines": "one\ntwo"}
    platform_images = []
    for platform in ("amd64", "arm64"):
        config = await push_blob(store, APP, json.dumps({"config": {"Labels": labels}, "arch": platform}).encode())
        platform_image = image_of(config, annotations={"org.source": "https://git.example.com/team/app"})
        await store.put_manifest(APP, platform_image, by=BY)
        platform_images.append(Descriptor(OCI_MANIFEST, platform_image.digest, len(platform_image.body)))
    await store.put_manifest(APP, index_of(platform_images), [Tag("multi")], by=BY)
    await searched.index()
    for text in ("alice", "ALICE maintainer", "git.example.com/team/app", "org.source", "two lines"):
        assert await searched.labels(text) == ["team/app:multi"], text
    [result] = (await store.search.find_by_labels(["alice"], ALL_NAMES, 0, 10)).items
    assert result.labels == {"maintainer": "Alice <alice@example.com>"}
    assert result.digest in [platform_image.digest for platform_image in platform_images]
    for text in ("lice", "bob", "", "=", '"', "alice AND", "NOT alice bob", "text:alice"):
        assert await searched.labels(text) == [], text


async def test_large_and_odd_labels(searched: SearchedStore) -> None:
    """If a config has many labels, only the first ones are indexed, so that the index stays small. Malformed labels
    cause no error."""
    store = searched.store
    for number, config in enumerate((
        {"config": {"Labels": {f"label{number:05d}": "x" * 100 for number in range(2000)}}},
        {"config": {"Labels": {"a": 7, "b": None, "c": ["d"]}}},
        {"config": {"Labels": ["a"]}},
        {"config": []},
        [],
    )):  # fmt: skip
        blob = await push_blob(store, APP, json.dumps(config).encode())
        await store.put_manifest(APP, image_of(blob), [Tag(f"v{number}")], by=BY)
    blob = await push_blob(store, APP, b'{"config": {"Labels": {"lone": "\\ud800 surrogate"}}}')
    await store.put_manifest(APP, image_of(blob), [Tag("lone")], by=BY)
    blob = await push_blob(store, APP, b"no JSON")
    await store.put_manifest(APP, image_of(blob), [Tag("none")], by=BY)
    await searched.index()
    assert await searched.labels("label00000") == ["team/app:v0"]
    assert await searched.labels("label01999") == []
    assert await searched.labels("surrogate") == ["team/app:lone"]
    [result] = (await store.search.find_by_labels(["label00000"], ALL_NAMES, 0, 1)).items
    assert sum(map(len, result.labels.values())) < MAX_TEXT_CHARACTERS


async def test_a_config_that_comes_later(searched: SearchedStore) -> None:
    """A mirror stores a manifest before its config. The labels of the config are found after the config is stored."""
    store, repo = searched.store, RepositoryName("hub.example/team/app")
    data = json.dumps({"config": {"Labels": {"color": "purple"}}}).encode()
    await store.metadata.put_manifest(repo, image_of(descriptor_of(data)), [Tag("v1")], BY, True, None)
    await searched.index()
    labels_before = await searched.labels("purple")
    await push_blob(store, repo, data)
    await searched.index()
    assert (labels_before, await searched.labels("purple")) == ([], ["hub.example/team/app:v1"])


async def test_digests(searched: SearchedStore) -> None:
    """A digest is found by its first digits, with or without the algorithm. A blob is found in the repositories in
    which a manifest refers to it."""
    store = searched.store
    image = await push_image(store, APP, "seed", "v1")
    await push_blob(store, RepositoryName("other/app"), b"layer of seed")
    await searched.index()
    for text in (image.digest, image.digest[:20], image.digest.encoded[:6], image.digest.encoded[:20].upper()):
        assert (await searched.digests(text))[:1] == [("team/app", True)], text
    assert await searched.digests(image.blobs[1].digest) == [("team/app", False)]
    unknown = Digest("sha256:" + "0" * 64)
    for text in (image.digest.encoded[:5], unknown, "", "sha256:", "md5:" + image.digest.encoded, "x" * 300, "g" * 12):
        assert await searched.digests(text) == [], text


async def test_a_row_id_that_is_used_again(searched: SearchedStore) -> None:
    """After the row with the highest id was deleted, SQLite gives this id to the next row. The index then has the new
    manifest instead of the deleted one."""
    store = searched.store
    first = await push_image(store, APP, "first", "v1", annotations={"color": "red"})
    await searched.index()
    await store.delete_manifest(APP, first.digest, by=BY, restorable=False)
    await push_image(store, APP, "second", "v1", annotations={"color": "blue"})
    await searched.index()
    assert (await searched.labels("red"), await searched.labels("blue")) == ([], ["team/app:v1"])
    assert await searched.digests(first.digest) == []


async def test_a_manifest_that_is_replaced_while_it_is_indexed(searched: SearchedStore) -> None:
    """A manifest may be deleted while it is indexed, and a new manifest may get its row id. The index then has the new
    manifest."""
    store = searched.store
    first = await push_image(store, APP, "first", "v1", annotations={"color": "red"})
    index = store.search_index
    batch = await index.unindexed_manifests()
    await store.delete_manifest(APP, first.digest, by=BY, restorable=False)
    await push_image(store, APP, "second", "v1", annotations={"color": "blue"})
    await index.add_manifests(batch, [await store.search_indexer.labels_of(each) for each in batch.manifests])
    await searched.index()
    assert (await searched.labels("red"), await searched.labels("blue")) == ([], ["team/app:v1"])


async def test_searches_find_nothing_outside_the_allowed_repositories(searched: SearchedStore) -> None:
    """A user finds nothing in repositories that the user may not see."""
    await searched.push("team/app:v1", annotations={"color": "red"})
    digest = (await searched.store.resolve_manifest(APP, Tag("v1"))).digest
    for within in (NO_NAMES, NameSet.of(["other/**"])):
        assert await searched.names("app", within) == await searched.tags("v1", within) == []
        assert await searched.labels("red", within) == [] == await searched.digests(digest, within)


def test_words_of_a_search() -> None:
    """The text of a search is split at white space, in lower case. The number of words and their length are limited."""
    assert search_words(" One  TWO\tthree\n") == ["one", "two", "three"]
    assert len(search_words("word " * 100)) == 8
    assert search_words("x" * 500) == ["x" * 128]
