"""Real clients pull through a mirror of a real registry: while the upstream is on, and from the cache while it is
off."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.client_images import image
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.containerd_daemon import running_containerd
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.mirror_clients import HELD, TwoRegistries, docker_for, tools_for, two_registries
from tests.fakes.clients.registry_client import RegistryClient, pull_all
from tests.fakes.server_process import RegistryServer


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRegistries]:
    with two_registries(tmp_path_factory.mktemp("upstreams")) as running:
        yield running


@pytest.fixture(scope="module", params=["on", "off"])
def mirror(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, beyond: TwoRegistries
) -> Iterator[RegistryServer]:
    """A mirror without cached content; or one with all of `HELD` in its cache, whose upstreams are off."""
    with beyond.mirror(tmp_path_factory.mktemp("mirror")) as running:
        if request.param == "on":
            yield running
            return
        for name in HELD:
            pull_all(RegistryClient(running.address), *name.split(":"))
        with beyond.off():
            yield running


@pytest.fixture
def is_on(request: pytest.FixtureRequest) -> bool:
    """Whether the upstreams are on."""
    return bool(request.node.callspec.params["mirror"] == "on")


@pytest.fixture(scope="module")
def docker(short_folder: Path, mirror: RegistryServer) -> Iterator[DockerEngine]:
    with docker_for(mirror, short_folder) as running:
        yield running


@pytest.fixture
def tools(short_folder: Path, mirror: RegistryServer, beyond: TwoRegistries) -> ContainerTools:
    return tools_for(mirror, beyond, short_folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ubuntu:18.04", "bionic amd64"),
        ("{mirror}/ubuntu:18.04", "bionic amd64"),
        ("{mirror}/docker.io/library/ubuntu:18.04", "bionic amd64"),
        ("{mirror}/far.example/library/ubuntu:18.04", "far amd64"),
        ("{mirror}/org/app:1", "org/app"),
        ("org/app:1", "org/app"),
    ],
)
def test_docker(docker: DockerEngine, mirror: RegistryServer, name: str, said: str) -> None:
    """dockerd pulls Docker Hub's names through `registry-mirrors`, other names at the mirror's address, and runs the
    images."""
    name = name.format(mirror=mirror.address)
    docker("pull", "--quiet", name)
    assert docker.output_of(name) == f"{said}\n"
    docker.forget(name)


def test_docker_by_digest(docker: DockerEngine, beyond: TwoRegistries) -> None:
    """The digest that docker shows is the upstream's digest, and can be used for a pull."""
    digest = beyond.hub.content.repositories["library/ubuntu"].tags["18.04"]
    docker("pull", "--quiet", "ubuntu:18.04")
    assert docker.inspect("ubuntu:18.04")["RepoDigests"] == [f"ubuntu@{digest}"]
    docker.forget("ubuntu:18.04")
    docker("pull", "--quiet", f"ubuntu@{digest}")
    assert docker.output_of(f"ubuntu@{digest}") == "bionic amd64\n"
    docker.forget(f"ubuntu@{digest}")


def test_containerd(short_folder: Path, tmp_path: Path, mirror: RegistryServer, beyond: TwoRegistries) -> None:
    """containerd requests the same path of two upstreams, which only `?ns=` tells apart, and gets the bytes of each."""
    certs = tmp_path / "certs.d"
    for upstream in ("docker.io", "far.example"):
        (certs / upstream).mkdir(parents=True)
        hosts = beyond.printed(mirror, "containerd", "--upstream", upstream)
        (certs / upstream / "hosts.toml").write_text(hosts)
    folder = Path(tempfile.mkdtemp(prefix="c", dir=short_folder))
    with running_containerd(folder) as ctr:
        for upstream, registry in {"docker.io": beyond.hub, "far.example": beyond.far}.items():
            name = f"{upstream}/library/ubuntu:18.04"
            ctr("images", "pull", "--hosts-dir", str(certs), "--snapshotter", "native", name)
            held = registry.content.repositories["library/ubuntu"]
            assert held.tags["18.04"] in ctr("images", "ls", f"name=={name}").out
            amd64 = json.loads(held.manifests[held.tags["18.04"]][0])["manifests"][0]["digest"]
            assert ctr("content", "get", amd64).out.encode() == held.manifests[amd64][0]
            assert {each["digest"] for each in json.loads(held.manifests[amd64][0])["layers"]} <= ctr.held()
            ctr.forget(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("docker.io/library/ubuntu:18.04", "bionic amd64"),
        ("docker.io/org/app:1", "org/app"),
        ("far.example/library/ubuntu:18.04", "far amd64"),
        ("{mirror}/ubuntu:18.04", "bionic amd64"),
    ],
)
def test_podman(tools: ContainerTools, mirror: RegistryServer, name: str, said: str) -> None:
    """podman pulls from all upstreams through registries.conf, and at the mirror's address."""
    name = name.format(mirror=mirror.address)
    tools.podman("pull", "--quiet", name)
    assert tools.output_of(name) == f"{said}\n"


def test_buildah(tools: ContainerTools) -> None:
    """buildah builds from an image of the upstream."""
    container = tools.buildah("from", "--quiet", "docker.io/library/ubuntu:18.04").out.split()[-1]
    said = tools.buildah("run", "--isolation", "chroot", container, "/bin/cat", "/greeting").out
    assert said == "bionic amd64\n"
    tools.buildah("rm", container)


def test_skopeo(tools: ContainerTools, beyond: TwoRegistries, tmp_path: Path) -> None:
    """A copy of all platforms has the same bytes as at the upstream."""
    tools.skopeo("copy", "--quiet", "--all", "docker://docker.io/library/ubuntu:18.04", f"dir:{tmp_path / 'copy'}")
    held = beyond.hub.content.repositories["library/ubuntu"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert files["manifest.json"] == held.manifests[held.tags["18.04"]][0]
    for digest, blob in held.blobs.items():
        assert files[digest.partition(":")[2]] == blob.read()


def test_a_private_image_beside_the_mirror(
    docker: DockerEngine, tools: ContainerTools, mirror: RegistryServer, beyond: TwoRegistries, is_on: bool
) -> None:
    """docker pushes an image under a hosted name, podman pulls it, and the upstream gets no request for this name."""
    path = f"team/{'on' if is_on else 'off'}"
    name = f"{mirror.address}/{path}:1"
    docker.load(image(f"hello from {path}"), name)
    docker("push", name)
    tools.podman("pull", "--quiet", INSECURE, name)
    assert tools.output_of(name) == f"hello from {path}\n"
    docker.forget(name)
    assert not [asked for asked in beyond.hub.read() if path in asked]


def test_what_is_told_of_an_old_tag(mirror: RegistryServer, is_on: bool) -> None:
    """While the upstream is off, the response has a warning. While it is on, it has none."""
    wire = RegistryClient(mirror.address)
    for reply in (wire.ask("HEAD", "/v2/library/ubuntu/manifests/18.04"), wire.manifest("library/ubuntu", "18.04")):
        warning = reply.headers["Warning"]
        assert reply.status == 200
        assert warning is None if is_on else warning.startswith('299 - "docker.io/library/ubuntu:18.04 is served as')
