"""Tests with containerd and its command line client, ctr."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.client_images import ClientImage, image, index, layer, noise
from tests.fakes.clients.containerd_daemon import Containerd, blobs_of_export
from tests.fakes.clients.registry_client import RegistryClient, assert_same_image
from tests.fakes.server_process import RegistryServer


def test_pull_by_tag_and_by_digest(
    ctr: Containerd, server: RegistryServer, wire: RegistryClient, repo: str, small_image: ClientImage
) -> None:
    """After a pull by tag or by digest, containerd's content store has exactly the pushed bytes."""
    wire.push(repo, "v1", small_image)
    for name in (f"{server.address}/{repo}:v1", f"{server.address}/{repo}@{small_image.digest}"):
        ctr.pull(name)
        assert small_image.digest in ctr("images", "ls", f"name=={name}").out
        assert ctr.has_same_bytes(small_image)
        ctr.forget(name)
        assert small_image.digest not in ctr.stored_digests()


def test_push(ctr: Containerd, server: RegistryServer, wire: RegistryClient, repo: str) -> None:
    """containerd pulls an image and pushes it to another repository without a change. A second push succeeds as
    well."""
    test_image = image(f"ctr {repo}", layer({"heavy": noise(repo, 5_000_000)}))
    source, target = f"{server.address}/{repo}/one:x", f"{server.address}/{repo}/two:y"
    wire.push(f"{repo}/one", "x", test_image)
    ctr.pull(source)
    ctr.push(target, source)
    assert_same_image(wire, f"{repo}/two", "y", test_image)
    ctr.push(target, source)
    assert_same_image(wire, f"{repo}/two", "y", test_image)


def test_all_platforms(
    ctr: Containerd,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    multi_platform: ClientImage,
    tmp_path: Path,
) -> None:
    """containerd pulls an index for all platforms, exports it, and pushes it again. The bytes never change."""
    wire.push(repo, "multi", multi_platform)
    name, copy_name = f"{server.address}/{repo}:multi", f"{server.address}/{repo}/again:multi"
    ctr.pull(name, "--all-platforms")
    assert ctr.has_same_bytes(multi_platform)
    ctr("images", "export", "--all-platforms", "--skip-manifest-json", str(tmp_path / "out.tar"), name)
    exported = blobs_of_export(tmp_path / "out.tar")
    contents = multi_platform.manifests | multi_platform.blobs
    assert exported == {digest: content.body for digest, content in contents.items()}
    ctr.push(copy_name, name)
    assert_same_image(wire, f"{repo}/again", "multi", multi_platform)


def test_one_platform(ctr: Containerd, server: RegistryServer, wire: RegistryClient, repo: str) -> None:
    """If containerd pulls an index for one platform, it fetches only the blobs of that platform's image."""
    children = [image(f"{each} of {repo}", architecture=each) for each in ("amd64", "arm64")]
    test_image = index((children[0], "amd64"), (children[1], "arm64"))
    wire.push(repo, "multi", test_image)
    ctr.pull(f"{server.address}/{repo}:multi", "--platform", "linux/arm64")
    content_store = ctr.stored_digests()
    assert set(children[1].blobs) <= content_store
    assert children[0].layers[1].digest not in content_store


@pytest.mark.timeout(300)
def test_large_layers(
    ctr: Containerd, server: RegistryServer, wire: RegistryClient, repo: str, large_image: ClientImage
) -> None:
    """containerd pulls a layer of 80 MiB, and pushes it with one PUT to another repository."""
    wire.push(repo, "big", large_image)
    name, other = f"{server.address}/{repo}:big", f"{server.address}/{repo}/other:big"
    ctr.pull(name)
    assert ctr.has_same_bytes(large_image)
    ctr.push(other, name)
    assert_same_image(wire, f"{repo}/other", "big", large_image)
    ctr.forget(name)
