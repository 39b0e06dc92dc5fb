"""Tests that set up real clients with the output of `entrepot client`, and pull an image of Docker Hub through the
mirror.

A fake registry takes the place of Docker Hub, and the real Docker Hub cannot be reached. So an image that a client gets
has come through the mirror. There is no test with BuildKit, because Debian has no buildkitd; tests/system/cli only
parses the file for BuildKit as TOML.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.clients.container_tools import container_tools
from tests.fakes.clients.containerd_daemon import Containerd
from tests.fakes.clients.docker_engine import running_docker
from tests.fakes.commands import entrepot
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.upstream_content import ImageTree, UpstreamContent, ubuntu

SETTINGS = """
[[upstream]]
name = "docker.io"
default = true
endpoints = ["{url}"]
"""


@pytest.fixture(scope="module")
def ubuntu_image() -> ImageTree:
    return ubuntu()


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory, ubuntu_image: ImageTree) -> Iterator[Hub]:
    content = UpstreamContent()
    content.add("library/ubuntu", ubuntu_image, "18.04")
    with hub(tmp_path_factory.mktemp("hub"), content, auth="bearer", redirects=True) as running:
        yield running


@pytest.fixture
def mirror(tmp_path: Path, upstream: Hub) -> Iterator[RegistryServer]:
    """Runs a mirror without cached content."""
    file = tmp_path / "entrepot.toml"
    file.write_text(SETTINGS.format(url=upstream.url))
    upstream.forget()
    with running_server(tmp_path, "--config", str(file)) as running:
        yield running


def client_settings(mirror: RegistryServer, program: str, *args: str) -> str:
    """Returns the output of `entrepot client PROGRAM`, which users write into a file."""
    result = entrepot("client", program, "--url", mirror.url, *args, folder=mirror.data.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def sent_manifests(upstream: Hub) -> int:
    """Returns the number of manifests that the upstream has sent. Requests that got a 401 do not count. A pull of
    `ubuntu_image` needs two: the manifest list, and the manifest for amd64."""
    return sum(request.status == 200 for request in upstream.requests("manifest", "GET"))


def test_docker(short_folder: Path, mirror: RegistryServer, upstream: Hub) -> None:
    """dockerd accepts the daemon.json, and `docker pull ubuntu:18.04` goes through the mirror."""
    folder = short_folder / "docker-mirror"
    folder.mkdir()
    (folder / "daemon.json").write_text(client_settings(mirror, "docker"))
    with running_docker(folder, "--config-file", str(folder / "daemon.json")) as docker:
        mirrors = json.loads(docker("info", "--format", "{{json .RegistryConfig.Mirrors}}").out)
        assert mirrors == [f"{mirror.url}/"]
        docker("pull", "--quiet", "ubuntu:18.04")
        assert docker.output_of("ubuntu:18.04") == "bionic amd64\n"
    assert sent_manifests(upstream) == 2


def test_containerd(tmp_path: Path, ctr: Containerd, mirror: RegistryServer, upstream: Hub) -> None:
    """containerd reads hosts.toml in the folder with the upstream's name, and pulls the image through the mirror."""
    folder = tmp_path / "certs.d" / "docker.io"
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(client_settings(mirror, "containerd", "--upstream", "docker.io"))
    name = "docker.io/library/ubuntu:18.04"
    ctr("images", "pull", "--hosts-dir", str(folder.parent), "--snapshotter", "native", name)
    ctr.forget(name)
    assert sent_manifests(upstream) == 2


@pytest.mark.parametrize("name", ["docker.io/library/ubuntu:18.04", "docker.io/ubuntu:18.04"])
def test_podman_and_skopeo(
    short_folder: Path, mirror: RegistryServer, upstream: Hub, ubuntu_image: ImageTree, name: str
) -> None:
    """podman and skopeo send their requests to the mirror, whether the name has `library/` or not. skopeo reads the
    printed file from the user's folder for registries.conf, podman from the path in an environment variable."""
    # With a long path, podman would wait 20 s for the end of a container.
    folder = Path(tempfile.mkdtemp(prefix="t", dir=short_folder))
    tools = container_tools(folder)
    user_folder = folder / "home" / ".config" / "containers" / "registries.conf.d"
    user_folder.mkdir()
    for file in (folder / "registries.conf", user_folder / "50-entrepot.conf"):
        file.write_text(client_settings(mirror, "podman"))
    assert tools.skopeo("inspect", "--raw", f"docker://{name}").out.encode() == ubuntu_image.body
    tools.podman("pull", "--quiet", name)
    assert tools.output_of(name) == "bionic amd64\n"
    assert sent_manifests(upstream) == 2
