"""Tests that import the content of a registry:2 server from its data directory, or over the network. docker, skopeo and
buildah have pushed the content."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fakes.client_images import DOCKER_LAYER, DOCKER_MANIFEST, ClientImage, image, write_layout
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.registry_client import RegistryClient
from tests.fakes.commands import entrepot
from tests.fakes.real_upstreams import RunningProgram, docker_registry
from tests.fakes.same_content import assert_same_content, catalog, tags
from tests.fakes.server_process import RegistryServer, running_server


@dataclass(frozen=True)
class OldRegistry:
    """A running server of Debian's package docker-registry, with images that three clients have pushed. `deleted`: the
    digest of a manifest that was deleted on this server."""

    program: RunningProgram
    deleted: str

    @property
    def client(self) -> RegistryClient:
        return RegistryClient(self.program.address)

    @property
    def directory(self) -> Path:
        return self.program.log.parent / "data"


@pytest.fixture(scope="module")
def old_registry(
    tmp_path_factory: pytest.TempPathFactory, docker: DockerEngine, tools: ContainerTools, layout: Path
) -> Iterator[OldRegistry]:
    """Runs the old registry, and pushes images to it with docker, skopeo and buildah. Deletes one manifest again."""
    folder = tmp_path_factory.mktemp("old")
    with docker_registry(folder) as program:
        address, client = program.address, RegistryClient(program.address)
        loaded = image("from docker", media_type=DOCKER_MANIFEST, layer_type=DOCKER_LAYER)
        for name in (f"{address}/by/docker:1", f"{address}/by/docker:latest", f"{address}/other/docker:1"):
            docker.load(loaded, name)
            docker("push", name)
        tools.copy(f"oci:{layout}:multi", f"docker://{address}/by/skopeo:multi", "--all")
        write_layout(folder / "layout", {"gone": image("gone"), "kept": image("kept")})
        for tag in ("gone", "kept"):
            tools.copy(f"oci:{folder / 'layout'}:{tag}", f"docker://{address}/by/skopeo:{tag}")
        built = f"{address}/by/buildah:built"
        container = tools.buildah("from", "--quiet", INSECURE, f"docker://{address}/by/docker:1").out.split()[-1]
        tools.buildah("config", "--label", "made=by buildah", container)
        tools.buildah("commit", "--quiet", "--rm", container, built)
        tools.buildah("push", INSECURE, built)
        deleted = client.digest("by/skopeo", "gone")
        assert client.ask("DELETE", f"/v2/by/skopeo/manifests/{deleted}").status == 202
        yield OldRegistry(program, deleted)


@pytest.fixture
def new_server(tmp_path: Path) -> Iterator[RegistryServer]:
    """Runs a server without content."""
    with running_server(tmp_path / "new") as running:
        yield running


def assert_moved(old_registry: OldRegistry, new_server: RegistryServer, docker: DockerEngine) -> None:
    """Checks that the new server has all images of the old one, and that the deleted image is missing. Checks that
    docker can run an image of the new server."""
    new_client = RegistryClient(new_server.address)
    compared_parts = assert_same_content(old_registry.client, new_client)  # the number of manifests and blobs
    assert compared_parts >= 18
    assert catalog(new_client) == ["by/buildah", "by/docker", "by/skopeo", "other/docker"]
    assert new_client.ask("GET", f"/v2/by/skopeo/manifests/{old_registry.deleted}").status == 404
    name = f"{new_server.address}/by/docker:1"
    docker("pull", name)
    assert docker.output_of(name) == "from docker\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_import_of_a_registry_directory(
    old_registry: OldRegistry, new_server: RegistryServer, docker: DockerEngine, tmp_path: Path
) -> None:
    """`entrepot import-registry` imports the data directory while both servers run. It links the files instead of
    copying them. A second run changes nothing."""
    command = ("import-registry", old_registry.directory, "--data", new_server.data)
    count = sum(len(tags(old_registry.client, repo)) for repo in catalog(old_registry.client))
    first_run = entrepot(*command, folder=tmp_path)
    assert (first_run.returncode, "copied" in first_run.stdout) == (0, False), (first_run.stdout, first_run.stderr)
    assert first_run.stdout.startswith(f"repositories: 4; tags: {count} imported, 0 unchanged\n")
    assert "left out: " in first_run.stderr  # this line reports the blobs of the deleted image
    assert_moved(old_registry, new_server, docker)

    second_run = json.loads(entrepot(*command, "--json", folder=tmp_path).stdout.splitlines()[-1])
    assert (second_run["event"], second_run["tags"], second_run["present"], second_run["manifests"]) == (
        "done",
        0,
        count,
        0,
    )
    assert (second_run["linked"], second_run["copied"], second_run["problems"]) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_import_over_the_network(
    old_registry: OldRegistry,
    new_server: RegistryServer,
    docker: DockerEngine,
    tools: ContainerTools,
    tmp_path: Path,
    large_image: ClientImage,
) -> None:
    """`entrepot import` imports all repositories that the old registry lists, over the network. A second run imports
    only the image that was pushed meanwhile."""
    command = ("import", old_registry.program.url, "--data", new_server.data)
    first_run = entrepot(*command, folder=tmp_path)
    assert first_run.returncode == 0, (first_run.stdout, first_run.stderr)
    assert first_run.stdout.startswith("repositories: 4; tags: 6 imported, 0 unchanged\n")
    assert_moved(old_registry, new_server, docker)

    old_registry.client.push("by/skopeo", "big", large_image)
    second_run = json.loads(entrepot(*command, "--json", folder=tmp_path).stdout.splitlines()[-1])
    assert (second_run["tags"], second_run["present"], second_run["manifests"]) == (1, 6, 1)
    assert_moved(old_registry, new_server, docker)
