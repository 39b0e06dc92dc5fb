"""The inventory counts the stored content, and plans a removal: which tags and manifests it deletes, and how many bytes
it frees."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.composition import open_inventory, open_registry, prepare_data_dir
from storage.content import OCI_INDEX, OCI_MANIFEST, Actor, Descriptor, Manifest, digest_of
from storage.errors import ManifestUnknown, NameUnknown
from storage.interface import Registry
from storage.inventory import ContentTotals, Inventory
from storage.names import Digest, RepositoryName, Tag

UBUNTU = RepositoryName("docker.io/library/ubuntu")
DEBIAN = RepositoryName("docker.io/library/debian")
KIND = "application/octet-stream"


@pytest.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path) as opened:
        yield opened


@pytest.fixture
def inventory(registry: Registry, tmp_path: Path) -> Iterator[Inventory]:
    with open_inventory(tmp_path) as opened:
        yield opened


async def push_blob(registry: Registry, repo: RepositoryName, data: bytes) -> dict[str, object]:
    writer = await registry.start_upload(repo)
    await writer.write(data)
    await writer.commit(digest_of(data))
    return Descriptor(KIND, digest_of(data), len(data)).as_json()


async def put_manifest(registry: Registry, repo: RepositoryName, kind: str, *tags: str, **document: Any) -> Manifest:
    body = json.dumps({"schemaVersion": 2, "mediaType": kind, **document}).encode()
    manifest = Manifest.parse(body, kind)
    await registry.put_manifest(repo, manifest, [Tag(tag) for tag in tags], by=Actor(), sparse=True)
    return manifest


async def push_image(registry: Registry, repo: RepositoryName, *tags: str, size: int, shared: bytes = b"") -> Manifest:
    """Pushes an image with a layer of `size` bytes, which no other image has, and the layer `shared` if it is not
    empty."""
    config = await push_blob(registry, repo, b"{}")
    layers = [await push_blob(registry, repo, bytes([size % 256]) * size)]
    if shared:
        layers.append(await push_blob(registry, repo, shared))
    return await put_manifest(registry, repo, OCI_MANIFEST, *tags, config=config, layers=layers)


async def push_index(registry: Registry, repo: RepositoryName, *children: Manifest, tag: str) -> Manifest:
    return await put_manifest(
        registry, repo, OCI_INDEX, tag, manifests=[child.descriptor.as_json() for child in children]
    )


def test_an_upstream_without_cached_content(inventory: Inventory) -> None:
    """All counts of an upstream without cached content are zero."""
    assert inventory.totals_below("docker.io") == ContentTotals(0, 0, 0, 0, 0)


async def test_counts_below_a_name(registry: Registry, inventory: Inventory) -> None:
    """Only repositories below the name count, not others whose names begin with the same text. A blob in two
    repositories counts once."""
    await push_image(registry, UBUNTU, "1", "2", size=100, shared=b"shared")
    await push_image(registry, DEBIAN, "1", size=50, shared=b"shared")
    for other in ("docker.io", "docker.io0/a", "docker.ioo/a", "docker-io/a", "team/app"):
        await push_image(registry, RepositoryName(other), "1", size=30)
    assert inventory.totals_below("docker.io") == ContentTotals(2, 2, 3, 4, 100 + 50 + len(b"shared") + len(b"{}"))
    assert inventory.tags_below("docker.io") == [(DEBIAN, "1"), (UBUNTU, "1"), (UBUNTU, "2")]


async def test_removal_of_the_last_tag_of_a_manifest(registry: Registry, inventory: Inventory) -> None:
    """If the last tag of a manifest is removed, the manifest is deleted. Blobs that only this manifest has are
    freed."""
    old = await push_image(registry, UBUNTU, "old", size=100, shared=b"shared")
    await push_image(registry, UBUNTU, "new", size=50, shared=b"shared")
    plan = inventory.plan_removal(UBUNTU, Tag("old"))
    assert (plan.tags, plan.manifests, plan.freed_bytes) == (("old",), (old.digest,), 100)


async def test_removal_of_one_of_two_tags(registry: Registry, inventory: Inventory) -> None:
    """If the tag's manifest has another tag, only the tag is removed."""
    await push_image(registry, UBUNTU, "1", "2", size=100)
    plan = inventory.plan_removal(UBUNTU, Tag("1"))
    assert (plan.tags, plan.manifests, plan.freed_bytes) == (("1",), (), 0)


async def test_removal_of_the_tag_of_an_index_entry(registry: Registry, inventory: Inventory) -> None:
    """If an index lists the tag's manifest, only the tag is removed."""
    child = await push_image(registry, UBUNTU, "amd64", size=100)
    await push_index(registry, UBUNTU, child, tag="1")
    assert inventory.plan_removal(UBUNTU, Tag("amd64")).manifests == ()


async def test_removal_of_an_index(registry: Registry, inventory: Inventory) -> None:
    """If an index is removed, the manifests that it lists are deleted as well, unless they have a tag or another index
    lists them."""
    own = await push_image(registry, UBUNTU, size=100)
    tagged = await push_image(registry, UBUNTU, "arm64", size=50)
    shared = await push_image(registry, UBUNTU, size=30)
    first = await push_index(registry, UBUNTU, own, tagged, shared, tag="1")
    await push_index(registry, UBUNTU, shared, tag="2")
    plan = inventory.plan_removal(UBUNTU, Tag("1"))
    assert set(plan.manifests) == {first.digest, own.digest}
    assert plan.freed_bytes == 100


async def test_removal_of_the_subject_of_a_referrer(registry: Registry, inventory: Inventory) -> None:
    """If a manifest is removed, a signature that refers to it and has no tag is deleted as well."""
    subject = await push_image(registry, UBUNTU, "1", size=100)
    subject_descriptor = {key: subject.descriptor.as_json()[key] for key in ("mediaType", "digest", "size")}
    signature = await put_manifest(
        registry,
        UBUNTU,
        OCI_MANIFEST,
        subject=subject_descriptor,
        config=await push_blob(registry, UBUNTU, b"sig"),
        layers=[],
    )
    assert inventory.plan_removal(UBUNTU, Tag("1")).manifests == (subject.digest, signature.digest)


async def test_removal_by_digest(registry: Registry, inventory: Inventory) -> None:
    """If a manifest is removed by its digest, all tags that point at it are deleted."""
    manifest = await push_image(registry, UBUNTU, "1", "2", size=100)
    plan = inventory.plan_removal(UBUNTU, manifest.digest)
    assert (plan.tags, plan.manifests) == (("1", "2"), (manifest.digest,))
    assert plan.freed_bytes == 100 + len(b"{}")


async def test_removal_of_a_whole_repository(registry: Registry, inventory: Inventory) -> None:
    """If a repository is removed, all its content is deleted. Blobs that another repository has as well free no
    space."""
    first = await push_image(registry, UBUNTU, "1", size=100, shared=b"shared")
    second = await push_image(registry, UBUNTU, size=50)
    await push_image(registry, DEBIAN, "1", size=30, shared=b"shared")
    plan = inventory.plan_removal_of_all(UBUNTU)
    assert set(plan.manifests) == {first.digest, second.digest}
    assert (plan.tags, plan.freed_bytes) == (("1",), 150)


async def test_unknown_content_cannot_be_removed(registry: Registry, inventory: Inventory) -> None:
    """The removal of an unknown repository, tag or digest raises an error."""
    with pytest.raises(NameUnknown):
        inventory.plan_removal(UBUNTU, Tag("1"))
    with pytest.raises(NameUnknown):
        inventory.plan_removal_of_all(UBUNTU)
    await push_image(registry, UBUNTU, "1", size=100)
    for reference in (Tag("2"), Digest(f"sha256:{'0' * 64}")):
        with pytest.raises(ManifestUnknown):
            inventory.plan_removal(UBUNTU, reference)
