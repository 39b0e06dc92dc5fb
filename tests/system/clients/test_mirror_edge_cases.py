"""Tests of special cases of a mirror, with real clients and a real upstream: logins for another registry, one platform
of an index, referrers, lists of tags, tags that move, and refused pushes."""

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
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRegistries]:
    """The two real registries of which the mirror is a mirror."""
    with two_registries(tmp_path_factory.mktemp("upstreams")) as running:
        yield running


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory, upstreams: TwoRegistries) -> Iterator[RegistryServer]:
    """A mirror without accounts and without cached content, which all tests of this module share."""
    with upstreams.mirror(tmp_path_factory.mktemp("mirror")) as running:
        yield running


@pytest.fixture(scope="module")
def wire(mirror: RegistryServer) -> RegistryClient:
    return RegistryClient(mirror.address)


@pytest.fixture(scope="module")
def docker(short_folder: Path, mirror: RegistryServer) -> Iterator[DockerEngine]:
    with docker_for(mirror, short_folder) as running:
        yield running


@pytest.fixture
def tools(short_folder: Path, mirror: RegistryServer, upstreams: TwoRegistries) -> ContainerTools:
    return tools_for(mirror, upstreams, short_folder)


def test_docker_with_a_login_at_hub(docker: DockerEngine, mirror: RegistryServer, tmp_path: Path) -> None:
    """A docker that is logged in at Docker Hub can pull through the mirror."""
    login = base64.b64encode(b"somebody:secret").decode()
    logins = {"auths": {"https://index.docker.io/v1/": {"auth": login}, mirror.address: {"auth": login}}}
    (tmp_path / "config.json").write_text(json.dumps(logins))
    for name in ("ubuntu:18.04", f"{mirror.address}/org/app:1"):
        docker("--config", str(tmp_path), "pull", "--quiet", name)
        docker.remove_image(name)


@pytest.mark.parametrize("header", [f"Basic {base64.b64encode(b'somebody:secret').decode()}", "Bearer of-docker-hub"])
def test_login_is_ignored_without_accounts(wire: RegistryClient, header: str) -> None:
    """If the registry has no accounts, it ignores a login."""
    for path in ("/v2/", "/v2/library/ubuntu/manifests/18.04"):
        assert wire.ask("GET", path, headers={"Authorization": header}).status == 200


def test_one_platform_of_many(docker: DockerEngine, mirror: RegistryServer, upstreams: TwoRegistries) -> None:
    """When docker pulls an index, the mirror fetches only the manifests and blobs that docker needs, each once. It does
    not prefetch the other platform."""
    images = {
        architecture: image(
            f"many {architecture}",
            *[layer({"file": noise(f"many {architecture} {number}", MIB)}) for number in range(3)],
            architecture=architecture,
        )
        for architecture in ("amd64", "arm64")
    }
    both = index(*[(each, architecture) for architecture, each in images.items()])
    upstreams.hub.add("org/many", image_tree_of(both), "1")
    name = f"{mirror.address}/org/many:1"
    docker("pull", "--quiet", name)
    assert docker.output_of(name) == "many amd64\n"
    docker.remove_image(name)
    # The two images have a layer in common. The mirror may have it already, because another test has pulled it.
    amd64_requests = requests("org/many", images["amd64"]) - requests("org/many", images["arm64"])
    wait_until(lambda: amd64_requests <= set(upstreams.hub.read()), 30, lambda: f"requests: {upstreams.hub.read()}")
    counts = upstreams.hub.read()
    assert {request: counts[request] for request in amd64_requests} == dict.fromkeys(amd64_requests, 1)
    assert not set(counts) & (requests("org/many", images["arm64"]) - requests("org/many", images["amd64"]))


def requests(repo: str, fetched_image: ClientImage) -> set[str]:
    """Returns the requests with which a client or a mirror fetches all manifests and blobs of the image."""
    manifests = {f"GET /v2/{repo}/manifests/{digest}" for digest in fetched_image.manifests}
    return manifests | {f"GET /v2/{repo}/blobs/{digest}" for digest in fetched_image.blobs}


def test_referrers(wire: RegistryClient, upstreams: TwoRegistries) -> None:
    """The upstream lists a signature under the fallback tag of its subject. The mirror's referrers API lists the
    signature, and the signature can be pulled completely."""
    subject = image("signed")
    signature = artifact(subject, "a signature", "application/vnd.example.signature")
    signed = upstreams.hub.add("org/signed", image_tree_of(subject), "1")
    pushed_signature = upstreams.hub.add("org/signed", image_tree_of(signature))
    upstreams.hub.add("org/signed", fallback_index(pushed_signature), fallback_tag(signed.digest))
    reply = wire.ask("GET", f"/v2/org/signed/referrers/{signed.digest}")
    assert reply.status == 200
    assert reply.json()["manifests"] == [referrer_descriptor(pushed_signature.body, pushed_signature.media_type)]
    assert pull_all(wire, "org/signed", pushed_signature.digest) == {pushed_signature.digest, *pushed_signature.blobs}


@pytest.mark.parametrize("name", ["org/listed", "docker.io/org/listed"])
def test_list_of_tags(tools: ContainerTools, mirror: RegistryServer, upstreams: TwoRegistries, name: str) -> None:
    """The mirror lists all tags of the upstream in order, including tags that were never pulled."""
    upstreams.hub.add("org/listed", image_tree_of(image("listed")), "b", "a", "v10", "v9")
    listed = tools.skopeo("list-tags", INSECURE, f"docker://{mirror.address}/{name}").out
    assert json.loads(listed)["Tags"] == ["a", "b", "v10", "v9"]


def test_a_tag_that_moves(docker: DockerEngine, upstreams: TwoRegistries, tmp_path: Path) -> None:
    """While the upstream is off, docker gets the image at which the tag pointed before. After the upstream is on again,
    docker gets the image at which the tag points now, and can pull new tags."""
    old, new = (image_tree_of(image(f"the {age} one")) for age in ("old", "new"))
    upstreams.hub.add("org/moving", old, "1")
    # After an upstream was off, the mirror does not use it for a while. So this test has its own mirror.
    with upstreams.mirror(tmp_path) as server:
        name = f"{server.address}/org/moving"

        def pulled(tag: str) -> str:
            docker("pull", "--quiet", f"{name}:{tag}")
            output = docker.output_of(f"{name}:{tag}")
            docker.remove_image(f"{name}:{tag}")
            return output

        assert pulled("1") == "the old one\n"
        with upstreams.off():
            assert pulled("1") == "the old one\n"
            upstreams.hub.content.add("org/moving", new, "1", "2")
        wire = RegistryClient(server.address)
        wait_until(lambda: wire.digest("org/moving", "1") == new.digest, 60, server.log_text)
        assert pulled("1") == "the new one\n"
        assert pulled("2") == "the new one\n"


@pytest.mark.parametrize("path", ["library/ubuntu", "docker.io/library/ubuntu", "far.example/team/app"])
def test_a_push_to_a_mirrored_name(docker: DockerEngine, mirror: RegistryServer, path: str) -> None:
    """A push to the name of a mirrored repository is refused. docker shows the reason, and a name that can be used."""
    name = f"{mirror.address}/{path}:mine"
    docker.load(image("mine"), name)
    refused = docker.call.attempt("push", name)
    docker.remove_image(name)
    upstream = "far.example" if path.startswith("far") else "docker.io"
    assert refused.code != 0
    assert refused.err.splitlines()[-1] == (
        f"denied: {path} is mirrored from {upstream} and takes no pushes; "
        "push under a name of your own, such as team/app"
    )
