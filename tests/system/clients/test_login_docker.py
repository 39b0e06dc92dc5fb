"""docker, with a real dockerd, and a registry that has accounts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.client_images import MIB, ClientImage, image, layer, noise
from tests.fakes.clients.cutting_proxy import CuttingProxy, cutting_proxy
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.member_site import WRONG, ClientLogin, MemberSite, logged_out
from tests.fakes.clients.programs import ProgramResult
from tests.fakes.clients.registry_client import assert_same_files

INVALID = "unauthorized: the credentials are not valid"


@pytest.fixture
def me(docker: DockerEngine, tmp_path: Path) -> DockerEngine:
    """A docker command without any login."""
    (tmp_path / "me").mkdir()
    return logged_out(docker, tmp_path / "me")


@pytest.fixture
def you(docker: DockerEngine, tmp_path: Path) -> DockerEngine:
    """The docker command of another person."""
    (tmp_path / "you").mkdir()
    return logged_out(docker, tmp_path / "you")


def attempt_login(docker: DockerEngine, address: str, login: ClientLogin) -> ProgramResult:
    """Runs `echo SECRET | docker login ADDRESS -u NAME --password-stdin`, as CI jobs do."""
    return docker.call.attempt("login", address, "-u", login.name, "--password-stdin", given=f"{login.secret}\n")


def log_in(docker: DockerEngine, address: str, login: ClientLogin) -> None:
    assert "Login Succeeded" in attempt_login(docker, address, login).demand().out


def refused(docker: DockerEngine, *args: str) -> str:
    """Returns the error of docker for a command that must fail."""
    done = docker.call.attempt(*args)
    assert done.code != 0, done.text
    return done.err


def kept(docker: DockerEngine, address: str) -> dict[str, Any]:
    """Returns what config.json contains for the registry."""
    config = json.loads((Path(docker.call.env["DOCKER_CONFIG"]) / "config.json").read_text())
    found: dict[str, Any] = config["auths"].get(address, {})
    return found


def test_login_and_logout(me: DockerEngine, club: MemberSite, repo: str, fresh: ClientImage) -> None:
    """After a login docker pushes and pulls. After the logout it is refused."""
    login, name = club.person({f"{repo}/**": "pull,push"}), f"{club.address}/{repo}/app:1"
    me.load(fresh, name)
    assert f"unauthorized: log in to push to {repo}/app" in refused(me, "push", name)
    log_in(me, club.address, login)
    me("push", name)
    assert_same_files(club.wire(), f"{repo}/app", "1", fresh)
    me.forget(name)
    me("pull", name)
    assert me.output_of(name) == f"hello from {repo}\n"
    me("logout", club.address)
    me.forget(name)
    assert f"unauthorized: log in to pull from {repo}/app" in refused(me, "pull", name)


def test_bad_logins(me: DockerEngine, club: MemberSite) -> None:
    """A wrong password, a missing account and an invalid name fail with the same error."""
    login = club.person()
    said = set()
    for bad in (
        ClientLogin(login.name, WRONG),
        ClientLogin(club.name("nobody"), WRONG),
        ClientLogin("Nobody At All", WRONG),
    ):
        failed = attempt_login(me, club.address, bad)
        assert failed.code == 1, failed.text
        said.add(failed.err.strip())
    assert said == {f'Error response from daemon: Get "http://{club.address}/v2/": {INVALID}'}
    assert not (Path(me.call.env["DOCKER_CONFIG"]) / "config.json").exists()


def test_anonymous_pull_beside_authenticated_push(
    me: DockerEngine, you: DockerEngine, club: MemberSite, repo: str, fresh: ClientImage
) -> None:
    """One person pushes with a login. Another one pulls without a login, and may not push."""
    name = f"{club.address}/{repo}/open:1"
    log_in(me, club.address, club.person({f"{repo}/**": "pull,push"}))
    club.allow_everyone(f"{repo}/open")
    me.load(fresh, name)
    me("push", name)
    me.forget(name)
    you("pull", name)
    assert you.output_of(name) == f"hello from {repo}\n"
    assert f"unauthorized: log in to push to {repo}/open" in refused(you, "push", name)
    me.load(fresh, f"{club.address}/{repo}/closed:1")
    me("push", f"{club.address}/{repo}/closed:1")
    you.forget(name)
    assert "unauthorized: log in to pull" in refused(you, "pull", f"{club.address}/{repo}/closed:1")


def test_denied_push(me: DockerEngine, club: MemberSite, repo: str, fresh: ClientImage) -> None:
    """If an account may not push, docker's error names the account and the repository, whether or not the repository
    exists. Nothing is stored."""
    login, name = club.person({f"{repo}/read": "pull"}), f"{club.address}/{repo}"
    club.wire().push(f"{repo}/read", "1", fresh)
    other = image(f"another {repo}")
    log_in(me, club.address, login)
    for path in ("read", "hidden", "new"):
        me.load(other, f"{name}/{path}:2")
        said = refused(me, "push", f"{name}/{path}:2")
        assert said.splitlines()[-1] == f"denied: {login.name} may not push to {repo}/{path}"
    assert club.wire().tags(f"{repo}/read") == ["1"]
    assert club.wire().ask("GET", f"/v2/{repo}/new/tags/list").status == 404


def test_a_private_image_looks_as_if_it_were_not_there(
    me: DockerEngine, you: DockerEngine, club: MemberSite, repo: str, fresh: ClientImage
) -> None:
    """For an account without the right to pull, docker shows the same error for a private image as for a missing one.
    Without a login, it says to log in."""
    club.wire().push(f"{repo}/private", "1", fresh)
    log_in(me, club.address, club.person({"elsewhere/**": "pull,push"}))
    for path in ("private", "none"):
        name = f"{club.address}/{repo}/{path}:1"
        assert refused(me, "pull", name).strip() == (
            f"Error response from daemon: manifest for {name} not found: "
            f"manifest unknown: {repo}/{path} has no manifest 1"
        )
        assert refused(you, "pull", name).strip() == (
            f"Error response from daemon: unauthorized: log in to pull from {repo}/{path}"
        )


def test_a_robot_logs_in_until_its_token_is_revoked(
    me: DockerEngine, club: MemberSite, repo: str, fresh: ClientImage
) -> None:
    """A robot logs in with an API token. After the token was revoked, docker's next command is refused, and so is a new
    login."""
    robot, name = club.machine({f"{repo}/**": "pull,push"}), f"{club.address}/{repo}/app:1"
    log_in(me, club.address, robot)
    assert kept(me, club.address) == {"auth": robot.encoded}
    me.load(fresh, name)
    me("push", name)
    club.command("token", "revoke", robot.secret.split("_")[1])
    for _ in range(4):  # on either worker
        assert INVALID in refused(me, "push", name)
        assert INVALID in refused(me, "pull", name)
        assert INVALID in attempt_login(me, club.address, robot).err


def test_a_disabled_account(me: DockerEngine, club: MemberSite, repo: str, fresh: ClientImage) -> None:
    """After an account was disabled, the next command is refused, although docker has stored a login. A new login is
    refused as well. After the account was enabled again, docker can log in with the same password."""
    login, name = club.person({f"{repo}/**": "pull,push"}), f"{club.address}/{repo}/app:1"
    log_in(me, club.address, login)
    me.load(fresh, name)
    me("push", name)
    club.command("user", "disable", login.name)
    for _ in range(4):
        assert INVALID in refused(me, "push", name)
        assert INVALID in refused(me, "pull", name)
    assert INVALID in attempt_login(me, club.address, login).err
    club.command("user", "enable", login.name)
    log_in(me, club.address, login)
    me("push", name)


def test_docker_keeps_no_password(me: DockerEngine, club: MemberSite, repo: str, fresh: ClientImage) -> None:
    """After a login with a password, config.json has a token and not the password. docker pushes with this token, which
    can be listed and revoked like any other."""
    login, name = club.person({f"{repo}/**": "pull,push"}), f"{club.address}/{repo}/app:1"
    log_in(me, club.address, login)
    found = kept(me, club.address)
    assert found == {"auth": ClientLogin(login.name, "").encoded, "identitytoken": found["identitytoken"]}
    (listed,) = json.loads(club.command("token", "list", login.name, "--json"))
    assert (listed["id"], listed["purpose"]) == (found["identitytoken"].split("_")[1], "login")
    assert "docker" in listed["note"]
    me.load(fresh, name)
    me("push", name)
    club.command("token", "revoke", listed["id"])
    assert INVALID in refused(me, "push", name)
    log_in(me, club.address, login)
    me("push", name)


def test_another_password_ends_the_logins(me: DockerEngine, club: MemberSite, repo: str, fresh: ClientImage) -> None:
    """After a new password was set, the login that docker has stored is refused, and so is the old password."""
    login, name = club.person({f"{repo}/**": "pull,push"}), f"{club.address}/{repo}/app:1"
    log_in(me, club.address, login)
    me.load(fresh, name)
    me("push", name)
    club.command("user", "password", login.name, "--password-file", "-", given="another password\n")
    assert INVALID in refused(me, "push", name)
    assert INVALID in attempt_login(me, club.address, login).err
    log_in(me, club.address, ClientLogin(login.name, "another password"))
    me("push", name)


@pytest.fixture
def proxy(club: MemberSite) -> Iterator[CuttingProxy]:
    """A proxy in front of the registry that counts bytes."""
    with cutting_proxy(club.address) as running:
        yield running


def test_mounts(me: DockerEngine, you: DockerEngine, club: MemberSite, proxy: CuttingProxy, repo: str) -> None:
    """docker mounts layers from a repository from which it may pull. Layers of any other repository are not mounted but
    sent, and docker does not learn that they exist."""
    made = image("mount", layer({"heavy": noise(repo, 4 * MIB)}))
    first, second, third = (f"{proxy.address}/{repo}/{path}" for path in ("one", "two", "three"))
    log_in(me, proxy.address, club.person({f"{repo}/**": "pull,push"}))
    me.load(made, first)
    me("push", first)
    sent = proxy.sent
    me("tag", first, second)
    assert me("push", second).out.count(f"Mounted from {repo}/one") == len(made.layers)
    assert proxy.sent - sent < 64 * 1024
    log_in(you, proxy.address, club.person({f"{repo}/three": "pull,push"}))
    you("tag", first, third)
    assert "Mounted" not in you("push", third).out
    assert proxy.sent - sent > 4 * MIB
    assert_same_files(club.wire(), f"{repo}/three", "latest", made)
