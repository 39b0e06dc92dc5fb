"""Real clients and a mirror with accounts: everyone may pull some of the mirrored content, and not the rest."""

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
from tests.fakes.clients.member_site import WRONG, ClientLogin, MemberSite, logged_out, tools_logged_out
from tests.fakes.clients.mirror_clients import TwoRegistries, docker_for, tools_for, two_registries
from tests.fakes.commands import entrepot_output
from tests.fakes.server_process import RegistryServer

HUB = "https://index.docker.io/v1/"
"""Where docker keeps its login for Docker Hub."""
STRAY: list[dict[str, Any]] = [
    {},
    {"auth": ClientLogin("someone", "a password at Hub").encoded},
    {"auth": ClientLogin("a.name_that-is-none.", "a password at Hub").encoded},
    {"auth": ClientLogin("someone", "").encoded, "identitytoken": "a-refresh-token-of-hub"},
]


@pytest.fixture(scope="module")
def beyond(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRegistries]:
    with two_registries(tmp_path_factory.mktemp("upstreams")) as running:
        yield running


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory, beyond: TwoRegistries) -> Iterator[MemberSite]:
    """A mirror from which everyone may pull Docker Hub's official images. Other repositories of Docker Hub, and another
    upstream, need a grant."""
    folder = tmp_path_factory.mktemp("mirror")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, given=PASSWORD)
    with beyond.mirror(folder) as running:
        club = MemberSite(running, folder)
        club.allow_everyone("docker.io/library/**")
        yield club


@pytest.fixture(scope="module")
def docker(short_folder: Path, mirror: MemberSite) -> Iterator[DockerEngine]:
    with docker_for(mirror.server, short_folder) as running:
        yield running


def me(docker: DockerEngine, folder: Path, **logins: dict[str, Any]) -> DockerEngine:
    """A docker command with these logins."""
    (folder / "config.json").write_text(json.dumps({"auths": {place: kept for place, kept in logins.items() if kept}}))
    return logged_out(docker, folder)


@pytest.mark.parametrize("stray", STRAY, ids=["none", "password", "odd name", "refresh token"])
def test_docker_shows_a_mirror_its_login_at_hub(docker: DockerEngine, tmp_path: Path, stray: dict[str, Any]) -> None:
    """docker sends its login for Docker Hub to every mirror. The login is not valid here, and docker can still pull
    what everyone may pull."""
    mine = me(docker, tmp_path, **{HUB: stray})
    for _ in range(4):  # on either worker
        mine("pull", "--quiet", "ubuntu:18.04")
        assert mine.output_of("ubuntu:18.04") == "bionic amd64\n"
        mine.forget("ubuntu:18.04")


@pytest.mark.parametrize("stray", STRAY, ids=["none", "password", "odd name", "refresh token"])
def test_docker_is_told_nothing_of_the_rest(
    docker: DockerEngine, mirror: MemberSite, beyond: TwoRegistries, tmp_path: Path, stray: dict[str, Any]
) -> None:
    """An image that needs a grant cannot be pulled with this login, whether or not it is cached, and is not requested
    from the upstream."""
    mirror.wire().manifest("far.example/library/ubuntu", "18.04")
    before = beyond.hub.read() + beyond.far.read()
    mine = me(docker, tmp_path, **{HUB: stray})
    for name in ("org/app:1", f"{mirror.address}/org/app:1", f"{mirror.address}/far.example/library/ubuntu:18.04"):
        assert mine.call.attempt("pull", name).code != 0
    assert beyond.hub.read() + beyond.far.read() == before


def test_docker_shows_a_mirror_a_login_that_counts(docker: DockerEngine, mirror: MemberSite, tmp_path: Path) -> None:
    """If docker has an API token of this registry in place of its login for Docker Hub, it can pull repositories of
    Docker Hub that need a grant."""
    robot = mirror.machine({"docker.io/org/**": "pull"})
    mine = me(docker, tmp_path, **{HUB: {"auth": robot.encoded}})
    mine("pull", "--quiet", "org/app:1")
    assert mine.output_of("org/app:1") == "org/app\n"
    mine.forget("org/app:1")
    mirror.done("PATCH", f"/robots/{robot.name}", {"enabled": False})
    assert mine.call.attempt("pull", "org/app:1").code != 0
    mine("pull", "--quiet", "ubuntu:18.04")
    mine.forget("ubuntu:18.04")


def test_docker_logged_in_at_the_mirror(docker: DockerEngine, mirror: MemberSite, tmp_path: Path) -> None:
    """At the mirror's own address, each person pulls with their own login. Nobody can push there."""
    login = mirror.person({"docker.io/org/**": "pull,push", "far.example/**": "pull"})
    mine = me(docker, tmp_path)
    mine.call("login", mirror.address, "-u", login.name, "--password-stdin", given=login.secret)
    for name, said in {"org/app:1": "org/app", "far.example/library/ubuntu:18.04": "far amd64"}.items():
        mine("pull", "--quiet", f"{mirror.address}/{name}")
        assert mine.output_of(f"{mirror.address}/{name}") == f"{said}\n"
        mine.forget(f"{mirror.address}/{name}")
    other = mirror.person({"docker.io/org/**": "pull"})
    mine.call("login", mirror.address, "-u", other.name, "--password-stdin", given=other.secret)
    refused = mine.call.attempt("pull", f"{mirror.address}/far.example/library/ubuntu:18.04")
    assert "manifest unknown" in refused.err


def test_podman(short_folder: Path, mirror: MemberSite, beyond: TwoRegistries, tmp_path: Path) -> None:
    """podman and skopeo, set up with `entrepot client`, send to a mirror their login for its address."""
    mine = tools_logged_out(tools_for(mirror.server, beyond, short_folder), tmp_path)
    mine.podman("pull", "--quiet", "docker.io/library/ubuntu:18.04")
    assert mine.output_of("docker.io/library/ubuntu:18.04") == "bionic amd64\n"
    for name in ("docker.io/org/app:1", "far.example/library/ubuntu:18.04"):
        assert mine.podman.attempt("pull", name).code != 0
    login = mirror.person({"docker.io/**": "pull", "far.example/**": "pull"})
    mine.podman("login", INSECURE, "-u", login.name, "--password-stdin", mirror.address, given=login.secret)
    for name, said in {"docker.io/org/app:1": "org/app", "far.example/library/ubuntu:18.04": "far amd64"}.items():
        mine.podman("pull", "--quiet", name)
        assert mine.output_of(name) == f"{said}\n"
        mine.skopeo("copy", "--quiet", f"docker://{name}", f"dir:{tmp_path / said.partition('/')[0]}")


def hosts_dir(mirror: RegistryServer, beyond: TwoRegistries, folder: Path) -> tuple[str, str]:
    """Writes the output of `entrepot client` for containerd where ctr looks for it."""
    for upstream in ("docker.io", "far.example"):
        (folder / upstream).mkdir(parents=True)
        printed = beyond.printed(mirror, "containerd", "--upstream", upstream)
        (folder / upstream / "hosts.toml").write_text(printed)
    return "--hosts-dir", str(folder)


def test_containerd(ctr: Containerd, mirror: MemberSite, beyond: TwoRegistries, tmp_path: Path) -> None:
    """The same path exists at two upstreams, and only `?ns=` tells them apart. The rights of the named upstream
    count."""
    pull = ("images", "pull", "--snapshotter", "native", *hosts_dir(mirror.server, beyond, tmp_path / "certs.d"))
    hub, far = (f"{upstream}/library/ubuntu:18.04" for upstream in ("docker.io", "far.example"))
    some, none = mirror.person({"far.example/**": "pull"}), mirror.person()

    def logged_in(login: ClientLogin) -> tuple[str, str]:
        return "--user", f"{login.name}:{login.secret}"

    ctr(*pull, hub)
    ctr(*pull, *logged_in(ClientLogin("someone", WRONG)), hub)
    ctr(*pull, *logged_in(some), far)
    held = beyond.far.content.repositories["library/ubuntu"]
    assert held.tags["18.04"] in ctr("images", "ls", f"name=={far}").out
    ctr.forget(hub, far)
    for login in ((), logged_in(none), logged_in(ClientLogin("someone", WRONG))):
        assert ctr.call.attempt(*pull, *login, far).code != 0
        assert ctr.call.attempt(*pull, *login, "docker.io/org/app:1").code != 0
