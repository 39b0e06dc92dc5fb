"""Tests with podman and buildah."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.client_images import MIB, OCI_INDEX, ClientImage, image, layer, noise, write_layout
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.cutting_proxy import CuttingProxy
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.registry_client import RegistryClient, assert_same_files, pull_all
from tests.fakes.server_process import RegistryServer


def loaded(tools: ContainerTools, image: ClientImage, name: str, folder: Path) -> None:
    """Loads an image into podman's local storage under the name, without a registry."""
    write_layout(folder, {"x": image})
    image_id = tools.podman("pull", "--quiet", f"oci:{folder}:x").out.split()[-1]
    tools.podman("tag", image_id, name)


def test_push_pull_and_run(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """podman pushes an image, and pulls it without a tag, by tag and by digest. The pulled image runs."""
    name = f"{server.address}/{repo}"
    loaded(tools, small_image, name, tmp_path)
    image_id = tools.image_id(name)
    for pushed in (name, f"{name}:v1"):
        tools.podman("push", INSECURE, name, f"docker://{pushed}")
    assert wire.tags(repo) == ["latest", "v1"]
    assert_same_files(wire, repo, "latest", small_image)
    for reference in (name, f"{name}:v1", f"{name}@{wire.digest(repo)}"):
        tools.podman("rmi", "--force", image_id)
        tools.podman("pull", INSECURE, reference)
        assert tools.image_id(reference) == image_id
        assert tools.output_of(reference) == f"hello from {repo}\n"


def test_push_again_and_mount(
    tools: ContainerTools, proxy: CuttingProxy, wire: RegistryClient, repo: str, tmp_path: Path
) -> None:
    """A second push sends no layer. A push to another repository sends no layer either, because the registry mounts the
    layers."""
    test_image = image("again", layer({"heavy": noise(repo, 4 * MIB)}))
    name = f"{proxy.address}/{repo}"
    loaded(tools, test_image, name, tmp_path)
    tools.podman("push", INSECURE, name)
    assert proxy.sent > 4 * MIB
    first_manifest, sent_at_first = wire.manifest(repo, "latest").body, proxy.sent
    tools.podman("push", INSECURE, name)
    assert wire.manifest(repo, "latest").body == first_manifest
    tools.podman("push", INSECURE, name, f"docker://{name}/other:x")
    assert proxy.sent - sent_at_first < 64 * 1024  # far less than the layer of 4 MiB
    assert_same_files(wire, f"{repo}/other", "x", test_image)


def test_manifest_push_all(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    multi_platform: ClientImage,
    tmp_path: Path,
) -> None:
    """`podman manifest` makes an index of two pushed images, and `push --all` pushes the index with both images."""
    name, index = f"{server.address}/{repo}", f"localhost/{repo}:index"
    for child, tag in zip(multi_platform.children, ("amd64", "arm64"), strict=True):
        wire.push(f"{repo}/parts", tag, child)
    tools.podman("manifest", "create", index)
    for tag in ("amd64", "arm64"):
        tools.podman("manifest", "add", INSECURE, index, f"docker://{name}/parts:{tag}")
    tools.podman("manifest", "push", INSECURE, "--all", "--format", "oci", index, f"docker://{name}:both")
    reply = wire.manifest(repo, "both")
    assert reply.headers["Content-Type"] == OCI_INDEX
    # podman may change the compression of a layer in a push, so the test compares the unpacked layers.
    for entry, child in zip(reply.json()["manifests"], multi_platform.children, strict=True):
        assert_same_files(wire, repo, entry["digest"], child)
    tools.podman("pull", INSECURE, f"{name}:both")
    assert tools.output_of(f"{name}:both") == "on amd64\n"


def test_buildah_builds_on_a_pulled_image(
    tools: ContainerTools,
    server: RegistryServer,
    wire: RegistryClient,
    repo: str,
    small_image: ClientImage,
    tmp_path: Path,
) -> None:
    """buildah pulls a base image, adds a file, commits and pushes. The built image can be pulled again, and has the
    files of the base image and the added file."""
    base, name = f"{server.address}/{repo}/base", f"{server.address}/{repo}/built:2"
    wire.push(f"{repo}/base", "latest", small_image)
    container = tools.buildah("from", "--quiet", INSECURE, base).out.split()[-1]
    (tmp_path / "added").write_text(f"added to {repo}\n")
    tools.buildah("copy", "--quiet", container, str(tmp_path / "added"), "/added")
    tools.buildah("run", "--isolation", "chroot", container, "/bin/sh", "-c", "cat /greeting /added > /both")
    tools.buildah("config", "--cmd", "/bin/cat /both", container)
    image_id = tools.buildah("commit", "--quiet", "--rm", container, name).out.split()[-1]
    tools.buildah("push", INSECURE, name)
    tools.buildah("rmi", "--force", image_id)
    assert tools.buildah("pull", "--quiet", INSECURE, name).out.split()[-1] == image_id
    assert tools.output_of(name) == f"hello from {repo}\nadded to {repo}\n"
    pull_all(wire, f"{repo}/built", "2")


def test_podman_and_docker_pull_each_others_images(
    tools: ContainerTools, docker: DockerEngine, server: RegistryServer, wire: RegistryClient, repo: str, tmp_path: Path
) -> None:
    """docker can run an image that podman has pushed, and podman can run an image that docker has pushed. Both show the
    same image id."""
    for number, greeting in enumerate(["from podman", "from docker"]):
        name = f"{server.address}/{repo}:{number}"
        test_image = image(f"{greeting} {repo}")
        if number == 0:
            loaded(tools, test_image, name, tmp_path)
            tools.podman("push", INSECURE, name)
            docker("pull", name)
        else:
            docker.load(test_image, name)
            docker("push", name)
            tools.podman("pull", INSECURE, name)
        assert docker.image_id(name) == tools.image_id(name)
        assert docker.output_of(name) == tools.output_of(name) == f"{greeting} {repo}\n"
        pull_all(wire, repo, str(number))
