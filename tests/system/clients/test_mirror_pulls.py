"""Tests with real clients that pull through a mirror of a real registry. Each test runs twice: while the upstream is
on, and from the mirror's cache while the upstream is off."""

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
from tests.fakes.clients.mirror_clients import UPSTREAM_IMAGES, TwoRegistries, docker_for, tools_for, two_registries
from tests.fakes.clients.registry_client import RegistryClient, pull_all
from tests.fakes.server_process import RegistryServer


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRegistries]:
    """The two real registries of which the mirror is a mirror."""
    with two_registries(tmp_path_factory.mktemp("upstreams")) as running:
        yield running


@pytest.fixture(scope="module", params=["on", "off"])
def mirror(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, upstreams: TwoRegistries
) -> Iterator[RegistryServer]:
    """For the parameter `on`, a mirror without cached content. For `off`, a mirror that has cached all images in
    `UPSTREAM_IMAGES` and whose upstreams are off."""
    with upstreams.mirror(tmp_path_factory.mktemp("mirror")) as running:
        if request.param == "on":
            yield running
            return
        for name in UPSTREAM_IMAGES:
            pull_all(RegistryClient(running.address), *name.split(":"))
        with upstreams.off():
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
def tools(short_folder: Path, mirror: RegistryServer, upstreams: TwoRegistries) -> ContainerTools:
    return tools_for(mirror, upstreams, short_folder)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("ubuntu:18.04", "bionic amd64"),
        ("{mirror}/ubuntu:18.04", "bionic amd64"),
        ("{mirror}/docker.io/library/ubuntu:18.04", "bionic amd64"),
        ("{mirror}/far.example/library/ubuntu:18.04", "far amd64"),
        ("{mirror}/org/app:1", "org/app"),
        ("org/app:1", "org/app"),
    ],
)
def test_docker(docker: DockerEngine, mirror: RegistryServer, name: str, output: str) -> None:
    """dockerd pulls images of Docker Hub by their usual names, through the setting `registry-mirrors`. It pulls other
    images by names with the mirror's address. All pulled images run."""
    name = name.format(mirror=mirror.address)
    docker("pull", "--quiet", name)
    assert docker.output_of(name) == f"{output}\n"
    docker.remove_image(name)


def test_docker_by_digest(docker: DockerEngine, upstreams: TwoRegistries) -> None:
    """docker shows the upstream's digest of the image, and can pull by this digest."""
    digest = upstreams.hub.content.repositories["library/ubuntu"].tags["18.04"]
    docker("pull", "--quiet", "ubuntu:18.04")
    assert docker.inspect("ubuntu:18.04")["RepoDigests"] == [f"ubuntu@{digest}"]
    docker.remove_image("ubuntu:18.04")
    docker("pull", "--quiet", f"ubuntu@{digest}")
    assert docker.output_of(f"ubuntu@{digest}") == "bionic amd64\n"
    docker.remove_image(f"ubuntu@{digest}")


def test_containerd(short_folder: Path, tmp_path: Path, mirror: RegistryServer, upstreams: TwoRegistries) -> None:
    """containerd pulls a repository with the same path from two upstreams, which it names with `?ns=`. It gets the
    bytes of the named upstream."""
    certs = tmp_path / "certs.d"
    for upstream in ("docker.io", "far.example"):
        (certs / upstream).mkdir(parents=True)
        hosts = upstreams.client_settings(mirror, "containerd", "--upstream", upstream)
        (certs / upstream / "hosts.toml").write_text(hosts)
    folder = Path(tempfile.mkdtemp(prefix="c", dir=short_folder))
    with running_containerd(folder) as ctr:
        for upstream, registry in {"docker.io": upstreams.hub, "far.example": upstreams.second}.items():
            name = f"{upstream}/library/ubuntu:18.04"
            ctr("images", "pull", "--hosts-dir", str(certs), "--snapshotter", "native", name)
            repository_content = registry.content.repositories["library/ubuntu"]
            assert repository_content.tags["18.04"] in ctr("images", "ls", f"name=={name}").out
            amd64 = json.loads(repository_content.manifests[repository_content.tags["18.04"]][0])["manifests"][0][
                "digest"
            ]
            assert ctr("content", "get", amd64).out.encode() == repository_content.manifests[amd64][0]
            assert {
                each["digest"] for each in json.loads(repository_content.manifests[amd64][0])["layers"]
            } <= ctr.stored_digests()
            ctr.forget(name)


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("docker.io/library/ubuntu:18.04", "bionic amd64"),
        ("docker.io/org/app:1", "org/app"),
        ("far.example/library/ubuntu:18.04", "far amd64"),
        ("{mirror}/ubuntu:18.04", "bionic amd64"),
    ],
)
def test_podman(tools: ContainerTools, mirror: RegistryServer, name: str, output: str) -> None:
    """podman pulls images of all upstreams by their usual names, through registries.conf, and by names with the
    mirror's address."""
    name = name.format(mirror=mirror.address)
    tools.podman("pull", "--quiet", name)
    assert tools.output_of(name) == f"{output}\n"


def test_buildah(tools: ContainerTools) -> None:
    """buildah pulls an image of the upstream and runs a command in it."""
    container = tools.buildah("from", "--quiet", "docker.io/library/ubuntu:18.04").out.split()[-1]
    output = tools.buildah("run", "--isolation", "chroot", container, "/bin/cat", "/greeting").out
    assert output == "bionic amd64\n"
    tools.buildah("rm", container)


def test_skopeo(tools: ContainerTools, upstreams: TwoRegistries, tmp_path: Path) -> None:
    """skopeo copies an index with all platforms. The copy has the same bytes as the upstream."""
    tools.skopeo("copy", "--quiet", "--all", "docker://docker.io/library/ubuntu:18.04", f"dir:{tmp_path / 'copy'}")
    repository_content = upstreams.hub.content.repositories["library/ubuntu"]
    files = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()}
    assert files["manifest.json"] == repository_content.manifests[repository_content.tags["18.04"]][0]
    for digest, blob in repository_content.blobs.items():
        assert files[digest.partition(":")[2]] == blob.read()


def test_hosted_image_on_a_mirror(
    docker: DockerEngine, tools: ContainerTools, mirror: RegistryServer, upstreams: TwoRegistries, is_on: bool
) -> None:
    """docker pushes an image to a repository that is not mirrored, and podman pulls it. The upstream gets no request
    for this repository."""
    path = f"team/{'on' if is_on else 'off'}"
    name = f"{mirror.address}/{path}:1"
    docker.load(image(f"hello from {path}"), name)
    docker("push", name)
    tools.podman("pull", "--quiet", INSECURE, name)
    assert tools.output_of(name) == f"hello from {path}\n"
    docker.remove_image(name)
    assert not [request for request in upstreams.hub.read() if path in request]


def test_cached_tag_has_a_warning_while_the_upstream_is_off(mirror: RegistryServer, is_on: bool) -> None:
    """While the upstream is off, the response for a cached tag has a Warning header. While the upstream is on, the
    response has none."""
    wire = RegistryClient(mirror.address)
    for reply in (wire.ask("HEAD", "/v2/library/ubuntu/manifests/18.04"), wire.manifest("library/ubuntu", "18.04")):
        warning = reply.headers["Warning"]
        assert reply.status == 200
        assert warning is None if is_on else warning.startswith('299 - "docker.io/library/ubuntu:18.04 is served as')
