"""Tests with skopeo: copies of images and indexes, deletes, lists of tags, sync, and conversions between formats."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import zstandard

from tests.fakes.client_images import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_MANIFEST,
    MIB,
    OCI_INDEX,
    OCI_LAYER_ZSTD,
    ClientImage,
    artifact,
    digest_of,
    image,
    layer,
    noise,
    write_dir,
    write_layout,
)
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.registry_client import RegistryClient, assert_same_files, assert_same_image, pull_all
from tests.fakes.server_process import RegistryServer

SYNC_OPTIONS = ("--all", "--preserve-digests")


def blobs_below(layout: Path) -> dict[str, bytes]:
    """Returns the bytes of every blob of an OCI image layout, by digest."""
    return {f"sha256:{path.name}": path.read_bytes() for path in (layout / "blobs" / "sha256").iterdir()}


def test_copy_in_and_out(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    layout: Path,
    large_image: ClientImage,
    tmp_path: Path,
) -> None:
    """skopeo copies an OCI image of 80 MiB to the registry and back without a change."""
    name = f"docker://{server.address}/{repo}:big"
    tools.copy(f"oci:{layout}:big", name)
    assert_same_image(wire, repo, "big", large_image)
    tools.copy(name, f"oci:{tmp_path / 'out'}:big")
    contents = large_image.manifests | large_image.blobs
    assert blobs_below(tmp_path / "out") == {digest: content.body for digest, content in contents.items()}


def test_copy_by_digest_and_default_tag(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """A copy without a tag uses the tag `latest`. A copy by digest gets the same bytes."""
    write_layout(tmp_path / "in", {"x": small_image})
    name = f"docker://{server.address}/{repo}"
    tools.copy(f"oci:{tmp_path / 'in'}:x", name)
    assert wire.tags(repo) == ["latest"]
    for number, reference in enumerate([name, f"{name}@{small_image.digest}"]):
        assert tools.skopeo("inspect", INSECURE, "--raw", reference).out.encode() == small_image.manifest.body
        tools.copy(reference, f"oci:{tmp_path / str(number)}:x")
        assert blobs_below(tmp_path / str(number))[small_image.digest] == small_image.manifest.body


@pytest.mark.parametrize("option", ["--all", "--multi-arch=all"])
def test_copy_of_an_index(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    layout: Path,
    multi_platform: ClientImage,
    option: str,
    tmp_path: Path,
) -> None:
    """skopeo copies an index with all its platforms to the registry and back without a change."""
    name = f"docker://{server.address}/{repo}:multi"
    tools.copy(f"oci:{layout}:multi", name, option)
    assert_same_image(wire, repo, "multi", multi_platform)
    assert wire.manifest(repo, "multi").headers["Content-Type"] == OCI_INDEX
    tools.copy(name, f"oci:{tmp_path / 'out'}:multi", option)
    contents = multi_platform.manifests | multi_platform.blobs
    assert blobs_below(tmp_path / "out") == {digest: content.body for digest, content in contents.items()}


def test_one_platform_of_an_index(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    multi_platform: ClientImage,
    tmp_path: Path,
) -> None:
    """If skopeo copies an index for one platform, it gets exactly the image of this platform."""
    wire.push(repo, "multi", multi_platform)
    name = f"docker://{server.address}/{repo}:multi"
    tools.skopeo(
        *("--override-arch", "arm64", "copy", "--quiet", "--src-tls-verify=false", "--multi-arch=system"),
        *(name, f"oci:{tmp_path / 'out'}:arm64"),
    )
    child = multi_platform.children[1]
    contents = child.manifests | child.blobs
    assert blobs_below(tmp_path / "out") == {digest: content.body for digest, content in contents.items()}


def test_index_only(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    multi_platform: ClientImage,
    layout: Path,
) -> None:
    """If the registry already has the images of an index, skopeo can push the index alone."""
    for number, child in enumerate(multi_platform.children):
        wire.push(repo, f"child-{number}", child)
    tools.copy(f"oci:{layout}:multi", f"docker://{server.address}/{repo}:multi", "--multi-arch=index-only")
    assert_same_image(wire, repo, "multi", multi_platform)


def test_inspect_and_list_tags(
    tools: ContainerTools, server: RegistryServer, wire: RegistryClient, repo: str, small_image: ClientImage
) -> None:
    """`skopeo inspect` shows the digest, the layers and the platform. `skopeo list-tags` shows every tag in order."""
    for tag in ("b", "a", "latest", "v10", "v9"):
        wire.push(repo, tag, small_image)
    name = f"docker://{server.address}/{repo}"
    inspected = json.loads(tools.skopeo("inspect", INSECURE, f"{name}:a").out)
    assert (inspected["Digest"], inspected["Architecture"], inspected["Os"]) == (small_image.digest, "amd64", "linux")
    assert inspected["Layers"] == [each.digest for each in small_image.layers]
    listed = json.loads(tools.skopeo("list-tags", INSECURE, name).out)["Tags"]
    assert listed == inspected["RepoTags"] == ["a", "b", "latest", "v10", "v9"]


def test_delete(
    tools: ContainerTools, server: RegistryServer, wire: RegistryClient, repo: str, small_image: ClientImage
) -> None:
    """After a delete, requests for the digest and for every tag that pointed at it get 404 at once. Another image of
    the repository stays."""
    other = image(f"other {repo}")
    wire.push(repo, "other", other)
    for tag in ("one", "two"):
        wire.push(repo, tag, small_image)
    name = f"docker://{server.address}/{repo}:one"
    tools.skopeo("delete", INSECURE, name)
    for reference in ("one", "two", small_image.digest):
        assert wire.ask("GET", f"/v2/{repo}/manifests/{reference}").status == 404
    assert tools.skopeo.attempt("inspect", INSECURE, name).code != 0
    assert_same_image(wire, repo, "other", other)


def test_sync_to_a_directory_and_back(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    multi_platform: ClientImage,
    tmp_path: Path,
) -> None:
    """`skopeo sync` copies every tag of a repository to a directory and to another repository without a change."""
    wire.push(repo, "plain", small_image)
    wire.push(repo, "multi", multi_platform)
    source = f"{server.address}/{repo}"
    tools.skopeo(
        "sync", *SYNC_OPTIONS, "--src", "docker", "--dest", "dir", "--src-tls-verify=false", source, str(tmp_path)
    )
    target = f"{server.address}/{repo}/back"
    tools.skopeo(
        "sync", *SYNC_OPTIONS, "--src", "dir", "--dest", "docker", "--dest-tls-verify=false", str(tmp_path), target
    )
    back = f"{repo}/back/{repo.rpartition('/')[2]}"
    assert_same_image(wire, back, "plain", small_image)
    assert_same_image(wire, back, "multi", multi_platform)


def test_sync_between_registries(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    multi_platform: ClientImage,
) -> None:
    """`skopeo sync` between two registries copies every tag and every byte."""
    wire.push(repo, "plain", small_image)
    wire.push(repo, "multi", multi_platform)
    options = (
        *SYNC_OPTIONS,
        "--src",
        "docker",
        "--dest",
        "docker",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
    )
    tools.skopeo("sync", *options, f"{server.address}/{repo}", f"{server.address}/{repo}/far")
    copied_repo = f"{repo}/far/{repo.rpartition('/')[2]}"
    assert wire.tags(copied_repo) == ["multi", "plain"]
    assert_same_image(wire, copied_repo, "plain", small_image)
    assert_same_image(wire, copied_repo, "multi", multi_platform)


def test_conversion_to_docker_schema_2(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    layout: Path,
    large_image: ClientImage,
) -> None:
    """skopeo converts an image to Docker schema 2 and pushes it. The registry stores the converted manifest. skopeo may
    send layers in another compression, so the test compares the unpacked files."""
    tools.copy(f"oci:{layout}:big", f"docker://{server.address}/{repo}:v2s2", "--format", "v2s2", exact=False)
    reply = wire.manifest(repo, "v2s2")
    assert reply.headers["Content-Type"] == reply.json()["mediaType"] == DOCKER_MANIFEST
    assert_same_files(wire, repo, "v2s2", large_image)


def test_docker_schema_2_is_kept(
    tools: ContainerTools, server: RegistryServer, wire: RegistryClient, repo: str, tmp_path: Path
) -> None:
    """A Docker schema 2 image is copied without a change, with its media types and unusual white space."""
    test_image = image("schema 2", media_type=DOCKER_MANIFEST, layer_type=DOCKER_LAYER)
    assert test_image.config is not None
    assert test_image.config.media_type == DOCKER_CONFIG
    name = f"docker://{server.address}/{repo}:s2"
    tools.copy(f"dir:{write_dir(tmp_path / 'in', test_image)}", name)
    assert_same_image(wire, repo, "s2", test_image)
    tools.copy(name, f"dir:{tmp_path / 'out'}")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == test_image.manifest.body


def test_zstd_layers_are_kept(
    tools: ContainerTools, server: RegistryServer, wire: RegistryClient, repo: str, tmp_path: Path
) -> None:
    """skopeo pushes zstd layers without a change."""
    test_image = image("zstd", layer({"x": noise(repo, MIB)}, OCI_LAYER_ZSTD), layer_type=OCI_LAYER_ZSTD)
    write_layout(tmp_path / "in", {"z": test_image})
    tools.copy(f"oci:{tmp_path / 'in'}:z", f"docker://{server.address}/{repo}:z")
    assert_same_image(wire, repo, "z", test_image)


def test_compression_to_zstd(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """skopeo is told to compress layers as zstd. It may keep layers that are compressed with gzip already. The pushed
    layers, with either compression, unpack to the same bytes as before."""
    write_layout(tmp_path / "in", {"x": small_image})
    target = f"docker://{server.address}/{repo}:z"
    tools.copy(f"oci:{tmp_path / 'in'}:x", target, "--dest-compress-format", "zstd", exact=False)
    pull_all(wire, repo, "z")
    for entry, original in zip(wire.manifest(repo, "z").json()["layers"], small_image.layers, strict=True):
        body = wire.blob(repo, entry["digest"])
        if entry["mediaType"] == OCI_LAYER_ZSTD:
            body = zstandard.ZstdDecompressor().decompressobj().decompress(body)
        else:
            body = gzip.decompress(body)
        assert digest_of(body) == digest_of(original.tar)


def test_artifact_with_a_subject(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """skopeo pushes an artifact with a subject. The registry stores it without a change, and lists it as a referrer of
    its subject."""
    signature = artifact(small_image, f"signed {repo}", "application/vnd.example.signature")
    write_layout(tmp_path / "in", {"x": small_image, "signature": signature})
    for tag in ("x", "signature"):
        source = f"oci:{tmp_path / 'in'}:{tag}"
        tools.copy(source, f"docker://{server.address}/{repo}:{tag}")
    assert_same_image(wire, repo, "signature", signature)
    listed = wire.ask("GET", f"/v2/{repo}/referrers/{small_image.digest}").json()["manifests"]
    assert [each["digest"] for each in listed] == [signature.digest]
    assert listed[0]["artifactType"] == "application/vnd.example.signature"
    assert listed[0]["annotations"] == {"org.example.note": f"signed {repo}"}


@pytest.mark.timeout(300)
def test_ten_parallel_copies_of_a_shared_blob(
    tools: ContainerTools, server: RegistryServer, wire: RegistryClient, repo: str, tmp_path: Path
) -> None:
    """Ten images with one large common layer are pushed at the same time to five repositories. All ten are complete."""
    shared = layer({"shared": noise(repo, 8 * MIB)})
    images_by_tag = {f"t{number}": image(f"ten {number}", shared) for number in range(10)}
    write_layout(tmp_path, images_by_tag)
    repositories = {tag: f"{repo}/{number // 2}" for number, tag in enumerate(images_by_tag)}
    with ThreadPoolExecutor(10) as pool:
        list(
            pool.map(
                lambda t: tools.copy(f"oci:{tmp_path}:{t}", f"docker://{server.address}/{repositories[t]}:{t}"),
                images_by_tag,
            )
        )
    for tag, each in images_by_tag.items():
        assert_same_image(wire, repositories[tag], tag, each)
