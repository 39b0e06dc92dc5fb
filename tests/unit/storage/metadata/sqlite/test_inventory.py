"""Counts of the stored content, and what a removal deletes."""

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
def holdings(registry: Registry, tmp_path: Path) -> Iterator[Inventory]:
    with open_inventory(tmp_path) as opened:
        yield opened


async def blob(registry: Registry, repo: RepositoryName, data: bytes) -> dict[str, object]:
    writer = await registry.start_upload(repo)
    await writer.write(data)
    await writer.commit(digest_of(data))
    return Descriptor(KIND, digest_of(data), len(data)).as_json()


async def put(registry: Registry, repo: RepositoryName, kind: str, *tags: str, **document: Any) -> Manifest:
    body = json.dumps({"schemaVersion": 2, "mediaType": kind, **document}).encode()
    manifest = Manifest.parse(body, kind)
    await registry.put_manifest(repo, manifest, [Tag(tag) for tag in tags], by=Actor(), sparse=True)
    return manifest


async def image(registry: Registry, repo: RepositoryName, *tags: str, size: int, shared: bytes = b"") -> Manifest:
    """Stores an image with a layer of its own, and with a layer that other images may have."""
    config = await blob(registry, repo, b"{}")
    layers = [await blob(registry, repo, bytes([size % 256]) * size)]
    if shared:
        layers.append(await blob(registry, repo, shared))
    return await put(registry, repo, OCI_MANIFEST, *tags, config=config, layers=layers)


async def index(registry: Registry, repo: RepositoryName, *children: Manifest, tag: str) -> Manifest:
    return await put(registry, repo, OCI_INDEX, tag, manifests=[child.descriptor.as_json() for child in children])


def test_nothing(holdings: Inventory) -> None:
    """An upstream without cached content has zeros."""
    assert holdings.totals_below("docker.io") == ContentTotals(0, 0, 0, 0, 0)


async def test_counts_below_a_name(registry: Registry, holdings: Inventory) -> None:
    """Only content below the name counts. A blob in two repositories counts once."""
    await image(registry, UBUNTU, "1", "2", size=100, shared=b"shared")
    await image(registry, DEBIAN, "1", size=50, shared=b"shared")
    for other in ("docker.io", "docker.io0/a", "docker.ioo/a", "docker-io/a", "team/app"):
        await image(registry, RepositoryName(other), "1", size=30)
    assert holdings.totals_below("docker.io") == ContentTotals(2, 2, 3, 4, 100 + 50 + len(b"shared") + len(b"{}"))
    assert holdings.tags_below("docker.io") == [(DEBIAN, "1"), (UBUNTU, "1"), (UBUNTU, "2")]


async def test_a_tag_takes_its_manifest_along(registry: Registry, holdings: Inventory) -> None:
    """When the last tag of a manifest is removed, the manifest is deleted. Layers that only this manifest has are
    freed."""
    old = await image(registry, UBUNTU, "old", size=100, shared=b"shared")
    await image(registry, UBUNTU, "new", size=50, shared=b"shared")
    going = holdings.plan_removal(UBUNTU, Tag("old"))
    assert (going.tags, going.manifests, going.size) == (("old",), (old.digest,), 100)


async def test_a_tag_of_two(registry: Registry, holdings: Inventory) -> None:
    """If the manifest has another tag, only the tag is removed."""
    await image(registry, UBUNTU, "1", "2", size=100)
    going = holdings.plan_removal(UBUNTU, Tag("1"))
    assert (going.tags, going.manifests, going.size) == (("1",), (), 0)


async def test_a_tag_at_the_child_of_an_index(registry: Registry, holdings: Inventory) -> None:
    """If an index lists the manifest, only the tag is removed."""
    child = await image(registry, UBUNTU, "amd64", size=100)
    await index(registry, UBUNTU, child, tag="1")
    assert holdings.plan_removal(UBUNTU, Tag("amd64")).manifests == ()


async def test_an_index_takes_its_children_along(registry: Registry, holdings: Inventory) -> None:
    """With an index, its children are deleted, unless they have a tag or another index lists them."""
    own = await image(registry, UBUNTU, size=100)
    tagged = await image(registry, UBUNTU, "arm64", size=50)
    shared = await image(registry, UBUNTU, size=30)
    first = await index(registry, UBUNTU, own, tagged, shared, tag="1")
    await index(registry, UBUNTU, shared, tag="2")
    going = holdings.plan_removal(UBUNTU, Tag("1"))
    assert set(going.manifests) == {first.digest, own.digest}
    assert going.size == 100


async def test_a_referrer_goes_with_its_subject(registry: Registry, holdings: Inventory) -> None:
    """A signature without a tag is deleted with its subject."""
    subject = await image(registry, UBUNTU, "1", size=100)
    about = {key: subject.descriptor.as_json()[key] for key in ("mediaType", "digest", "size")}
    signature = await put(
        registry, UBUNTU, OCI_MANIFEST, subject=about, config=await blob(registry, UBUNTU, b"sig"), layers=[]
    )
    assert holdings.plan_removal(UBUNTU, Tag("1")).manifests == (subject.digest, signature.digest)


async def test_a_digest_takes_its_tags_along(registry: Registry, holdings: Inventory) -> None:
    """When a manifest is deleted, all tags that point at it are deleted."""
    there = await image(registry, UBUNTU, "1", "2", size=100)
    going = holdings.plan_removal(UBUNTU, there.digest)
    assert (going.tags, going.manifests) == (("1", "2"), (there.digest,))
    assert going.size == 100 + len(b"{}")


async def test_a_whole_repository(registry: Registry, holdings: Inventory) -> None:
    """When a repository is deleted, all its content is. Blobs that another repository has free no space."""
    first = await image(registry, UBUNTU, "1", size=100, shared=b"shared")
    second = await image(registry, UBUNTU, size=50)
    await image(registry, DEBIAN, "1", size=30, shared=b"shared")
    going = holdings.plan_removal_of_all(UBUNTU)
    assert set(going.manifests) == {first.digest, second.digest}
    assert (going.tags, going.size) == (("1",), 150)


async def test_what_is_not_there(registry: Registry, holdings: Inventory) -> None:
    """An unknown repository, tag or digest is an error."""
    with pytest.raises(NameUnknown):
        holdings.plan_removal(UBUNTU, Tag("1"))
    with pytest.raises(NameUnknown):
        holdings.plan_removal_of_all(UBUNTU)
    await image(registry, UBUNTU, "1", size=100)
    for reference in (Tag("2"), Digest(f"sha256:{'0' * 64}")):
        with pytest.raises(ManifestUnknown):
            holdings.plan_removal(UBUNTU, reference)
