"""Clients use the output of `entrepot client` without changes, and pull an image of Docker Hub through the mirror.

The real Docker Hub cannot be reached, and a fake one takes its place. So an image that a client gets has come through
the mirror. BuildKit is missing, because Debian has no buildkitd; tests/system/cli only parses its file as TOML.
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
def held() -> ImageTree:
    return ubuntu()


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory, held: ImageTree) -> Iterator[Hub]:
    content = UpstreamContent()
    content.add("library/ubuntu", held, "18.04")
    with hub(tmp_path_factory.mktemp("hub"), content, auth="bearer", redirects=True) as running:
        yield running


@pytest.fixture
def mirror(tmp_path: Path, upstream: Hub) -> Iterator[RegistryServer]:
    """A mirror without cached content."""
    file = tmp_path / "entrepot.toml"
    file.write_text(SETTINGS.format(url=upstream.url))
    upstream.forget()
    with running_server(tmp_path, "--config", str(file)) as running:
        yield running


def printed(mirror: RegistryServer, program: str, *args: str) -> str:
    """Returns the output of the command, as `> file` would write it."""
    done = entrepot("client", program, "--url", mirror.url, *args, folder=mirror.data.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fetched(upstream: Hub) -> int:
    """Returns the manifests that the upstream has sent. A request that first got a 401 counts once."""
    return sum(seen.status == 200 for seen in upstream.requests("manifest", "GET"))


def test_docker(short_folder: Path, mirror: RegistryServer, upstream: Hub) -> None:
    """dockerd accepts the daemon.json, and `docker pull ubuntu:18.04` goes through the mirror."""
    folder = short_folder / "docker-mirror"
    folder.mkdir()
    (folder / "daemon.json").write_text(printed(mirror, "docker"))
    with running_docker(folder, "--config-file", str(folder / "daemon.json")) as docker:
        known = json.loads(docker("info", "--format", "{{json .RegistryConfig.Mirrors}}").out)
        assert known == [f"{mirror.url}/"]
        docker("pull", "--quiet", "ubuntu:18.04")
        assert docker.output_of("ubuntu:18.04") == "bionic amd64\n"
    assert fetched(upstream) == 2


def test_containerd(tmp_path: Path, ctr: Containerd, mirror: RegistryServer, upstream: Hub) -> None:
    """containerd finds hosts.toml by the upstream's name, and requests images from the mirror with `?ns=docker.io`."""
    folder = tmp_path / "certs.d" / "docker.io"
    folder.mkdir(parents=True)
    (folder / "hosts.toml").write_text(printed(mirror, "containerd", "--upstream", "docker.io"))
    name = "docker.io/library/ubuntu:18.04"
    ctr("images", "pull", "--hosts-dir", str(folder.parent), "--snapshotter", "native", name)
    ctr.forget(name)
    assert fetched(upstream) == 2


@pytest.mark.parametrize("name", ["docker.io/library/ubuntu:18.04", "docker.io/ubuntu:18.04"])
def test_podman_and_skopeo(
    short_folder: Path, mirror: RegistryServer, upstream: Hub, held: ImageTree, name: str
) -> None:
    """Both ask the mirror, with and without `library/` in the name. skopeo finds the file at its path for users, podman
    by an environment variable."""
    # With a long path podman waits 20 s for a container's end.
    folder = Path(tempfile.mkdtemp(prefix="t", dir=short_folder))
    tools = container_tools(folder)
    dropped_in = folder / "home" / ".config" / "containers" / "registries.conf.d"
    dropped_in.mkdir()
    for file in (folder / "registries.conf", dropped_in / "50-entrepot.conf"):
        file.write_text(printed(mirror, "podman"))
    assert tools.skopeo("inspect", "--raw", f"docker://{name}").out.encode() == held.body
    tools.podman("pull", "--quiet", name)
    assert tools.output_of(name) == "bionic amd64\n"
    assert fetched(upstream) == 2
