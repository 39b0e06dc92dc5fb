"""Contract tests for pushes of manifests. A manifest is kept byte by byte, is found by tag and by digest, and is
refused if content to which it refers is missing. A "put" is a call of `put_manifest`."""

from __future__ import annotations

import asyncio
import json

import pytest

from storage.content import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_ARTIFACT,
    OCI_INDEX,
    OCI_MANIFEST,
    Condition,
    Descriptor,
    Manifest,
    digest_of,
)
from storage.errors import ManifestBlobUnknown, ManifestUnknown, NameUnknown, PreconditionFailed
from storage.interface import Registry
from storage.names import RepositoryName, Tag
from tests.contract.conftest import LATEST, assert_is, assert_unknown
from tests.fakes.registry_content import (
    BY,
    CONFIG_TYPE,
    NOWHERE,
    all_tags,
    descriptor_of,
    image_of,
    index_of,
    manifest_from,
    push_blob,
    push_image,
)

FOREIGN = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"


def named_in(detail: object) -> str:
    """Returns the text of an error's detail, in which the test looks for digests."""
    return json.dumps(detail)


async def test_a_manifest_is_found_by_tag_and_digest(registry: Registry, repo: RepositoryName) -> None:
    """A tagged manifest is found under its tag and its digest."""
    manifest = await push_image(registry, repo, "one", "latest")
    await assert_is(registry, repo, LATEST, manifest)
    await assert_is(registry, repo, manifest.digest, manifest)


async def test_a_put_returns_the_descriptor(registry: Registry, repo: RepositoryName) -> None:
    """A put returns the descriptor of the manifest."""
    manifest = image_of(await push_blob(registry, repo, b"{}"))
    put = await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    assert (put.digest, put.media_type, put.size) == (manifest.digest, OCI_MANIFEST, len(manifest.body))


async def test_a_manifest_without_a_tag(registry: Registry, repo: RepositoryName) -> None:
    """A manifest that was pushed without a tag is found by digest. The push creates no tag."""
    manifest = await push_image(registry, repo, "one")
    await assert_is(registry, repo, manifest.digest, manifest)
    await assert_unknown(registry, repo, LATEST)
    assert await all_tags(registry, repo) == []


async def test_many_tags_in_one_put(registry: Registry, repo: RepositoryName) -> None:
    """One put can set many tags. A put may name the same tag twice."""
    manifest = image_of(await push_blob(registry, repo, b"{}"))
    names = [f"v{number:02}" for number in range(30)]
    await registry.put_manifest(repo, manifest, [Tag(name) for name in (*names, "v00")], by=BY)
    for name in names:
        await assert_is(registry, repo, Tag(name), manifest)
    assert await all_tags(registry, repo) == names


@pytest.mark.parametrize(
    "text",
    [
        '{"schemaVersion":2,"mediaType":"%(type)s","config":%(config)s,"layers":[]}',
        '\n\t {  "layers" :[],\r\n"config":%(config)s,   "schemaVersion"\n:2}  \n\n',
        '{"schemaVersion":2,"config":%(config)s,"layers":[],"unknown":{"deep":[1,2.50,1e3,null,true]},"":""}',
        '{"schemaVersion":2,"config":%(config)s,"layers":[],"annotations":{"k":"\\u00e9\\ud83d\\ude00 é 😀 \\/"}}',
        '{"schemaVersion":2,"config":%(config)s}',
    ],
)
async def test_the_bytes_are_kept_exactly(registry: Registry, repo: RepositoryName, text: str) -> None:
    """White space, order, escapes and unknown fields are returned as they were sent."""
    config = await push_blob(registry, repo, b"{}")
    body = (text % {"type": OCI_MANIFEST, "config": json.dumps(config.as_json())}).encode()
    manifest = Manifest.parse(body, OCI_MANIFEST)
    await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    assert (await registry.get_manifest(repo, LATEST)).body == body
    assert (await registry.get_manifest(repo, digest_of(body))).body == body


async def test_a_manifest_of_four_mebibytes(registry: Registry, repo: RepositoryName) -> None:
    """The registry accepts a manifest of 4 MiB, as the spec recommends."""
    config = await push_blob(registry, repo, b"{}")
    manifest = image_of(config, annotations={"padding": "x" * (4 << 20)})
    await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    await assert_is(registry, repo, LATEST, manifest)


@pytest.mark.parametrize("media_type", [OCI_MANIFEST, DOCKER_MANIFEST])
async def test_image_manifests_of_both_families(registry: Registry, repo: RepositoryName, media_type: str) -> None:
    """An image manifest of OCI or of Docker is returned with its own media type."""
    config, layer = await push_blob(registry, repo, b"{}"), await push_blob(registry, repo, b"layer")
    manifest = image_of(config, [layer], media_type=media_type)
    await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    await assert_is(registry, repo, LATEST, manifest)


@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
async def test_indexes_of_both_families(registry: Registry, repo: RepositoryName, media_type: str) -> None:
    """An OCI index or a Docker manifest list is returned with its own media type, also if it is empty."""
    children = [(await push_image(registry, repo, seed)).descriptor for seed in ("amd64", "arm64")]
    for name, parts in (("full", children), ("empty", [])):
        manifest = index_of(parts, media_type=media_type)
        await registry.put_manifest(repo, manifest, [Tag(name)], by=BY)
        await assert_is(registry, repo, Tag(name), manifest)


async def test_an_artifact_manifest(registry: Registry, repo: RepositoryName) -> None:
    """The artifact manifest of the release candidates of OCI 1.1 is accepted if its blobs are stored."""
    blob = descriptor_of(b"sbom")
    manifest = manifest_from(
        {"mediaType": OCI_ARTIFACT, "artifactType": "a/b", "blobs": [blob.as_json()]}, OCI_ARTIFACT
    )
    with pytest.raises(ManifestBlobUnknown):
        await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    await push_blob(registry, repo, b"sbom")
    await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    await assert_is(registry, repo, LATEST, manifest)


async def test_an_index_of_indexes(registry: Registry, repo: RepositoryName) -> None:
    """An index may list another index. The manifests that an index lists directly must be stored in the repository."""
    image = await push_image(registry, repo, "one")
    inner = index_of([image.descriptor])
    outer = index_of([inner.descriptor, image.descriptor])
    with pytest.raises(ManifestBlobUnknown) as refused:
        await registry.put_manifest(repo, outer, [LATEST], by=BY)
    assert inner.digest in named_in(refused.value.detail)
    assert image.digest not in named_in(refused.value.detail)
    await registry.put_manifest(repo, inner, by=BY)
    await registry.put_manifest(repo, outer, [LATEST], by=BY)
    await assert_is(registry, repo, LATEST, outer)
    await assert_is(registry, repo, inner.digest, inner)


async def test_an_index_that_lists_blobs(registry: Registry, repo: RepositoryName) -> None:
    """An index may list blobs of the repository: an entry whose media type is not that of a manifest is looked up as a
    blob. BuildKit's cache index has such entries."""
    layer = await push_blob(registry, repo, b"cached layer")
    config = Descriptor("application/vnd.buildkit.cacheconfig.v0", descriptor_of(b"{}").digest, 2)
    manifest = index_of([layer, config])
    with pytest.raises(ManifestBlobUnknown) as refused:
        await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    assert config.digest in named_in(refused.value.detail)
    assert layer.digest not in named_in(refused.value.detail)
    await push_blob(registry, repo, b"{}")
    await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    await assert_is(registry, repo, LATEST, manifest)


async def test_a_child_manifest_pushed_as_a_blob_does_not_count(registry: Registry, repo: RepositoryName) -> None:
    """If the bytes of a manifest are stored only as a blob, an index that lists the manifest is refused: clients could
    not pull the manifest."""
    child = image_of(await push_blob(registry, repo, b"{}"))
    await push_blob(registry, repo, child.body)
    with pytest.raises(ManifestBlobUnknown):
        await registry.put_manifest(repo, index_of([child.descriptor]), by=BY)


async def test_a_layer_pushed_as_a_manifest_does_not_count(registry: Registry, repo: RepositoryName) -> None:
    """If the bytes of a blob are stored only as a manifest, a manifest that refers to the blob is refused: clients
    could not pull the blob."""
    inner = image_of(await push_blob(registry, repo, b"{}"))
    await registry.put_manifest(repo, inner, by=BY)
    with pytest.raises(ManifestBlobUnknown):
        await registry.put_manifest(repo, image_of(descriptor_of(b"{}"), [descriptor_of(inner.body)]), by=BY)


async def test_missing_blobs_are_named(registry: Registry, repo: RepositoryName) -> None:
    """A manifest with missing blobs is refused and not stored. The detail of the error names every missing blob."""
    stored_blob = await push_blob(registry, repo, b"there")
    missing = [descriptor_of(b"config"), descriptor_of(b"layer 1"), descriptor_of(b"layer 2", algorithm="sha512")]
    manifest = image_of(missing[0], [stored_blob, *missing[1:]])
    with pytest.raises(ManifestBlobUnknown) as refused:
        await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    assert all(part.digest in named_in(refused.value.detail) for part in missing)
    assert stored_blob.digest not in named_in(refused.value.detail)
    await assert_unknown(registry, repo, manifest.digest)
    await assert_unknown(registry, repo, LATEST)
    assert await all_tags(registry, repo) == []


async def test_a_refused_put_leaves_tags_and_repository_alone(registry: Registry, repo: RepositoryName) -> None:
    """A refused put moves no tag and creates no repository."""
    earlier_manifest = await push_image(registry, repo, "one", "latest")
    refused = image_of(descriptor_of(b"missing"))
    for name in (repo, NOWHERE):
        with pytest.raises(ManifestBlobUnknown):
            await registry.put_manifest(name, refused, [LATEST, Tag("new")], by=BY)
    await assert_is(registry, repo, LATEST, earlier_manifest)
    assert await all_tags(registry, repo) == ["latest"]
    with pytest.raises(NameUnknown):
        await registry.tags(NOWHERE, None, 10)


async def test_another_repositorys_content_is_missing_here(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """A put is refused if the blobs or the listed manifests are stored only in another repository."""
    image = await push_image(registry, repo, "one", "latest")
    with pytest.raises(ManifestBlobUnknown):
        await registry.put_manifest(other, image, [LATEST], by=BY)
    with pytest.raises(ManifestBlobUnknown):
        await registry.put_manifest(other, index_of([image.descriptor]), [LATEST], by=BY)
    for part in image.blobs:
        await registry.mount_blob(other, part.digest, repo, BY)
    await registry.put_manifest(other, image, [LATEST], by=BY)
    await registry.put_manifest(other, index_of([image.descriptor]), [Tag("index")], by=BY)
    await assert_is(registry, other, LATEST, image)


async def test_manifests_of_another_repository_are_unknown(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """A manifest is found only in the repository to which it was pushed, by tag and by digest."""
    image = await push_image(registry, repo, "one", "latest")
    await push_image(registry, other, "two", "other")
    for name in (other, NOWHERE):
        await assert_unknown(registry, name, LATEST)
        await assert_unknown(registry, name, image.digest)


async def test_a_blob_is_no_manifest(registry: Registry, repo: RepositoryName) -> None:
    """The digest of a blob cannot be resolved as a manifest, even if the blob has the bytes of a manifest."""
    body = image_of(descriptor_of(b"{}")).body
    await push_blob(registry, repo, body)
    await assert_unknown(registry, repo, digest_of(body))
    with pytest.raises(ManifestUnknown):
        await registry.delete_manifest(repo, digest_of(body), by=BY)


async def test_a_sparse_manifest_needs_no_stored_content(registry: Registry, repo: RepositoryName) -> None:
    """A sparse put accepts a manifest whose blobs and children are not stored."""
    image = image_of(descriptor_of(b"config", CONFIG_TYPE), [descriptor_of(b"layer")])
    await registry.put_manifest(repo, image, [LATEST], by=BY, sparse=True)
    index = index_of([image_of(descriptor_of(b"never")).descriptor])
    await registry.put_manifest(repo, index, [Tag("index")], by=BY, sparse=True)
    await assert_is(registry, repo, LATEST, image)
    await assert_is(registry, repo, Tag("index"), index)


@pytest.mark.parametrize("media_type", [FOREIGN, NONDISTRIBUTABLE])
async def test_foreign_layers_may_be_missing(registry: Registry, repo: RepositoryName, media_type: str) -> None:
    """A manifest is accepted even if its foreign layers (layers that the registry need not have, because their license
    forbids their distribution) are not stored. The config and all other layers must be stored."""
    foreign = descriptor_of(b"windows", media_type)
    with pytest.raises(ManifestBlobUnknown) as refused:
        await registry.put_manifest(repo, image_of(descriptor_of(b"config"), [foreign]), [LATEST], by=BY)
    assert foreign.digest not in named_in(refused.value.detail)
    manifest = image_of(await push_blob(registry, repo, b"{}"), [foreign])
    await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    await assert_is(registry, repo, LATEST, manifest)


async def test_an_unknown_subject_is_accepted(registry: Registry, repo: RepositoryName) -> None:
    """A manifest or an index with a subject that is not stored is accepted (the spec says MUST)."""
    nowhere = digest_of(b"no such subject")
    image = await push_image(registry, repo, "signature", "latest", subject=nowhere)
    index = index_of([], subject=nowhere)
    await registry.put_manifest(repo, index, [Tag("index")], by=BY)
    await assert_is(registry, repo, LATEST, image)
    await assert_is(registry, repo, Tag("index"), index)


async def test_a_manifest_pushed_twice(registry: Registry, repo: RepositoryName) -> None:
    """A second put of the same manifest succeeds. If the second put has another tag, this tag is added, and the old tag
    stays."""
    manifest = await push_image(registry, repo, "one", "latest")
    await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    await registry.put_manifest(repo, manifest, [Tag("second")], by=BY)
    await registry.put_manifest(repo, manifest, by=BY)
    assert await all_tags(registry, repo) == ["latest", "second"]
    await assert_is(registry, repo, manifest.digest, manifest)


async def test_a_tag_moves(registry: Registry, repo: RepositoryName) -> None:
    """A put with an existing tag moves the tag to the new manifest. The older manifest is still found by digest and by
    its other tag."""
    older = await push_image(registry, repo, "older", "latest", "v1")
    newer = await push_image(registry, repo, "newer", "latest")
    await assert_is(registry, repo, LATEST, newer)
    await assert_is(registry, repo, Tag("v1"), older)
    await assert_is(registry, repo, older.digest, older)
    await registry.put_manifest(repo, older, [LATEST], by=BY)
    await assert_is(registry, repo, LATEST, older)


async def test_tags_are_case_sensitive(registry: Registry, repo: RepositoryName) -> None:
    """`Latest` and `latest` are two tags."""
    lower = await push_image(registry, repo, "lower", "latest")
    upper = await push_image(registry, repo, "upper", "Latest")
    await assert_is(registry, repo, Tag("latest"), lower)
    await assert_is(registry, repo, Tag("Latest"), upper)


async def test_a_sha512_manifest(registry: Registry, repo: RepositoryName) -> None:
    """A manifest that was pushed with a sha512 digest is found by this digest and by its tag, but not by its sha256
    digest."""
    config = descriptor_of(b"{}", CONFIG_TYPE, "sha512")
    await push_blob(registry, repo, b"{}", "sha512")
    manifest = image_of(config, algorithm="sha512")
    assert manifest.digest.algorithm == "sha512"
    await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    await assert_is(registry, repo, LATEST, manifest)
    await assert_is(registry, repo, manifest.digest, manifest)
    await assert_unknown(registry, repo, digest_of(manifest.body))


async def test_one_body_under_two_algorithms_is_two_manifests(registry: Registry, repo: RepositoryName) -> None:
    """The same bytes pushed with a sha256 and with a sha512 digest are two manifests. When one of them is deleted, the
    other one and its tags stay."""
    config = await push_blob(registry, repo, b"{}")
    short, long = (image_of(config, algorithm=algorithm) for algorithm in ("sha256", "sha512"))
    assert short.body == long.body
    await registry.put_manifest(repo, short, [Tag("short")], by=BY)
    await registry.put_manifest(repo, long, [Tag("long")], by=BY)
    await registry.delete_manifest(repo, short.digest, by=BY)
    await assert_unknown(registry, repo, Tag("short"))
    await assert_is(registry, repo, Tag("long"), long)
    await assert_is(registry, repo, long.digest, long)


async def test_nested_names_are_repositories_of_their_own(registry: Registry) -> None:
    """Repositories with nested names, and with names that look like paths of the API, have separate tags."""
    names = ["a", "a/b", "a/b/c", "a/tags", "a/manifests", "a/blobs/uploads", "a-b", "a.b", "a_b", "a__b", "n" * 255]
    pushed = {name: await push_image(registry, RepositoryName(name), name, "latest") for name in names}
    for name, manifest in pushed.items():
        await assert_is(registry, RepositoryName(name), LATEST, manifest)
        assert await all_tags(registry, RepositoryName(name)) == ["latest"]


# Conditions (RFC 9110, section 13.1)


@pytest.mark.parametrize(
    "case", ["If-None-Match: *, no tag", "If-Match, one digest matches", "If-None-Match, no digest matches"]
)
async def test_a_condition_that_holds(registry: Registry, repo: RepositoryName, case: str) -> None:
    """A put succeeds if the tag meets the condition. The cases name the request header that sets the condition, and the
    state of the tag before the put."""
    old = await push_image(registry, repo, "old", "old")
    manifest = await push_image(registry, repo, "new")
    tag, condition = {
        "If-None-Match: *, no tag": (Tag("fresh"), Condition(negated=True)),
        "If-Match, one digest matches": (Tag("old"), Condition(frozenset({digest_of(b"other"), old.digest}))),
        "If-None-Match, no digest matches": (
            Tag("old"),
            Condition(frozenset({digest_of(b"other")}), negated=True),
        ),
    }[case]
    await registry.put_manifest(repo, manifest, [tag], by=BY, condition=condition)
    await assert_is(registry, repo, tag, manifest)


async def test_if_match_anything(registry: Registry, repo: RepositoryName) -> None:
    """The condition of `If-Match: *` requires only that the tag exists, whatever its manifest is."""
    manifest = await push_image(registry, repo, "old", "latest")
    await registry.put_manifest(repo, manifest, [LATEST], by=BY, condition=Condition())
    with pytest.raises(PreconditionFailed):
        await registry.put_manifest(repo, manifest, [Tag("fresh")], by=BY, condition=Condition())


@pytest.mark.parametrize(
    "case",
    [
        "If-None-Match: *, tag exists",
        "If-Match, no digest matches",
        "If-Match, no tag",
        "If-None-Match, the digest matches",
        "If-Match: *, unknown repository",
    ],
)
async def test_a_condition_that_does_not_hold(registry: Registry, repo: RepositoryName, case: str) -> None:
    """A put whose tag does not meet the condition is refused. It stores no manifest, sets no tag, and creates no
    repository."""
    old = await push_image(registry, repo, "old", "old")
    manifest = index_of([], annotations={"made": "now"})
    name, tag, condition = {
        "If-None-Match: *, tag exists": (repo, "old", Condition(negated=True)),
        "If-Match, no digest matches": (repo, "old", Condition(frozenset({digest_of(b"other")}))),
        "If-Match, no tag": (repo, "fresh", Condition(frozenset({old.digest}))),
        "If-None-Match, the digest matches": (repo, "old", Condition(frozenset({old.digest}), negated=True)),
        "If-Match: *, unknown repository": (NOWHERE, "old", Condition()),
    }[case]
    with pytest.raises(PreconditionFailed):
        await registry.put_manifest(name, manifest, [Tag(tag), Tag("more")], by=BY, condition=condition)
    await assert_is(registry, repo, Tag("old"), old)
    assert await all_tags(registry, repo) == ["old"]
    await assert_unknown(registry, name, manifest.digest)
    with pytest.raises(NameUnknown):
        await registry.tags(NOWHERE, None, 10)


async def test_a_condition_is_for_the_first_tag(registry: Registry, repo: RepositoryName) -> None:
    """If a put sets several tags, only the first tag has to meet the condition. The put then sets all tags, or is
    refused and sets none."""
    await push_image(registry, repo, "old", "there")
    manifest = await push_image(registry, repo, "new")
    absent = Condition(negated=True)
    await registry.put_manifest(repo, manifest, [Tag("fresh"), Tag("there")], by=BY, condition=absent)
    await assert_is(registry, repo, Tag("there"), manifest)
    with pytest.raises(PreconditionFailed):
        await registry.put_manifest(repo, manifest, [Tag("there"), Tag("fresher")], by=BY, condition=absent)
    assert await all_tags(registry, repo) == ["fresh", "there"]


async def test_one_of_concurrent_puts_creates_the_tag(registry: Registry, repo: RepositoryName) -> None:
    """Of concurrent puts that require an absent tag, one succeeds. The tag then points at the manifest of this put."""
    manifests = [await push_image(registry, repo, f"candidate {number}") for number in range(6)]
    answers = await asyncio.gather(
        *(
            registry.put_manifest(repo, manifest, [LATEST], by=BY, condition=Condition(negated=True))
            for manifest in manifests
        ),
        return_exceptions=True,
    )
    won = [answer for answer in answers if isinstance(answer, Descriptor)]
    assert len(won) == 1
    assert sum(isinstance(answer, PreconditionFailed) for answer in answers) == len(manifests) - 1
    assert (await registry.resolve_manifest(repo, LATEST)).digest == won[0].digest
