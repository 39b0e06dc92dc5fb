"""Special cases of a mirror of a real registry: stray logins, one platform of many, referrers, lists, tags that move,
and pushes that are refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.client_images import MIB, ClientImage, artifact, image, index, layer, noise
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.mirror_clients import TwoRegistries, docker_for, tools_for, two_registries
from tests.fakes.clients.programs import wait_until
from tests.fakes.clients.registry_client import RegistryClient, pull_all
from tests.fakes.server_process import RegistryServer
from tests.fakes.upstream_content import fallback_index, fallback_tag, image_tree_of, referrer_descriptor


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRegistries]:
    with two_registries(tmp_path_factory.mktemp("upstreams")) as running:
        yield running


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory, beyond: TwoRegistries) -> Iterator[RegistryServer]:
    with beyond.mirror(tmp_path_factory.mktemp("mirror")) as running:
        yield running


@pytest.fixture(scope="module")
def wire(mirror: RegistryServer) -> RegistryClient:
    return RegistryClient(mirror.address)


@pytest.fixture(scope="module")
def docker(short_folder: Path, mirror: RegistryServer) -> Iterator[DockerEngine]:
    with docker_for(mirror, short_folder) as running:
        yield running


@pytest.fixture
def tools(short_folder: Path, mirror: RegistryServer, beyond: TwoRegistries) -> ContainerTools:
    return tools_for(mirror, beyond, short_folder)


def test_docker_with_a_login_at_hub(docker: DockerEngine, mirror: RegistryServer, tmp_path: Path) -> None:
    """A docker that is logged in at Docker Hub can pull through the mirror."""
    login = base64.b64encode(b"somebody:secret").decode()
    logins = {"auths": {"https://index.docker.io/v1/": {"auth": login}, mirror.address: {"auth": login}}}
    (tmp_path / "config.json").write_text(json.dumps(logins))
    for name in ("ubuntu:18.04", f"{mirror.address}/org/app:1"):
        docker("--config", str(tmp_path), "pull", "--quiet", name)
        docker.forget(name)


@pytest.mark.parametrize("header", [f"Basic {base64.b64encode(b'somebody:secret').decode()}", "Bearer of-docker-hub"])
def test_a_stray_login(wire: RegistryClient, header: str) -> None:
    """If the registry has no accounts, a login is neither used nor refused."""
    for path in ("/v2/", "/v2/library/ubuntu/manifests/18.04"):
        assert wire.ask("GET", path, headers={"Authorization": header}).status == 200


def test_one_platform_of_many(docker: DockerEngine, mirror: RegistryServer, beyond: TwoRegistries) -> None:
    """Of an index, only the content that docker requests is fetched from the upstream, once. The mirror prefetches no
    other platform."""
    held = {
        architecture: image(
            f"many {architecture}",
            *[layer({"file": noise(f"many {architecture} {number}", MIB)}) for number in range(3)],
            architecture=architecture,
        )
        for architecture in ("amd64", "arm64")
    }
    both = index(*[(each, architecture) for architecture, each in held.items()])
    beyond.hub.add("org/many", image_tree_of(both), "1")
    name = f"{mirror.address}/org/many:1"
    docker("pull", "--quiet", name)
    assert docker.output_of(name) == "many amd64\n"
    docker.forget(name)
    # The two have a layer in common, which is here already if another test pulled it.
    wanted = requests("org/many", held["amd64"]) - requests("org/many", held["arm64"])
    wait_until(lambda: wanted <= set(beyond.hub.read()), 30, lambda: f"asked for: {beyond.hub.read()}")
    seen = beyond.hub.read()
    assert {asked: seen[asked] for asked in wanted} == dict.fromkeys(wanted, 1)
    assert not set(seen) & (requests("org/many", held["arm64"]) - requests("org/many", held["amd64"]))


def requests(repo: str, of: ClientImage) -> set[str]:
    """Returns the requests that fetch an image."""
    manifests = {f"GET /v2/{repo}/manifests/{digest}" for digest in of.manifests}
    return manifests | {f"GET /v2/{repo}/blobs/{digest}" for digest in of.blobs}


def test_referrers(wire: RegistryClient, beyond: TwoRegistries) -> None:
    """A signature that the upstream has under its fallback tag is listed by the referrers API, and can be pulled
    completely."""
    subject = image("signed")
    signature = artifact(subject, "a signature", "application/vnd.example.signature")
    signed = beyond.hub.add("org/signed", image_tree_of(subject), "1")
    made = beyond.hub.add("org/signed", image_tree_of(signature))
    beyond.hub.add("org/signed", fallback_index(made), fallback_tag(signed.digest))
    reply = wire.ask("GET", f"/v2/org/signed/referrers/{signed.digest}")
    assert reply.status == 200
    assert reply.json()["manifests"] == [referrer_descriptor(made.body, made.media_type)]
    assert pull_all(wire, "org/signed", made.digest) == {made.digest, *made.blobs}


@pytest.mark.parametrize("name", ["org/listed", "docker.io/org/listed"])
def test_list_of_tags(tools: ContainerTools, mirror: RegistryServer, beyond: TwoRegistries, name: str) -> None:
    """All tags of the upstream are listed, in order, also those that were never pulled."""
    beyond.hub.add("org/listed", image_tree_of(image("listed")), "b", "a", "v10", "v9")
    listed = tools.skopeo("list-tags", INSECURE, f"docker://{mirror.address}/{name}").out
    assert json.loads(listed)["Tags"] == ["a", "b", "v10", "v9"]


def test_a_tag_that_moves(docker: DockerEngine, beyond: TwoRegistries, tmp_path: Path) -> None:
    """While the upstream is off, docker pulls what the tag pointed at before. When it is on again, docker pulls what
    the tag points at now, and new tags."""
    old, new = (image_tree_of(image(f"the {age} one")) for age in ("old", "new"))
    beyond.hub.add("org/moving", old, "1")
    # A mirror of its own: it takes a while to trust an upstream that was off.
    with beyond.mirror(tmp_path) as server:
        name = f"{server.address}/org/moving"

        def pulled(tag: str) -> str:
            docker("pull", "--quiet", f"{name}:{tag}")
            said = docker.output_of(f"{name}:{tag}")
            docker.forget(f"{name}:{tag}")
            return said

        assert pulled("1") == "the old one\n"
        with beyond.off():
            assert pulled("1") == "the old one\n"
            beyond.hub.content.add("org/moving", new, "1", "2")
        wire = RegistryClient(server.address)
        wait_until(lambda: wire.digest("org/moving", "1") == new.digest, 60, server.log_text)
        assert pulled("1") == "the new one\n"
        assert pulled("2") == "the new one\n"


@pytest.mark.parametrize("path", ["library/ubuntu", "docker.io/library/ubuntu", "far.example/team/app"])
def test_a_push_to_a_mirrored_name(docker: DockerEngine, mirror: RegistryServer, path: str) -> None:
    """docker shows why the push is refused, and what to do instead."""
    name = f"{mirror.address}/{path}:mine"
    docker.load(image("mine"), name)
    refused = docker.call.attempt("push", name)
    docker.forget(name)
    upstream = "far.example" if path.startswith("far") else "docker.io"
    assert refused.code != 0
    assert refused.err.splitlines()[-1] == (
        f"denied: {path} is mirrored from {upstream} and takes no pushes; "
        "push under a name of your own, such as team/app"
    )
