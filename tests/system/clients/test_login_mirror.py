"""Tests with real clients and a mirror with accounts. Everyone may pull Docker Hub's official images. All other
mirrored content needs a grant (a right of an account)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.clients.container_tools import INSECURE
from tests.fakes.clients.containerd_daemon import Containerd
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.member_site import WRONG, ClientLogin, SiteWithAccounts, logged_out, tools_logged_out
from tests.fakes.clients.mirror_clients import TwoRegistries, docker_for, tools_for, two_registries
from tests.fakes.commands import entrepot_output
from tests.fakes.server_process import RegistryServer

HUB = "https://index.docker.io/v1/"
"""The key of the login for Docker Hub in docker's config.json."""
HUB_LOGINS: list[dict[str, Any]] = [
    {},
    {"auth": ClientLogin("someone", "a password at Hub").encoded},
    {"auth": ClientLogin("a.name_that-is-none.", "a password at Hub").encoded},
    {"auth": ClientLogin("someone", "").encoded, "identitytoken": "a-refresh-token-of-hub"},
]
"""No login for Docker Hub, and logins for Docker Hub that are not valid at the mirror."""


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRegistries]:
    """Runs the two upstreams of the mirror. Both are real registries."""
    with two_registries(tmp_path_factory.mktemp("upstreams")) as running:
        yield running


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory, upstreams: TwoRegistries) -> Iterator[SiteWithAccounts]:
    """Runs a mirror from which everyone may pull Docker Hub's official images. Other repositories of Docker Hub, and
    another upstream, need a grant."""
    folder = tmp_path_factory.mktemp("mirror")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    with upstreams.mirror(folder) as running:
        site = SiteWithAccounts(running, folder)
        site.allow_everyone("docker.io/library/**")
        yield site


@pytest.fixture(scope="module")
def docker(short_folder: Path, mirror: SiteWithAccounts) -> Iterator[DockerEngine]:
    with docker_for(mirror.server, short_folder) as running:
        yield running


def docker_with(docker: DockerEngine, folder: Path, **logins: dict[str, Any]) -> DockerEngine:
    """Returns a docker command with these logins in its config.json."""
    (folder / "config.json").write_text(json.dumps({"auths": {key: entry for key, entry in logins.items() if entry}}))
    return logged_out(docker, folder)


@pytest.mark.parametrize("hub_login", HUB_LOGINS, ids=["none", "password", "odd name", "refresh token"])
def test_docker_pulls_public_images_with_a_docker_hub_login(
    docker: DockerEngine, tmp_path: Path, hub_login: dict[str, Any]
) -> None:
    """docker sends its login for Docker Hub to every mirror. This login is not valid at Entrepot, but docker can still
    pull images that everyone may pull."""
    my_client = docker_with(docker, tmp_path, **{HUB: hub_login})
    for _ in range(4):  # often enough to reach both workers
        my_client("pull", "--quiet", "ubuntu:18.04")
        assert my_client.output_of("ubuntu:18.04") == "bionic amd64\n"
        my_client.remove_image("ubuntu:18.04")


@pytest.mark.parametrize("hub_login", HUB_LOGINS, ids=["none", "password", "odd name", "refresh token"])
def test_docker_cannot_pull_images_that_need_a_grant(
    docker: DockerEngine, mirror: SiteWithAccounts, upstreams: TwoRegistries, tmp_path: Path, hub_login: dict[str, Any]
) -> None:
    """An image that needs a grant cannot be pulled with a login for Docker Hub, whether or not the image is cached. The
    mirror does not request it from the upstream."""
    mirror.client().manifest("far.example/library/ubuntu", "18.04")
    requests_before = upstreams.hub.read() + upstreams.second.read()
    my_client = docker_with(docker, tmp_path, **{HUB: hub_login})
    for name in ("org/app:1", f"{mirror.address}/org/app:1", f"{mirror.address}/far.example/library/ubuntu:18.04"):
        assert my_client.call.attempt("pull", name).code != 0
    assert upstreams.hub.read() + upstreams.second.read() == requests_before


def test_docker_with_an_api_token_as_its_docker_hub_login(
    docker: DockerEngine, mirror: SiteWithAccounts, tmp_path: Path
) -> None:
    """If docker's login for Docker Hub is replaced by an API token of this registry, docker can pull repositories of
    Docker Hub that need a grant."""
    robot = mirror.add_robot({"docker.io/org/**": "pull"})
    my_client = docker_with(docker, tmp_path, **{HUB: {"auth": robot.encoded}})
    my_client("pull", "--quiet", "org/app:1")
    assert my_client.output_of("org/app:1") == "org/app\n"
    my_client.remove_image("org/app:1")
    mirror.call_ok("PATCH", f"/robots/{robot.name}", {"enabled": False})
    assert my_client.call.attempt("pull", "org/app:1").code != 0
    my_client("pull", "--quiet", "ubuntu:18.04")
    my_client.remove_image("ubuntu:18.04")


def test_docker_logged_in_at_the_mirror(docker: DockerEngine, mirror: SiteWithAccounts, tmp_path: Path) -> None:
    """At the mirror's own address, each account can pull only the repositories for which it has a grant."""
    login = mirror.add_user({"docker.io/org/**": "pull,push", "far.example/**": "pull"})
    my_client = docker_with(docker, tmp_path)
    my_client.call("login", mirror.address, "-u", login.name, "--password-stdin", stdin_text=login.secret)
    for name, output in {"org/app:1": "org/app", "far.example/library/ubuntu:18.04": "far amd64"}.items():
        my_client("pull", "--quiet", f"{mirror.address}/{name}")
        assert my_client.output_of(f"{mirror.address}/{name}") == f"{output}\n"
        my_client.remove_image(f"{mirror.address}/{name}")
    other = mirror.add_user({"docker.io/org/**": "pull"})
    my_client.call("login", mirror.address, "-u", other.name, "--password-stdin", stdin_text=other.secret)
    refused = my_client.call.attempt("pull", f"{mirror.address}/far.example/library/ubuntu:18.04")
    assert "manifest unknown" in refused.err


def test_podman(short_folder: Path, mirror: SiteWithAccounts, upstreams: TwoRegistries, tmp_path: Path) -> None:
    """podman and skopeo are set up with `entrepot client`. They send the login for the mirror's address to the mirror,
    also when they pull by the upstream's name."""
    my_client = tools_logged_out(tools_for(mirror.server, upstreams, short_folder), tmp_path)
    my_client.podman("pull", "--quiet", "docker.io/library/ubuntu:18.04")
    assert my_client.output_of("docker.io/library/ubuntu:18.04") == "bionic amd64\n"
    for name in ("docker.io/org/app:1", "far.example/library/ubuntu:18.04"):
        assert my_client.podman.attempt("pull", name).code != 0
    login = mirror.add_user({"docker.io/**": "pull", "far.example/**": "pull"})
    my_client.podman("login", INSECURE, "-u", login.name, "--password-stdin", mirror.address, stdin_text=login.secret)
    for name, output in {"docker.io/org/app:1": "org/app", "far.example/library/ubuntu:18.04": "far amd64"}.items():
        my_client.podman("pull", "--quiet", name)
        assert my_client.output_of(name) == f"{output}\n"
        my_client.skopeo("copy", "--quiet", f"docker://{name}", f"dir:{tmp_path / output.partition('/')[0]}")


def hosts_dir(mirror: RegistryServer, upstreams: TwoRegistries, folder: Path) -> tuple[str, str]:
    """Writes the output of `entrepot client` for containerd into a folder, and returns the option of ctr for this
    folder."""
    for upstream in ("docker.io", "far.example"):
        (folder / upstream).mkdir(parents=True)
        printed = upstreams.client_settings(mirror, "containerd", "--upstream", upstream)
        (folder / upstream / "hosts.toml").write_text(printed)
    return "--hosts-dir", str(folder)


def test_containerd(ctr: Containerd, mirror: SiteWithAccounts, upstreams: TwoRegistries, tmp_path: Path) -> None:
    """Two upstreams have a repository with the same path, and containerd names the upstream with `?ns=`. The rights for
    the named upstream apply."""
    pull = ("images", "pull", "--snapshotter", "native", *hosts_dir(mirror.server, upstreams, tmp_path / "certs.d"))
    hub, far = (f"{upstream}/library/ubuntu:18.04" for upstream in ("docker.io", "far.example"))
    with_grant, without_grant = mirror.add_user({"far.example/**": "pull"}), mirror.add_user()

    def user_option(login: ClientLogin) -> tuple[str, str]:
        return "--user", f"{login.name}:{login.secret}"

    ctr(*pull, hub)
    ctr(*pull, *user_option(ClientLogin("someone", WRONG)), hub)
    ctr(*pull, *user_option(with_grant), far)
    far_ubuntu = upstreams.second.content.repositories["library/ubuntu"]
    assert far_ubuntu.tags["18.04"] in ctr("images", "ls", f"name=={far}").out
    ctr.forget(hub, far)
    for login in ((), user_option(without_grant), user_option(ClientLogin("someone", WRONG))):
        assert ctr.call.attempt(*pull, *login, far).code != 0
        assert ctr.call.attempt(*pull, *login, "docker.io/org/app:1").code != 0
