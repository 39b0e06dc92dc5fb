"""Tests with docker, a real dockerd, and a registry that has accounts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.client_images import MIB, ClientImage, image, layer, noise
from tests.fakes.clients.cutting_proxy import CuttingProxy, cutting_proxy
from tests.fakes.clients.docker_engine import DockerEngine
from tests.fakes.clients.member_site import WRONG, ClientLogin, SiteWithAccounts, logged_out
from tests.fakes.clients.programs import ProgramResult
from tests.fakes.clients.registry_client import assert_same_files

LOGIN_ERROR = "unauthorized: the credentials are not valid"


@pytest.fixture
def my_docker(docker: DockerEngine, tmp_path: Path) -> DockerEngine:
    """Returns a docker command without any stored login."""
    (tmp_path / "me").mkdir()
    return logged_out(docker, tmp_path / "me")


@pytest.fixture
def other_docker(docker: DockerEngine, tmp_path: Path) -> DockerEngine:
    """Returns the docker command of another person, who also has no stored login."""
    (tmp_path / "you").mkdir()
    return logged_out(docker, tmp_path / "you")


def attempt_login(docker: DockerEngine, address: str, login: ClientLogin) -> ProgramResult:
    """Runs `echo SECRET | docker login ADDRESS -u NAME --password-stdin`, as CI jobs do."""
    return docker.call.attempt("login", address, "-u", login.name, "--password-stdin", stdin_text=f"{login.secret}\n")


def log_in(docker: DockerEngine, address: str, login: ClientLogin) -> None:
    assert "Login Succeeded" in attempt_login(docker, address, login).demand().out


def refused(docker: DockerEngine, *args: str) -> str:
    """Runs a docker command that must fail. Returns its error."""
    result = docker.call.attempt(*args)
    assert result.code != 0, result.text
    return result.err


def stored_login(docker: DockerEngine, address: str) -> dict[str, Any]:
    """Returns the entry of docker's config.json for the registry."""
    config = json.loads((Path(docker.call.env["DOCKER_CONFIG"]) / "config.json").read_text())
    found: dict[str, Any] = config["auths"].get(address, {})
    return found


def test_login_and_logout(my_docker: DockerEngine, site: SiteWithAccounts, repo: str, small_image: ClientImage) -> None:
    """After a login, docker can push and pull. Before the login and after the logout, it is refused."""
    login, name = site.add_user({f"{repo}/**": "pull,push"}), f"{site.address}/{repo}/app:1"
    my_docker.load(small_image, name)
    assert f"unauthorized: log in to push to {repo}/app" in refused(my_docker, "push", name)
    log_in(my_docker, site.address, login)
    my_docker("push", name)
    assert_same_files(site.client(), f"{repo}/app", "1", small_image)
    my_docker.remove_image(name)
    my_docker("pull", name)
    assert my_docker.output_of(name) == f"hello from {repo}\n"
    my_docker("logout", site.address)
    my_docker.remove_image(name)
    assert f"unauthorized: log in to pull from {repo}/app" in refused(my_docker, "pull", name)


def test_bad_logins(my_docker: DockerEngine, site: SiteWithAccounts) -> None:
    """A wrong password, a missing account and an invalid name fail with the same error."""
    login = site.add_user()
    errors = set()
    for bad in (
        ClientLogin(login.name, WRONG),
        ClientLogin(site.name("nobody"), WRONG),
        ClientLogin("Nobody At All", WRONG),
    ):
        failed = attempt_login(my_docker, site.address, bad)
        assert failed.code == 1, failed.text
        errors.add(failed.err.strip())
    assert errors == {f'Error response from daemon: Get "http://{site.address}/v2/": {LOGIN_ERROR}'}
    assert not (Path(my_docker.call.env["DOCKER_CONFIG"]) / "config.json").exists()


def test_push_with_a_login_and_pull_without(
    my_docker: DockerEngine, other_docker: DockerEngine, site: SiteWithAccounts, repo: str, small_image: ClientImage
) -> None:
    """One person pushes an image with a login. Another person can pull it without a login, because everyone may pull
    it, but cannot push."""
    name = f"{site.address}/{repo}/open:1"
    log_in(my_docker, site.address, site.add_user({f"{repo}/**": "pull,push"}))
    site.allow_everyone(f"{repo}/open")
    my_docker.load(small_image, name)
    my_docker("push", name)
    my_docker.remove_image(name)
    other_docker("pull", name)
    assert other_docker.output_of(name) == f"hello from {repo}\n"
    assert f"unauthorized: log in to push to {repo}/open" in refused(other_docker, "push", name)
    my_docker.load(small_image, f"{site.address}/{repo}/closed:1")
    my_docker("push", f"{site.address}/{repo}/closed:1")
    other_docker.remove_image(name)
    assert "unauthorized: log in to pull" in refused(other_docker, "pull", f"{site.address}/{repo}/closed:1")


def test_denied_push(my_docker: DockerEngine, site: SiteWithAccounts, repo: str, small_image: ClientImage) -> None:
    """If an account may not push to a repository, docker's error names the account and the repository, whether or not
    the repository exists. The registry stores nothing."""
    login, name = site.add_user({f"{repo}/read": "pull"}), f"{site.address}/{repo}"
    for path in ("read", "hidden"):
        site.client().push(f"{repo}/{path}", "1", small_image)
    other = image(f"another {repo}")
    log_in(my_docker, site.address, login)
    for path in ("read", "hidden", "new"):
        my_docker.load(other, f"{name}/{path}:2")
        error = refused(my_docker, "push", f"{name}/{path}:2")
        assert error.splitlines()[-1] == f"denied: {login.name} may not push to {repo}/{path}"
    assert site.client().tags(f"{repo}/read") == site.client().tags(f"{repo}/hidden") == ["1"]
    assert site.client().ask("GET", f"/v2/{repo}/new/tags/list").status == 404


def test_private_image_looks_like_a_missing_one(
    my_docker: DockerEngine, other_docker: DockerEngine, site: SiteWithAccounts, repo: str, small_image: ClientImage
) -> None:
    """For an account without the right to pull, docker shows the same error for a private image as for a missing one.
    Without a login, the error is that a login is needed."""
    site.client().push(f"{repo}/private", "1", small_image)
    log_in(my_docker, site.address, site.add_user({"elsewhere/**": "pull,push"}))
    for path in ("private", "none"):
        name = f"{site.address}/{repo}/{path}:1"
        assert refused(my_docker, "pull", name).strip() == (
            f"Error response from daemon: manifest for {name} not found: "
            f"manifest unknown: {repo}/{path} has no manifest 1"
        )
        assert refused(other_docker, "pull", name).strip() == (
            f"Error response from daemon: unauthorized: log in to pull from {repo}/{path}"
        )


def test_a_robot_logs_in_until_its_token_is_revoked(
    my_docker: DockerEngine, site: SiteWithAccounts, repo: str, small_image: ClientImage
) -> None:
    """A robot (an account for a program) logs in with an API token. After the token is revoked, docker's next command
    is refused, and so is a new login."""
    robot, name = site.add_robot({f"{repo}/**": "pull,push"}), f"{site.address}/{repo}/app:1"
    log_in(my_docker, site.address, robot)
    assert stored_login(my_docker, site.address) == {"auth": robot.encoded}
    my_docker.load(small_image, name)
    my_docker("push", name)
    site.command("token", "revoke", robot.secret.split("_")[1])  # the second part of an API token is its id
    for _ in range(4):  # often enough to reach both workers
        assert LOGIN_ERROR in refused(my_docker, "push", name)
        assert LOGIN_ERROR in refused(my_docker, "pull", name)
        assert LOGIN_ERROR in attempt_login(my_docker, site.address, robot).err


def test_a_disabled_account(
    my_docker: DockerEngine, site: SiteWithAccounts, repo: str, small_image: ClientImage
) -> None:
    """After an account is disabled, docker's next command is refused, although docker has stored a login. A new login
    is refused as well. After the account is enabled again, docker can log in with the same password."""
    login, name = site.add_user({f"{repo}/**": "pull,push"}), f"{site.address}/{repo}/app:1"
    log_in(my_docker, site.address, login)
    my_docker.load(small_image, name)
    my_docker("push", name)
    site.command("user", "disable", login.name)
    for _ in range(4):  # often enough to reach both workers
        assert LOGIN_ERROR in refused(my_docker, "push", name)
        assert LOGIN_ERROR in refused(my_docker, "pull", name)
    assert LOGIN_ERROR in attempt_login(my_docker, site.address, login).err
    site.command("user", "enable", login.name)
    log_in(my_docker, site.address, login)
    my_docker("push", name)


def test_docker_stores_a_token_instead_of_the_password(
    my_docker: DockerEngine, site: SiteWithAccounts, repo: str, small_image: ClientImage
) -> None:
    """After a login with a password, docker's config.json has a token instead of the password. docker pushes with this
    token. The account's owner can list and revoke it like any other API token."""
    login, name = site.add_user({f"{repo}/**": "pull,push"}), f"{site.address}/{repo}/app:1"
    log_in(my_docker, site.address, login)
    stored = stored_login(my_docker, site.address)
    assert stored == {"auth": ClientLogin(login.name, "").encoded, "identitytoken": stored["identitytoken"]}
    (listed,) = json.loads(site.command("token", "list", login.name, "--json"))
    assert (listed["id"], listed["purpose"]) == (stored["identitytoken"].split("_")[1], "login")
    assert "docker" in listed["note"]
    my_docker.load(small_image, name)
    my_docker("push", name)
    site.command("token", "revoke", listed["id"])
    assert LOGIN_ERROR in refused(my_docker, "push", name)
    log_in(my_docker, site.address, login)
    my_docker("push", name)


def test_new_password_ends_stored_logins(
    my_docker: DockerEngine, site: SiteWithAccounts, repo: str, small_image: ClientImage
) -> None:
    """After the account gets a new password, the login that docker has stored is refused, and so is the old
    password."""
    login, name = site.add_user({f"{repo}/**": "pull,push"}), f"{site.address}/{repo}/app:1"
    log_in(my_docker, site.address, login)
    my_docker.load(small_image, name)
    my_docker("push", name)
    site.command("user", "password", login.name, "--password-file", "-", stdin_text="another password\n")
    assert LOGIN_ERROR in refused(my_docker, "push", name)
    assert LOGIN_ERROR in attempt_login(my_docker, site.address, login).err
    log_in(my_docker, site.address, ClientLogin(login.name, "another password"))
    my_docker("push", name)


@pytest.fixture
def proxy(site: SiteWithAccounts) -> Iterator[CuttingProxy]:
    """Runs a proxy in front of the registry. The proxy counts the sent bytes."""
    with cutting_proxy(site.address) as running:
        yield running


def test_mounts(
    my_docker: DockerEngine, other_docker: DockerEngine, site: SiteWithAccounts, proxy: CuttingProxy, repo: str
) -> None:
    """If the login may pull from a repository, the registry mounts its layers in another repository. If not, docker has
    to send the layers, and does not learn that the registry has them."""
    test_image = image("mount", layer({"heavy": noise(repo, 4 * MIB)}))
    first, second, third = (f"{proxy.address}/{repo}/{path}" for path in ("one", "two", "three"))
    log_in(my_docker, proxy.address, site.add_user({f"{repo}/**": "pull,push"}))
    my_docker.load(test_image, first)
    my_docker("push", first)
    sent_before = proxy.sent
    my_docker("tag", first, second)
    # On a busy machine, docker does not print the state of every layer.
    assert f"Mounted from {repo}/one" in my_docker("push", second).out
    assert proxy.sent - sent_before < 64 * 1024
    log_in(other_docker, proxy.address, site.add_user({f"{repo}/three": "pull,push"}))
    other_docker("tag", first, third)
    assert "Mounted" not in other_docker("push", third).out
    assert proxy.sent - sent_before > 4 * MIB
    assert_same_files(site.client(), f"{repo}/three", "latest", test_image)
