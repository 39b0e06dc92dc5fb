"""A registry:2 filled by docker, skopeo and buildah moves in: its directory, or its content over the network."""

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
    """Debian's docker-registry with what three clients have pushed. `deleted`: the digest of a manifest that was
    deleted there."""

    program: RunningProgram
    deleted: str

    @property
    def wire(self) -> RegistryClient:
        return RegistryClient(self.program.address)

    @property
    def directory(self) -> Path:
        return self.program.log.parent / "data"


@pytest.fixture(scope="module")
def old(
    tmp_path_factory: pytest.TempPathFactory, docker: DockerEngine, tools: ContainerTools, layout: Path
) -> Iterator[OldRegistry]:
    folder = tmp_path_factory.mktemp("old")
    with docker_registry(folder) as program:
        address, wire = program.address, RegistryClient(program.address)
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
        deleted = wire.digest("by/skopeo", "gone")
        assert wire.ask("DELETE", f"/v2/by/skopeo/manifests/{deleted}").status == 202
        yield OldRegistry(program, deleted)


@pytest.fixture
def new(tmp_path: Path) -> Iterator[RegistryServer]:
    """A running server without content."""
    with running_server(tmp_path / "new") as running:
        yield running


def assert_moved(old: OldRegistry, new: RegistryServer, docker: DockerEngine) -> None:
    """Checks that the new server has what the old one serves, and not what was deleted there. docker runs an image of
    it."""
    wire = RegistryClient(new.address)
    assert assert_same_content(old.wire, wire) >= 18
    assert catalog(wire) == ["by/buildah", "by/docker", "by/skopeo", "other/docker"]
    assert wire.ask("GET", f"/v2/by/skopeo/manifests/{old.deleted}").status == 404
    name = f"{new.address}/by/docker:1"
    docker("pull", name)
    assert docker.output_of(name) == "from docker\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_directory(old: OldRegistry, new: RegistryServer, docker: DockerEngine, tmp_path: Path) -> None:
    """The directory is imported while both servers run. Files are linked, and a second run changes nothing."""
    command = ("import-registry", old.directory, "--data", new.data)
    count = sum(len(tags(old.wire, repo)) for repo in catalog(old.wire))
    done = entrepot(*command, folder=tmp_path)
    assert (done.returncode, "copied" in done.stdout) == (0, False), (done.stdout, done.stderr)
    assert done.stdout.startswith(f"repositories: 4; tags: {count} imported, 0 unchanged\n")
    assert "left out: " in done.stderr  # the blobs of the deleted image
    assert_moved(old, new, docker)

    again = json.loads(entrepot(*command, "--json", folder=tmp_path).stdout.splitlines()[-1])
    assert (again["event"], again["tags"], again["present"], again["manifests"]) == ("done", 0, count, 0)
    assert (again["linked"], again["copied"], again["problems"]) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_over_the_network(
    old: OldRegistry, new: RegistryServer, docker: DockerEngine, tools: ContainerTools, tmp_path: Path, big: ClientImage
) -> None:
    """The same content is imported over the network, by the list of repositories. A second run imports what was pushed
    meanwhile."""
    command = ("import", old.program.url, "--data", new.data)
    done = entrepot(*command, folder=tmp_path)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.startswith("repositories: 4; tags: 6 imported, 0 unchanged\n")
    assert_moved(old, new, docker)

    old.wire.push("by/skopeo", "big", big)
    again = json.loads(entrepot(*command, "--json", folder=tmp_path).stdout.splitlines()[-1])
    assert (again["tags"], again["present"], again["manifests"]) == (1, 6, 1)
    assert_moved(old, new, docker)
