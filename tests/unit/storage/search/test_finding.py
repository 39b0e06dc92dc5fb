"""What a search finds, and in which order."""

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


async def test_names(searched: SearchedStore) -> None:
    """The best matches come first: names that begin with the word, then names whose last part is the word, then names
    with a part that begins with it, then all others."""
    await searched.push("hub/library/nginx", "nginx-tools/x", "hub/nginx-unit/y", "a/my-nginx", "other/app")
    assert await searched.names("nginx") == ["nginx-tools/x", "hub/library/nginx", "hub/nginx-unit/y", "a/my-nginx"]
    assert await searched.names("NGINX hub") == ["hub/library/nginx", "hub/nginx-unit/y"]
    assert await searched.names("ginx y") == ["a/my-nginx", "hub/library/nginx", "hub/nginx-unit/y"]
    for text in ("", " ", "nginxx", "näme", 'ng"x', "ng*", "^other", "nginx:latest", "\0", "%"):
        assert await searched.names(text) == [], text


@pytest.mark.parametrize(("text", "found"), [("o", ["other/app"]), ("ot", ["other/app"]), ("ap", ["other/app"])])
async def test_short_words(searched: SearchedStore, text: str, found: list[str]) -> None:
    """One letter finds names that begin with it. Two letters find names with a part that begins with them."""
    await searched.push("other/app", "x/yz")
    assert await searched.names(text) == found


async def test_pages_of_names(searched: SearchedStore) -> None:
    await searched.push(*(f"team/app{number}" for number in range(5)))
    found: list[str] = []
    for offset in (0, 2, 4):
        page = await searched.store.search.repositories(["app"], ALL_NAMES, offset, 2)
        assert page.more == (offset < 4)
        found += page.items
    assert found == [f"team/app{number}" for number in range(5)]
    assert (await searched.store.search.repositories(["app"], ALL_NAMES, 2000, 2)).items == []


def test_words_of_a_tag() -> None:
    assert words_of_tag("3.18-Alpine_slim") == ["3.18-alpine_slim", "alpine_slim", "slim"]
    assert words_of_tag("_a--b") == ["_a--b", "a--b", "b"]
    assert len(words_of_tag("-".join("a" * 60))) == 5


async def test_tags(searched: SearchedStore) -> None:
    """A tag is found by the beginning of a word, regardless of case. The other words of the search have to be in the
    name or in the tag."""
    await searched.push("team/app:1.2-Alpine", "team/app:latest", "other/db:1.2", "other/db:alpine")
    assert sorted(await searched.tags("alp")) == ["other/db:alpine", "team/app:1.2-Alpine"]
    assert await searched.tags("app 1.2") == await searched.tags("team/app:1.2") == ["team/app:1.2-Alpine"]
    assert await searched.tags("lpine") == await searched.tags("app v9") == await searched.tags("") == []


async def test_what_is_deleted_is_not_found(searched: SearchedStore) -> None:
    """Deleted content is not found from the delete on, and its rows are removed from the index."""
    await searched.push("team/app:v1", "team/app:v2", annotations={"org.note": "hello"})
    store = searched.store
    await store.delete_tag(APP, Tag("v1"), by=BY)
    assert await searched.tags("v") == ["team/app:v2"]
    digest = (await store.resolve_manifest(APP, Tag("v2"))).digest
    await store.delete_manifest(APP, digest, by=BY)
    assert await searched.tags("v") == [] == await searched.digests(digest)
    assert await searched.labels("hello") == ["team/app:None"]  # the other manifest stays, without a tag
    [other] = (await store.search.labels(["hello"], ALL_NAMES, 0, 10)).items
    await store.delete_manifest(APP, other.digest, by=BY)
    assert await searched.labels("hello") == [] == await searched.names("app")
    await searched.index()
    await searched.push("team/app:v1")
    assert await searched.tags("v") == ["team/app:v1"]


async def test_labels(searched: SearchedStore) -> None:
    """The labels of manifests and configs are found by whole words. An image of two platforms is found once."""
    store = searched.store
    labels = {"maintainer": "Alice <alice@example.com>", "lines": "one\ntwo"}
    parts = []
    for platform in ("amd64", "arm64"):
        config = await push_blob(store, APP, json.dumps({"config": {"Labels": labels}, "arch": platform}).encode())
        part = image_of(config, annotations={"org.source": "https://git.example.com/team/app"})
        await store.put_manifest(APP, part, by=BY)
        parts.append(Descriptor(OCI_MANIFEST, part.digest, len(part.body)))
    await store.put_manifest(APP, index_of(parts), [Tag("multi")], by=BY)
    await searched.index()
    for text in ("alice", "ALICE maintainer", "git.example.com/team/app", "org.source", "two lines"):
        assert await searched.labels(text) == ["team/app:multi"], text
    [found] = (await store.search.labels(["alice"], ALL_NAMES, 0, 10)).items
    assert found.labels == {"maintainer": "Alice <alice@example.com>"}
    assert found.digest in [part.digest for part in parts]
    for text in ("lice", "bob", "", "=", '"', "alice AND", "NOT alice bob", "text:alice"):
        assert await searched.labels(text) == [], text


async def test_large_and_odd_labels(searched: SearchedStore) -> None:
    """Of many labels, the index has the first ones, and stays small. Values that are no labels cause no error."""
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
    [found] = (await store.search.labels(["label00000"], ALL_NAMES, 0, 1)).items
    assert sum(map(len, found.labels.values())) < MAX_TEXT_CHARACTERS


async def test_a_config_that_comes_later(searched: SearchedStore) -> None:
    """A config that is stored after its manifest is indexed, as in a mirror, which stores the manifest first."""
    store, repo = searched.store, RepositoryName("hub.example/team/app")
    data = json.dumps({"config": {"Labels": {"color": "purple"}}}).encode()
    await store.metadata.put_manifest(repo, image_of(descriptor_of(data)), [Tag("v1")], BY, True, None)
    await searched.index()
    before = await searched.labels("purple")
    await push_blob(store, repo, data)
    await searched.index()
    assert (before, await searched.labels("purple")) == ([], ["hub.example/team/app:v1"])


async def test_digests(searched: SearchedStore) -> None:
    """A digest is found by its first digits, with or without the algorithm. A blob is found in repositories where a
    manifest refers to it."""
    store = searched.store
    made = await push_image(store, APP, "seed", "v1")
    await push_blob(store, RepositoryName("other/app"), b"layer of seed")
    await searched.index()
    for text in (made.digest, made.digest[:20], made.digest.encoded[:6], made.digest.encoded[:20].upper()):
        assert (await searched.digests(text))[:1] == [("team/app", True)], text
    assert await searched.digests(made.blobs[1].digest) == [("team/app", False)]
    unknown = Digest("sha256:" + "0" * 64)
    for text in (made.digest.encoded[:5], unknown, "", "sha256:", "md5:" + made.digest.encoded, "x" * 300, "g" * 12):
        assert await searched.digests(text) == [], text


async def test_a_row_id_that_is_used_again(searched: SearchedStore) -> None:
    """After the row with the highest id was deleted, SQLite uses this id again. The index then has the new manifest."""
    store = searched.store
    first = await push_image(store, APP, "first", "v1", annotations={"color": "red"})
    await searched.index()
    await store.delete_manifest(APP, first.digest, by=BY, restorable=False)
    await push_image(store, APP, "second", "v1", annotations={"color": "blue"})
    await searched.index()
    assert (await searched.labels("red"), await searched.labels("blue")) == ([], ["team/app:v1"])
    assert await searched.digests(first.digest) == []


async def test_a_manifest_that_is_replaced_while_it_is_indexed(searched: SearchedStore) -> None:
    store = searched.store
    first = await push_image(store, APP, "first", "v1", annotations={"color": "red"})
    index = store.search_index
    batch = await index.unindexed_manifests()
    await store.delete_manifest(APP, first.digest, by=BY, restorable=False)
    await push_image(store, APP, "second", "v1", annotations={"color": "blue"})
    await index.add_manifests(batch, [await store.search_indexer.labels_of(each) for each in batch.manifests])
    await searched.index()
    assert (await searched.labels("red"), await searched.labels("blue")) == ([], ["team/app:v1"])


async def test_nothing_for_nobody(searched: SearchedStore) -> None:
    await searched.push("team/app:v1", annotations={"color": "red"})
    digest = (await searched.store.resolve_manifest(APP, Tag("v1"))).digest
    for within in (NO_NAMES, NameSet.of(["other/**"])):
        assert await searched.names("app", within) == await searched.tags("v1", within) == []
        assert await searched.labels("red", within) == [] == await searched.digests(digest, within)


def test_words_of_a_search() -> None:
    assert search_words(" One  TWO\tthree\n") == ["one", "two", "three"]
    assert len(search_words("word " * 100)) == 8
    assert search_words("x" * 500) == ["x" * 128]
