"""Contract tests for lists of tags, repositories and referrers. Lists are in byte order, begin strictly after a given
item, and come in pages that together have each item once."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from storage.content import OCI_MANIFEST, Page, digest_of
from storage.errors import BlobUnknown, DigestInvalid, NameUnknown
from storage.interface import Registry
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import ALL_NAMES, NO_NAMES, NameSet
from tests.fakes.registry_content import (
    BY,
    CONFIG_TYPE,
    NOWHERE,
    all_tags,
    descriptor_of,
    image_of,
    in_bytes_order,
    index_of,
    names_of,
    push_blob,
    push_image,
)

TAGS = [
    *("latest", "Latest", "LATEST", "0", "9", "10", "1", "1.0", "1-0", "1_0", "1.0.0", "a", "A", "_", "__", "_a"),
    *("aa", "a-", "a.", "a_", "Z", "z", "z-z", "b" * 128, "b" * 127, "sha256-abc"),
]
NAMES = ["a", "a/b", "a-b", "a.b", "a_b", "ab", "a0", "0", "z", "b/a", "b", "a/b/c", "a--b", "b0/x", "n" * 255]
CURSORS = [
    *("", "0", "a", "A", "a-", "a/", "a/b", "a.b", "~", "{", "zzz", " ", "\t", "\n", "%", "a%", "'", '"', ";", "a'b"),
    *(
        "é",
        "a\u00e9",
        "a\u0301",
        "\u00ff",
        "\uffff",
        "\U0001f600",
        "\u7530",
        "a\x00",
        "\x00",
        "a\x00b",
        "n" * 1000,
        "\\",
    ),
]
"""Values that a client may send as `last`."""


async def tag_all(registry: Registry, repo: RepositoryName) -> list[str]:
    """Pushes images with all TAGS in random order. Returns the tags in byte order."""
    names = TAGS.copy()
    random.Random(3).shuffle(names)
    for start in range(0, len(names), 5):
        await push_image(registry, repo, str(start), *names[start : start + 5])
    return in_bytes_order(TAGS)


async def push_all(registry: Registry) -> list[str]:
    """Pushes an image to each repository of NAMES, in random order. Returns the names in byte order."""
    names = NAMES.copy()
    random.Random(4).shuffle(names)
    for name in names:
        await push_image(registry, RepositoryName(name), "one", "latest")
    return in_bytes_order(NAMES)


async def walk(request_page: Callable[[str | None], Awaitable[Page[Any]]], limit: int) -> list[str]:
    """Returns the items of all pages. Each page is requested with the last item of the page before. `request_page`:
    requests the page that begins after an item. `limit`: largest allowed number of items in a page."""
    found: list[str] = []
    while True:
        page = await request_page(found[-1] if found else None)
        assert len(page.items) <= limit
        found += page.items
        if not page.more:
            return found
        assert page.items
        assert len(found) <= 1000


async def test_tags_are_in_byte_order(registry: Registry, repo: RepositoryName) -> None:
    """Tags are listed in byte order, so capital letters come before small letters. If all tags fit into one page, no
    page follows."""
    expected = await tag_all(registry, repo)
    page = await registry.tags(repo, None, 1000)
    assert (list(page.items), page.more) == (expected, False)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, len(TAGS) - 1, len(TAGS), len(TAGS) + 1])
async def test_a_walk_through_the_tags(registry: Registry, repo: RepositoryName, limit: int) -> None:
    """Pages of any size together have every tag once. Only the last page says that no page follows."""
    expected = await tag_all(registry, repo)
    assert await walk(lambda after: registry.tags(repo, after, limit), limit) == expected
    first = await registry.tags(repo, None, limit)
    assert (list(first.items), first.more) == (expected[:limit], len(expected) > limit)


@pytest.mark.parametrize("limit", [1, 2, 5, len(NAMES) - 1, len(NAMES), len(NAMES) + 1])
@pytest.mark.slow
async def test_a_walk_through_the_repositories(registry: Registry, limit: int) -> None:
    """Pages of any size together have every repository once, in byte order."""
    expected = await push_all(registry)
    assert await walk(lambda after: registry.repositories(after, limit), limit) == expected


SETS = [
    NO_NAMES,
    ALL_NAMES,
    NameSet.of(["b/**"]),
    NameSet.of(["*"]),
    NameSet.of(["*/*", "nothing/**", "a"]),
    NameSet.of(["**/c", "a/**", "b*"]),
    NameSet.of(["**", "a/b"], guarded=["a", "b"]),
]


@pytest.mark.parametrize("limit", [1, 3, len(NAMES)])
@pytest.mark.slow
async def test_a_walk_through_the_repositories_of_a_set(registry: Registry, limit: int) -> None:
    """A list within a set of names has only the repositories in the set. Its pages are full and in order, and only the
    last page says that no page follows."""
    names = await push_all(registry)
    for within in SETS:
        names_in_set = [name for name in names if name in within]

        async def ask(after: str | None, within: NameSet = within) -> Page[RepositoryName]:
            return await registry.repositories(after, limit, within)

        assert await walk(ask, limit) == names_in_set
        first = await registry.repositories(None, limit, within)
        assert (list(first.items), first.more) == (names_in_set[:limit], len(names_in_set) > limit), within
        for after in (*CURSORS, *names):
            following = [name for name in names_in_set if name.encode() > after.encode()]
            page = await registry.repositories(after, limit, within)
            assert (list(page.items), page.more) == (following[:limit], len(following) > limit), (within, after)


async def test_lists_start_strictly_after(registry: Registry, repo: RepositoryName) -> None:
    """`after` may be any text, also one that is no tag of the repository or no valid tag. The list begins with the
    first tag that follows this text in byte order."""
    tags = await tag_all(registry, repo)
    for after in (*CURSORS, *tags):
        following = [tag for tag in tags if tag.encode() > after.encode()]
        page = await registry.tags(repo, after, 4)
        assert (list(page.items), page.more) == (following[:4], len(following) > 4), after


async def test_repositories_start_strictly_after(registry: Registry) -> None:
    """`after` may be any text. The list begins with the first repository that follows this text in byte order."""
    names = await push_all(registry)
    for after in (*CURSORS, *names):
        following = [name for name in names if name.encode() > after.encode()]
        page = await registry.repositories(after, 4)
        assert (list(page.items), page.more) == (following[:4], len(following) > 4), after


async def test_a_page_of_nothing(registry: Registry, repo: RepositoryName) -> None:
    """A page with the limit 0 (`n=0`) is empty."""
    await push_image(registry, repo, "one", "latest")
    assert list((await registry.tags(repo, None, 0)).items) == []
    assert list((await registry.repositories(None, 0)).items) == []


async def test_a_list_while_it_changes(registry: Registry, repo: RepositoryName) -> None:
    """A client that requests page after page gets each tag once, even if the last tag of a page is deleted before the
    client requests the next page."""
    await tag_all(registry, repo)
    found: list[Tag] = []
    while True:
        page = await registry.tags(repo, found[-1] if found else None, 3)
        found += page.items
        if not page.more:
            break
        await registry.delete_tag(repo, found[-1], by=BY)
    assert [str(tag) for tag in found] == in_bytes_order(TAGS)


async def test_a_registry_without_content(registry: Registry) -> None:
    """A new registry lists no repositories and no referrers. Listing the tags of an unknown repository raises
    NameUnknown."""
    page = await registry.repositories(None, 100)
    assert (list(page.items), page.more) == ([], False)
    with pytest.raises(NameUnknown):
        await registry.tags(NOWHERE, None, 100)
    with pytest.raises(NameUnknown):
        await registry.tags(NOWHERE, "after", 1)
    assert names_of(await registry.referrers(NOWHERE, digest_of(b"x"), None, None, 100)) == []


async def test_an_upload_alone_makes_no_repository(registry: Registry, repo: RepositoryName) -> None:
    """An upload session that is open, failed or cancelled does not create its repository."""
    writer = await registry.start_upload(repo)
    await writer.write(b"bytes")
    with pytest.raises(NameUnknown):
        await registry.tags(repo, None, 10)
    with pytest.raises(DigestInvalid):
        await writer.commit(digest_of(b"others"))
    await (await registry.start_upload(repo)).cancel()
    with pytest.raises(NameUnknown):
        await registry.tags(repo, None, 10)
    with pytest.raises(NameUnknown):
        await registry.delete_tag(repo, Tag("latest"), by=BY)
    assert list((await registry.repositories(None, 10)).items) == []


async def test_a_blob_makes_a_repository_without_tags(registry: Registry, repo: RepositoryName) -> None:
    """A repository that has only a pushed or mounted blob has an empty list of tags, and is not in the list of
    repositories."""
    await push_blob(registry, repo, b"bytes")
    mounted = RepositoryName("mounted")
    await registry.mount_blob(mounted, digest_of(b"bytes"), repo, BY)
    for name in (repo, mounted):
        page = await registry.tags(name, None, 10)
        assert (list(page.items), page.more) == ([], False)
    assert list((await registry.repositories(None, 10)).items) == []


async def test_a_repository_emptied(registry: Registry, repo: RepositoryName) -> None:
    """A repository whose whole content was deleted is not in the list of repositories. Its list of tags is empty."""
    manifest = await push_image(registry, repo, "one", "latest")
    assert list((await registry.repositories(None, 10)).items) == [repo]
    await registry.delete_manifest(repo, manifest.digest, by=BY)
    assert list((await registry.repositories(None, 10)).items) == []
    for part in manifest.blobs:
        await registry.delete_blob(repo, part.digest, by=BY)
    page = await registry.tags(repo, None, 10)
    assert (list(page.items), page.more) == ([], False)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(repo, manifest.layers[0].digest)


async def test_an_untagged_manifest_is_in_the_catalog(registry: Registry, repo: RepositoryName) -> None:
    """A repository with a manifest but no tag is in the list of repositories. Its list of tags is empty."""
    await push_image(registry, repo, "one", "latest")
    await registry.delete_tag(repo, Tag("latest"), by=BY)
    assert list((await registry.repositories(None, 10)).items) == [repo]
    assert await all_tags(registry, repo) == []


async def test_each_repository_has_its_own_tags(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """Each repository lists its own tags."""
    await push_image(registry, repo, "one", "mine")
    await push_image(registry, other, "one", "yours")
    assert await all_tags(registry, repo) == ["mine"]
    assert await all_tags(registry, other) == ["yours"]


# Referrers (spec, "Listing Referrers")


async def push_referrers(registry: Registry, repo: RepositoryName, subject: Digest, count: int) -> list[Digest]:
    """Pushes `count` referrers, every other one of type `sig/x`. Returns their digests in order."""
    digests = []
    for number in range(count):
        fields = {"artifactType": "sig/x" if number % 2 else "sbom/y", "annotations": {"number": str(number)}}
        digests.append((await push_image(registry, repo, f"referrer {number}", subject=subject, **fields)).digest)
    return sorted(digests)


async def test_referrers_are_listed_by_digest(registry: Registry, repo: RepositoryName) -> None:
    """The referrers of a subject are the manifests of the repository with this subject. They are listed in the order of
    their digests."""
    subject = (await push_image(registry, repo, "subject", "latest")).digest
    expected = await push_referrers(registry, repo, subject, 6)
    await push_referrers(registry, RepositoryName("elsewhere"), subject, 2)
    await push_image(registry, repo, "other's", subject=digest_of(b"another subject"))
    page = await registry.referrers(repo, subject, None, None, 1000)
    assert (names_of(page), page.more) == (expected, False)


async def test_a_referrers_descriptor_is_whole(registry: Registry, repo: RepositoryName) -> None:
    """The descriptor of a referrer has its media type, size, artifact type and annotations. If the manifest states no
    artifact type, it is the media type of the config for an image, and absent for an index."""
    subject = digest_of(b"subject")
    config = descriptor_of(b"{}", CONFIG_TYPE)
    await push_blob(registry, repo, b"{}")
    notes = {"org.example.key": "välue", "empty": ""}
    manifests = [
        image_of(config, subject=subject, artifactType="sig/x", annotations=notes),
        image_of(config, subject=subject),
        index_of([], subject=subject),
        index_of([], subject=subject, artifactType="group/z"),
    ]
    for manifest in manifests:
        await registry.put_manifest(repo, manifest, by=BY)
    page = await registry.referrers(repo, subject, None, None, 100)
    listed = {descriptor.digest: descriptor for descriptor in page.items}
    types = [listed[manifest.digest].artifact_type for manifest in manifests]
    assert types == ["sig/x", CONFIG_TYPE, None, "group/z"]
    assert listed[manifests[0].digest].as_json() == {
        "mediaType": OCI_MANIFEST,
        "digest": manifests[0].digest,
        "size": len(manifests[0].body),
        "artifactType": "sig/x",
        "annotations": notes,
    }
    assert [listed[manifest.digest].as_json() for manifest in manifests] == [
        manifest.descriptor.as_json() for manifest in manifests
    ]


async def test_referrers_by_artifact_type(registry: Registry, repo: RepositoryName) -> None:
    """A list filtered by artifact type has only the referrers of this type. For an image that states no artifact type,
    the media type of its config counts."""
    subject = digest_of(b"subject")
    expected = await push_referrers(registry, repo, subject, 5)
    config = descriptor_of(b"{}", CONFIG_TYPE)
    await push_blob(registry, repo, b"{}")
    image_without_type = image_of(config, subject=subject)
    await registry.put_manifest(repo, image_without_type, by=BY)

    async def of_type(artifact_type: str) -> list[Digest]:
        return names_of(await registry.referrers(repo, subject, artifact_type, None, 100))

    signatures, sboms = await of_type("sig/x"), await of_type("sbom/y")
    assert sorted(signatures + sboms) == expected
    assert (len(signatures), len(sboms)) == (2, 3)
    assert await of_type(CONFIG_TYPE) == [image_without_type.digest]
    assert await of_type("nobody/has") == []
    assert await of_type("SIG/X") == []


@pytest.mark.parametrize("limit", [1, 2, 6, 7, 8])
@pytest.mark.parametrize("artifact_type", [None, "sig/x"])
async def test_a_walk_through_the_referrers(
    registry: Registry, repo: RepositoryName, limit: int, artifact_type: str | None
) -> None:
    """Pages of any size together have every referrer once, with and without a filter."""
    subject = digest_of(b"subject", "sha512")
    await push_referrers(registry, repo, subject, 7)

    async def ask(after: str | None) -> Page[str]:
        page = await registry.referrers(repo, subject, artifact_type, after, limit)
        return Page(names_of(page), page.more)

    all_digests = names_of(await registry.referrers(repo, subject, artifact_type, None, 1000))
    assert len(all_digests) == (3 if artifact_type else 7)
    assert await walk(ask, limit) == all_digests == sorted(all_digests)


async def test_a_subject_without_referrers(registry: Registry, repo: RepositoryName) -> None:
    """The list of referrers is empty for a manifest without referrers, and for a digest that is not stored."""
    manifest = await push_image(registry, repo, "one", "latest")
    for subject in (manifest.digest, digest_of(b"not here"), digest_of(b"not here", "sha512")):
        page = await registry.referrers(repo, subject, None, None, 10)
        assert (list(page.items), page.more) == ([], False)


async def test_a_referrer_is_listed_without_its_subject(registry: Registry, repo: RepositoryName) -> None:
    """A referrer is listed before its subject is pushed, while the subject is stored, and after it was deleted."""
    subject = await push_image(registry, RepositoryName("elsewhere"), "subject")
    referrer = await push_image(registry, repo, "signature", subject=subject.digest)
    for step in (None, "push", "delete"):
        if step == "push":
            await push_image(registry, repo, "subject", "latest")
        if step == "delete":
            await registry.delete_manifest(repo, subject.digest, by=BY)
        assert names_of(await registry.referrers(repo, subject.digest, None, None, 10)) == [referrer.digest]


async def test_a_deleted_referrer_is_listed_no_more(registry: Registry, repo: RepositoryName) -> None:
    """A referrer is listed until it is deleted, and again after a second push. The deletion of its tag changes
    nothing."""
    subject = digest_of(b"subject")
    other_referrer = await push_image(registry, repo, "stays", subject=subject)
    deleted = await push_image(registry, repo, "goes", "signature", subject=subject)
    digests = sorted([other_referrer.digest, deleted.digest])
    await registry.delete_tag(repo, Tag("signature"), by=BY)
    assert names_of(await registry.referrers(repo, subject, None, None, 10)) == digests
    await registry.delete_manifest(repo, deleted.digest, by=BY)
    assert names_of(await registry.referrers(repo, subject, None, None, 10)) == [other_referrer.digest]
    await registry.put_manifest(repo, deleted, by=BY)
    assert names_of(await registry.referrers(repo, subject, None, None, 10)) == digests
