"""Contract tests for immutable tags: no push and no delete may change the manifest at which such a tag points."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from registry.naming import NamingRules
from registry.router import Router
from storage.composition import open_registry, prepare_data_dir
from storage.content import DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST, Condition, Manifest
from storage.errors import Denied, ManifestUnknown, PreconditionFailed
from storage.interface import Registry
from storage.memory_registry import MemoryRegistry
from storage.names import RepositoryName, Tag
from storage.patterns import NamePattern
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from tests.contract.conftest import InTurns
from tests.fakes.registry_content import BY, all_tags, index_of, manifest_from, push_blob, push_image

RULES = ImmutableTags(
    [
        TagRule((NamePattern("team/**"),), (TagPattern("v*"), TagPattern("release-[0-9]"))),
        TagRule((NamePattern("**"),), (TagPattern("always"),)),
    ],
    mirrored=["docker.io"],
)
V1, LATEST = Tag("v1"), Tag("latest")


@pytest.fixture(params=["memory", "stored", pytest.param("stored, opened twice", marks=pytest.mark.slow)])
async def registry(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Registry]:
    """Yields a registry with the rules `RULES`. "stored, opened twice": one data directory is opened by two registries,
    and the calls alternate between them."""
    if request.param == "memory":
        yield MemoryRegistry(immutable_tags=RULES)
        return
    prepare_data_dir(tmp_path)
    async with (
        open_registry(tmp_path, immutable_tags=RULES) as first,
        open_registry(tmp_path, immutable_tags=RULES) as second,
    ):
        yield first if request.param == "stored" else InTurns(first, second)


async def test_other_content_is_denied(registry: Registry, repo: RepositoryName) -> None:
    """A push is denied if one of its tags is immutable and points at another manifest. The push then moves none of its
    tags, even those that are not immutable. The error names the manifest at which the immutable tag points."""
    first = await push_image(registry, repo, "first", "v1", "latest")
    with pytest.raises(Denied) as denied:
        await push_image(registry, repo, "second", "latest", "v1")
    assert denied.value.message == f"team/app:v1 is immutable and points at {first.digest}; push another tag"
    for tag in (V1, LATEST):
        assert (await registry.resolve_manifest(repo, tag)).digest == first.digest


async def test_the_same_content_can_be_pushed_again(registry: Registry, repo: RepositoryName) -> None:
    """A push of the same manifest to an immutable tag succeeds, so that a client can repeat an interrupted push."""
    first = await push_image(registry, repo, "first", "v1")
    second = await push_image(registry, repo, "first", "v1", "v1.0")
    assert first.digest == second.digest
    assert await all_tags(registry, repo) == ["v1", "v1.0"]


async def test_a_condition_is_checked_first(registry: Registry, repo: RepositoryName) -> None:
    """A push that requires an absent tag fails with PreconditionFailed, not with Denied, if the tag exists."""
    await push_image(registry, repo, "first", "v1")
    second = await push_image(registry, repo, "second")
    with pytest.raises(PreconditionFailed):
        await registry.put_manifest(repo, second, [V1], by=BY, condition=Condition(negated=True))


async def test_an_immutable_tag_cannot_be_deleted(registry: Registry, repo: RepositoryName) -> None:
    """An immutable tag and the manifest at which the tag points cannot be deleted. If this manifest is an index, the
    manifests that the index lists, also those of nested indexes, cannot be deleted either. Other tags and manifests can
    be deleted."""
    child = await push_image(registry, repo, "child")
    inner = index_of([child.descriptor])
    await registry.put_manifest(repo, inner, by=BY)
    outer = index_of([inner.descriptor])
    await registry.put_manifest(repo, outer, [V1, LATEST], by=BY)
    other = await push_image(registry, repo, "other", "other")
    with pytest.raises(Denied, match="team/app:v1 is immutable and cannot be deleted"):
        await registry.delete_tag(repo, V1, by=BY)
    for needed in (outer, inner, child):
        with pytest.raises(Denied, match=f"team/app:v1 is immutable and needs {needed.digest}"):
            await registry.delete_manifest(repo, needed.digest, by=BY)
    await registry.delete_tag(repo, LATEST, by=BY)
    await registry.delete_manifest(repo, other.digest, by=BY)
    assert await all_tags(registry, repo) == ["v1"]


async def test_deleting_a_missing_immutable_tag(registry: Registry, repo: RepositoryName) -> None:
    """Deleting a missing tag raises ManifestUnknown, also if a rule would make the tag immutable. So does deleting a
    missing manifest."""
    image = await push_image(registry, repo, "first", "latest")
    with pytest.raises(ManifestUnknown):
        await registry.delete_tag(repo, V1, by=BY)
    await registry.delete_manifest(repo, image.digest, by=BY)
    with pytest.raises(ManifestUnknown):
        await registry.delete_manifest(repo, image.digest, by=BY)


async def push_untyped_image(registry: Registry, repo: RepositoryName, *tags: str) -> Manifest:
    """Pushes an image manifest whose body does not say its media type, as an OCI manifest."""
    config = await push_blob(registry, repo, b"{}")
    image = manifest_from({"schemaVersion": 2, "config": config.as_json(), "layers": []})
    await registry.put_manifest(repo, image, [Tag(tag) for tag in tags], by=BY)
    return image


async def test_the_media_type_of_an_immutable_tag_stays(registry: Registry, repo: RepositoryName) -> None:
    """A push of the same bytes with another media type is denied if an immutable tag points at the manifest, or at an
    index that lists it. It makes no difference whether the push has tags. A push with the same media type succeeds."""
    image = await push_untyped_image(registry, repo)
    index = manifest_from({"schemaVersion": 2, "manifests": [image.descriptor.as_json()]}, OCI_INDEX)
    await registry.put_manifest(repo, index, [V1, LATEST], by=BY)
    for stored, other_type in ((image, DOCKER_MANIFEST), (index, DOCKER_LIST)):
        other = Manifest.parse(stored.body, other_type)
        assert other.digest == stored.digest
        for tags in ([], [LATEST], [Tag("new")]):
            with pytest.raises(Denied) as denied:
                await registry.put_manifest(repo, other, tags, by=BY)
            assert denied.value.message == (
                f"team/app:v1 is immutable and needs {stored.digest} with media type {stored.media_type}; "
                "push the manifest with this Content-Type"
            )
        await registry.put_manifest(repo, stored, by=BY)
        with pytest.raises(Denied):
            await registry.put_manifest(repo, other, [V1], by=BY)
        assert (await registry.resolve_manifest(repo, stored.digest)).media_type == stored.media_type
    assert await all_tags(registry, repo) == ["latest", "v1"]


async def test_the_media_type_of_other_manifests_changes(registry: Registry, repo: RepositoryName) -> None:
    """If no immutable tag needs a manifest, a push of the same bytes with another media type changes its media type,
    also if the same push sets an immutable tag."""
    image = await push_untyped_image(registry, repo, "latest")
    for media_type, tags in ((DOCKER_MANIFEST, []), (OCI_MANIFEST, [V1])):
        await registry.put_manifest(repo, Manifest.parse(image.body, media_type), tags, by=BY)
        assert (await registry.resolve_manifest(repo, LATEST)).media_type == media_type


async def test_the_media_type_of_a_mirrored_manifest_follows_the_upstream(registry: Registry) -> None:
    """A mirror can store a manifest with another media type, whatever the rules say about its tags."""
    repo = RepositoryName("docker.io/library/app")
    image = await push_untyped_image(registry, repo, "always")
    changed = Manifest.parse(image.body, DOCKER_MANIFEST)
    await registry.put_manifest(repo, changed, by=BY, sparse=True)
    assert (await registry.resolve_manifest(repo, Tag("always"))).media_type == DOCKER_MANIFEST


@pytest.mark.parametrize(
    ("name", "tag"), [("team/app", "latest"), ("team/app", "release-10"), ("other", "v1"), ("docker.io/x/y", "always")]
)
async def test_other_tags_move(registry: Registry, name: str, tag: str) -> None:
    """Tags that no rule matches can move and be deleted. A rule matches only if its patterns match the whole repository
    name and the whole tag. Rules do not apply to mirrored repositories, because their tags follow the upstream."""
    repo = RepositoryName(name)
    await push_image(registry, repo, "first", tag)
    second = await push_image(registry, repo, "second", tag)
    assert (await registry.resolve_manifest(repo, Tag(tag))).digest == second.digest
    await registry.delete_manifest(repo, second.digest, by=BY)
    assert await all_tags(registry, repo) == []


async def test_one_of_two_pushes_wins(registry: Registry, repo: RepositoryName) -> None:
    """Of concurrent pushes of different manifests to a new immutable tag, one succeeds, and all others are denied."""
    images = [await push_image(registry, repo, str(number)) for number in range(20)]
    outcomes = await asyncio.gather(
        *(registry.put_manifest(repo, image, [V1], by=BY) for image in images), return_exceptions=True
    )
    stored = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
    assert len(stored) == 1
    assert all(isinstance(outcome, Denied) for outcome in outcomes if outcome not in stored)
    assert (await registry.resolve_manifest(repo, V1)).digest == stored[0].digest


async def test_a_router_passes_the_error_on(registry: Registry, repo: RepositoryName) -> None:
    """A router raises the same error as the registry to which it sends the push."""

    async def is_used(_: RepositoryName) -> bool:
        return True

    router = Router(registry, {}, is_used, NamingRules())
    await push_image(router, repo, "first", "v1")
    with pytest.raises(Denied, match="push another tag"):
        await push_image(router, repo, "second", "v1")
