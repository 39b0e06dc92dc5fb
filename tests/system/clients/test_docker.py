"""Tests with docker and a real dockerd."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fakes.client_images import DOCKER_LIST, MIB, ClientImage, digest_of, image, layer, noise
from tests.fakes.clients.cutting_proxy import CuttingProxy
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.registry_client import RegistryClient, assert_same_files, pull_all
from tests.fakes.server_process import RegistryServer


def test_push_and_pull_without_a_tag(
    docker: DockerEngine, server: RegistryServer, wire: RegistryClient, repo: str, small_image: ClientImage
) -> None:
    """docker pushes and pulls an image without a tag, which means the tag `latest`. The pulled image runs."""
    name = f"{server.address}/{repo}"
    docker.load(small_image, name)
    assert "latest: digest: sha256:" in docker("push", name).out
    docker.remove_image(name)
    assert "Using default tag: latest" in docker("pull", name).out
    assert docker.image_id(name) == digest_of(small_image.config.body if small_image.config else b"")
    assert docker.output_of(name) == f"hello from {repo}\n"
    assert wire.tags(repo) == ["latest"]
    assert_same_files(wire, repo, "latest", small_image)


def test_pull_by_tag_and_by_digest(
    docker: DockerEngine, server: RegistryServer, wire: RegistryClient, repo: str, small_image: ClientImage
) -> None:
    """Pulls by tag and by digest give the same image id. RepoDigests has the registry's digest."""
    name = f"{server.address}/{repo}"
    docker.load(small_image, f"{name}:v1.0")
    docker("push", f"{name}:v1.0")
    digest, image_id = wire.digest(repo, "v1.0"), docker.image_id(f"{name}:v1.0")
    for reference in (f"{name}:v1.0", f"{name}@{digest}"):
        docker.remove_image(image_id)
        docker("pull", reference)
        assert docker.image_id(reference) == image_id
        assert docker.inspect(reference)["RepoDigests"] == [f"{name}@{digest}"]


@pytest.mark.parametrize("path", ["app", "a/b/c/d/e", "with.dot/under_score/dash-dash/two__under/1"])
def test_nested_and_odd_names(docker: DockerEngine, server: RegistryServer, wire: RegistryClient, path: str) -> None:
    """docker can use repository names with one part or with many, and with every separator that the spec allows."""
    name = f"{server.address}/{path}:x"
    test_image = image(f"odd {path}")
    docker.load(test_image, name)
    docker("push", name)
    docker.remove_image(name)
    docker("pull", name)
    assert docker.output_of(name) == f"odd {path}\n"
    assert_same_files(wire, path, "x", test_image)


@pytest.mark.timeout(300)
def test_large_layer(
    docker: DockerEngine, server: RegistryServer, wire: RegistryClient, repo: str, large_image: ClientImage
) -> None:
    """docker pushes and pulls layers of up to 80 MiB without a change."""
    name = f"{server.address}/{repo}"
    docker.load(large_image, name)
    image_id = docker.image_id(name)
    docker("push", name)
    docker.remove_image(name)
    docker("pull", name)
    assert docker.image_id(name) == image_id
    hex_digest = digest_of(noise("large", 80 * MIB)).removeprefix("sha256:")
    assert docker.output_of(name, "/bin/sha256sum", "/large").split()[0] == hex_digest
    assert_same_files(wire, repo, "latest", large_image)


def test_push_again(docker: DockerEngine, proxy: CuttingProxy, repo: str, small_image: ClientImage) -> None:
    """At the second push of an image, docker finds that every layer exists, and sends no layer."""
    name = f"{proxy.address}/{repo}"
    docker.load(small_image, name)
    docker("push", name)
    sent_before, count_before = proxy.sent, len(proxy.request_lines)
    # On a busy machine, docker does not print the state of every layer.
    assert "Layer already exists" in docker("push", name).out
    requests = proxy.request_lines[count_before:]
    found_blobs = {line for line in requests if line.startswith("HEAD ") and "/blobs/" in line}
    assert len(found_blobs) == len(small_image.layers) + 1  # the layers and the config
    assert not [line for line in requests if "/uploads/" in line]
    assert proxy.sent - sent_before < 16 * 1024  # bytes: enough for the requests and the manifest


def test_mount_from_another_repository(
    docker: DockerEngine, proxy: CuttingProxy, wire: RegistryClient, repo: str
) -> None:
    """When docker pushes an image to a second repository, the registry mounts its layers, and docker sends none."""
    test_image = image("mount", layer({"heavy": noise(repo, 8 * MIB)}))
    name, other = f"{proxy.address}/{repo}/one", f"{proxy.address}/{repo}/two"
    docker.load(test_image, name)
    docker("push", name)
    docker("tag", name, other)
    sent_before, count_before = proxy.sent, len(proxy.request_lines)
    # On a busy machine, docker does not print the state of every layer.
    assert f"Mounted from {repo}/one" in docker("push", other).out
    requests = proxy.request_lines[count_before:]
    assert len({line for line in requests if "mount=" in line}) == len(test_image.layers)
    assert len([line for line in requests if line.startswith("PATCH ")]) == 1  # docker sends the config
    assert proxy.sent - sent_before < 64 * 1024  # bytes: enough for the requests, the config and the manifest
    assert wire.digest(f"{repo}/one") == wire.digest(f"{repo}/two")
    assert_same_files(wire, f"{repo}/two", "latest", test_image)


@pytest.mark.timeout(300)
def test_parallel_pushes_of_shared_layers(
    docker: DockerEngine, server: RegistryServer, wire: RegistryClient, repo: str
) -> None:
    """Six images with a common layer are pushed at the same time to three repositories. All six are complete."""
    shared = layer({"shared": noise(repo, 4 * MIB)})
    repositories = [f"{repo}/{number % 3}" for number in range(6)]
    test_images = [image(f"parallel {number}", shared) for number in range(6)]
    for number, each in enumerate(test_images):
        docker.load(each, f"{server.address}/{repositories[number]}:{number}")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: docker("push", f"{server.address}/{repositories[n]}:{n}"), range(6)))
    for number, each in enumerate(test_images):
        assert_same_files(wire, repositories[number], str(number), each)


def test_build_from_a_pulled_image(
    docker: DockerEngine,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """`docker build` pulls its base image from the registry. The built image can be pushed and run."""
    base, name = f"{server.address}/{repo}/base", f"{server.address}/{repo}/built:1"
    docker.load(small_image, base)
    docker("push", base)
    docker.remove_image(base)
    (tmp_path / "added").write_text(f"added to {repo}\n")
    (tmp_path / "Dockerfile").write_text(
        f'FROM {base}\nCOPY added /added\nRUN cat /greeting /added > /both\nCMD ["/bin/cat", "/both"]\n'
    )
    docker("build", "--pull", "--network", "host", "--tag", name, str(tmp_path))
    docker("push", name)
    docker.remove_image(name)
    docker("pull", name)
    assert docker.output_of(name) == f"hello from {repo}\nadded to {repo}\n"
    pull_all(wire, f"{repo}/built", "1")


def test_manifest_list(docker: DockerEngine, server: RegistryServer, wire: RegistryClient, repo: str) -> None:
    """`docker manifest` makes a list of two manifests of the registry, and pushes this list. A pull of the list gets
    the image for the platform of this machine."""
    name = f"{server.address}/{repo}"
    images_by_platform = {
        architecture: image(f"list {architecture}", architecture=architecture) for architecture in ("amd64", "arm64")
    }
    for architecture, each in images_by_platform.items():
        docker.load(each, f"{name}:{architecture}")
        docker("push", f"{name}:{architecture}")
    assert "schemaVersion" in docker("manifest", "inspect", "--insecure", f"{name}:arm64").out
    docker("manifest", "create", "--insecure", f"{name}:both", f"{name}:amd64", f"{name}:arm64")
    pushed = docker("manifest", "push", "--insecure", "--purge", f"{name}:both").out.split()[-1]
    reply = wire.manifest(repo, "both")
    assert (digest_of(reply.body), reply.headers["Content-Type"]) == (pushed, DOCKER_LIST)
    assert {wire.digest(repo, each) for each in images_by_platform} < pull_all(wire, repo, "both")
    docker.remove_image(f"{name}:amd64")
    docker("pull", f"{name}:both")
    assert docker.output_of(f"{name}:both") == "list amd64\n"


def test_pull_of_a_missing_image(docker: DockerEngine, server: RegistryServer, repo: str) -> None:
    """For an unknown repository or tag, docker shows a clear error."""
    refused = docker.call.attempt("pull", f"{server.address}/{repo}:none")
    assert refused.code != 0
    assert "not found" in refused.err or "manifest unknown" in refused.err, refused.err


def test_pull_of_an_oci_index(
    docker: DockerEngine, server: RegistryServer, wire: RegistryClient, repo: str, multi_platform: ClientImage
) -> None:
    """docker pulls the image for its platform from an OCI index that another client has pushed."""
    wire.push(repo, "multi", multi_platform)
    name = f"{server.address}/{repo}:multi"
    docker("pull", name)
    assert docker.output_of(name) == "on amd64\n"
    assert docker.inspect(name)["RepoDigests"] == [f"{server.address}/{repo}@{multi_platform.digest}"]
