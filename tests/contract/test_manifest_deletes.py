"""Contract tests for deletes of manifests and tags: which content they remove, and which content stays."""

from __future__ import annotations

import pytest

from storage.content import Condition, digest_of
from storage.errors import ManifestUnknown, NameUnknown, PreconditionFailed
from storage.interface import Registry
from storage.names import RepositoryName, Tag
from tests.contract.conftest import LATEST, assert_is, assert_unknown
from tests.fakes.registry_content import BY, NOWHERE, all_tags, index_of, push_blob, push_image


async def test_deleting_a_manifest_takes_its_tags(registry: Registry, repo: RepositoryName) -> None:
    """A delete of a manifest immediately removes the manifest and all tags that point at it. Other manifests and their
    tags stay."""
    deleted = await push_image(registry, repo, "gone", "latest", "v1", "v1.2")
    other_manifest = await push_image(registry, repo, "stays", "v2")
    await registry.delete_manifest(repo, deleted.digest, by=BY)
    for reference in (deleted.digest, Tag("latest"), Tag("v1"), Tag("v1.2")):
        await assert_unknown(registry, repo, reference)
    await assert_is(registry, repo, Tag("v2"), other_manifest)
    assert await all_tags(registry, repo) == ["v2"]
    with pytest.raises(ManifestUnknown):
        await registry.delete_manifest(repo, deleted.digest, by=BY)
    with pytest.raises(ManifestUnknown):
        await registry.delete_tag(repo, LATEST, by=BY)


async def test_deleting_a_manifest_in_one_repository(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """The same manifest in another repository stays, with its tags and blobs."""
    manifest = await push_image(registry, repo, "shared", "latest")
    await push_image(registry, other, "shared", "latest")
    await registry.delete_manifest(repo, manifest.digest, by=BY)
    await assert_is(registry, other, LATEST, manifest)
    for part in manifest.blobs:
        await registry.resolve_blob(other, part.digest)


async def test_a_deleted_manifest_can_be_pushed_again(registry: Registry, repo: RepositoryName) -> None:
    """A manifest can be deleted and pushed again repeatedly. Its old tags do not come back."""
    manifest = await push_image(registry, repo, "one", "first")
    for _ in range(3):
        await registry.delete_manifest(repo, manifest.digest, by=BY)
        await assert_unknown(registry, repo, manifest.digest)
        await registry.put_manifest(repo, manifest, [Tag("again")], by=BY)
        assert await all_tags(registry, repo) == ["again"]


async def test_a_child_can_be_deleted(registry: Registry, repo: RepositoryName) -> None:
    """A manifest that an index lists can be deleted. The index stays as it is."""
    child = await push_image(registry, repo, "child")
    index = index_of([child.descriptor])
    await registry.put_manifest(repo, index, [LATEST], by=BY)
    await registry.delete_manifest(repo, child.digest, by=BY)
    await assert_unknown(registry, repo, child.digest)
    await assert_is(registry, repo, LATEST, index)


async def test_deleting_a_tag_takes_only_the_tag(registry: Registry, repo: RepositoryName) -> None:
    """A delete of a tag immediately removes the tag. The manifest and its other tags stay."""
    manifest = await push_image(registry, repo, "one", "latest", "v1")
    await registry.delete_tag(repo, LATEST, by=BY)
    await assert_unknown(registry, repo, LATEST)
    await assert_is(registry, repo, Tag("v1"), manifest)
    with pytest.raises(ManifestUnknown):
        await registry.delete_tag(repo, LATEST, by=BY)
    await registry.delete_tag(repo, Tag("v1"), by=BY)
    await assert_is(registry, repo, manifest.digest, manifest)
    assert await all_tags(registry, repo) == []
    await registry.put_manifest(repo, manifest, [LATEST], by=BY)
    await assert_is(registry, repo, LATEST, manifest)


async def test_deleting_a_tag_that_has_moved(registry: Registry, repo: RepositoryName) -> None:
    """With a condition, a tag is deleted only if the condition holds for it."""
    old = await push_image(registry, repo, "old", "latest")
    new = await push_image(registry, repo, "new", "latest")
    with pytest.raises(PreconditionFailed):
        await registry.delete_tag(repo, LATEST, by=BY, condition=Condition(frozenset({old.digest})))
    await assert_is(registry, repo, LATEST, new)
    await registry.delete_tag(repo, LATEST, by=BY, condition=Condition(frozenset({new.digest})))
    await assert_unknown(registry, repo, LATEST)


async def test_deleting_in_an_unknown_repository(registry: Registry) -> None:
    """Deleting a manifest or a tag of a repository that does not exist raises NameUnknown."""
    with pytest.raises(NameUnknown):
        await registry.delete_manifest(NOWHERE, digest_of(b"x"), by=BY)
    with pytest.raises(NameUnknown):
        await registry.delete_tag(NOWHERE, LATEST, by=BY)
    with pytest.raises(NameUnknown):
        await registry.tags(NOWHERE, None, 10)


async def test_deleting_unknown_content_of_a_known_repository(registry: Registry, repo: RepositoryName) -> None:
    """Deleting an unknown manifest or tag of a repository that has content raises ManifestUnknown."""
    await push_blob(registry, repo, b"content")
    with pytest.raises(ManifestUnknown):
        await registry.delete_manifest(repo, digest_of(b"x"), by=BY)
    with pytest.raises(ManifestUnknown):
        await registry.delete_tag(repo, LATEST, by=BY)
