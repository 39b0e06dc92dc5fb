"""Tests with podman, skopeo and buildah, and a registry that has accounts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.fakes.client_images import MIB, ClientImage, image, layer, noise, write_layout
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.cutting_proxy import cutting_proxy
from tests.fakes.clients.member_site import WRONG, ClientLogin, SiteWithAccounts, tools_logged_out
from tests.fakes.clients.programs import ForeignProgram, ProgramResult
from tests.fakes.clients.registry_client import assert_same_files, assert_same_image

from .test_podman import loaded


@pytest.fixture
def my_tools(tools: ContainerTools, tmp_path: Path) -> ContainerTools:
    """Returns podman, skopeo and buildah without any stored login. They store logins in one shared file."""
    return tools_logged_out(tools, tmp_path)


def attempt_login(program: ForeignProgram, address: str, login: ClientLogin) -> ProgramResult:
    return program.attempt("login", INSECURE, "-u", login.name, "--password-stdin", address, stdin_text=login.secret)


def refused(program: ForeignProgram, *args: str) -> str:
    """Runs a command that must fail. Returns its error."""
    result = program.attempt(*args)
    assert result.code != 0, result.text
    return result.err


def without_times(error: str) -> str:
    """Returns an error without the times of its lines, so that the errors of two commands can be compared."""
    return re.sub(r'^time="[^"]*"', "", error, flags=re.MULTILINE)


def test_login_push_pull_and_logout(
    my_tools: ContainerTools, site: SiteWithAccounts, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """After `podman login`, podman, skopeo and buildah can push and pull. After `podman logout`, all three are
    refused."""
    name = f"{site.address}/{repo}/app"
    loaded(my_tools, small_image, name, tmp_path / "in")
    assert "unauthorized" in refused(my_tools.podman, "push", INSECURE, name)
    login = site.add_user({f"{repo}/**": "pull,push"})
    assert "Login Succeeded" in attempt_login(my_tools.podman, site.address, login).demand().out
    my_tools.podman("push", INSECURE, name)
    assert_same_files(site.client(), f"{repo}/app", "latest", small_image)
    my_tools.podman("rmi", "--force", my_tools.image_id(name))
    my_tools.podman("pull", INSECURE, name)
    assert my_tools.output_of(name) == f"hello from {repo}\n"
    my_tools.copy(f"docker://{name}", f"docker://{name}:copied")
    container = my_tools.buildah("from", "--quiet", INSECURE, f"{name}:copied").out.split()[-1]
    my_tools.buildah("config", "--label", "made=by buildah", container)
    my_tools.buildah("commit", "--quiet", "--rm", container, f"{name}:built")
    my_tools.buildah("push", INSECURE, f"{name}:built")
    assert site.client().tags(f"{repo}/app") == ["built", "copied", "latest"]
    my_tools.podman("logout", site.address)
    error = f"unauthorized: log in to pull from {repo}/app"
    assert error in refused(my_tools.podman, "pull", INSECURE, f"{name}:copied")
    assert error in refused(my_tools.buildah, "pull", "--policy", "always", INSECURE, f"{name}:copied")
    assert "log in to pull" in refused(my_tools.skopeo, "inspect", INSECURE, f"docker://{name}")


def test_bad_logins(my_tools: ContainerTools, site: SiteWithAccounts) -> None:
    """podman, skopeo and buildah show the same error for a wrong password as for a missing account. They store no
    login."""
    wrong_password, missing_account = ClientLogin(site.add_user().name, WRONG), ClientLogin(site.name("nobody"), WRONG)
    for program in (my_tools.podman, my_tools.skopeo, my_tools.buildah):
        failed, also_failed = (attempt_login(program, site.address, bad) for bad in (wrong_password, missing_account))
        assert failed.code == also_failed.code != 0
        assert "invalid username/password" in failed.err
        assert without_times(failed.err) == without_times(also_failed.err)
    assert site.address not in Path(my_tools.podman.env["REGISTRY_AUTH_FILE"]).read_text()


def test_anonymous_pull(
    my_tools: ContainerTools, site: SiteWithAccounts, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """podman pulls a public image without a login, and skopeo lists its tags with the login of an account without
    rights."""
    site.client().push(f"{repo}/open", "1", small_image)
    site.allow_everyone(f"{repo}/open")
    name = f"{site.address}/{repo}/open:1"
    my_tools.podman("pull", INSECURE, name)
    assert my_tools.output_of(name) == f"hello from {repo}\n"
    my_tools.copy(f"docker://{name}", f"oci:{tmp_path / 'out'}:1")
    attempt_login(my_tools.skopeo, site.address, site.add_user()).demand()
    assert json.loads(my_tools.skopeo("list-tags", INSECURE, f"docker://{site.address}/{repo}/open").out)["Tags"] == [
        "1"
    ]
    assert "denied" in refused(my_tools.podman, "push", INSECURE, name)


def test_denied(
    my_tools: ContainerTools, site: SiteWithAccounts, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """If an account may not push to a repository, the errors of podman and skopeo name the account and the repository.
    A repository from which the account may not pull looks like a missing one."""
    login = site.add_user({f"{repo}/read": "pull"})
    for path in ("read", "private"):
        site.client().push(f"{repo}/{path}", "1", small_image)
    test_image, credentials = image(f"another {repo}"), f"{login.name}:{login.secret}"
    loaded(my_tools, test_image, "localhost/denied", tmp_path / "in")
    name = f"docker://{site.address}/{repo}"
    for path in ("read", "private", "new"):
        error = f"denied: {login.name} may not push to {repo}/{path}"
        assert error in refused(
            my_tools.podman, "push", INSECURE, "--creds", credentials, "localhost/denied", f"{name}/{path}:2"
        )
        copy = ("copy", "--dest-tls-verify=false", "--dest-creds", credentials, f"oci:{tmp_path / 'in'}:x")
        assert error in refused(my_tools.skopeo, *copy, f"{name}/{path}:2")
    for program, command, tag, error in (
        (my_tools.podman, "pull", ":1", f"manifest unknown: {repo}/new has no manifest 1"),
        (my_tools.skopeo, "list-tags", "", "404"),
    ):
        private, missing = (
            refused(program, command, INSECURE, "--creds", credentials, f"{name}/{path}{tag}")
            for path in ("private", "new")
        )
        assert error in missing
        assert without_times(private).replace(f"{repo}/private", f"{repo}/new") == without_times(missing)
    deleted = refused(my_tools.skopeo, "delete", INSECURE, "--creds", credentials, f"{name}/read:1")
    assert f"{login.name} may not delete from {repo}/read" in deleted
    assert site.client().tags(f"{repo}/read") == ["1"]


def test_skopeo_copy_mounts_layers(my_tools: ContainerTools, site: SiteWithAccounts, repo: str, tmp_path: Path) -> None:
    """When skopeo copies an image between two repositories, the registry mounts the layers if the login may pull from
    the source. Otherwise skopeo has to send the layers."""
    test_image = image("mounted", layer({"heavy": noise(repo, 4 * MIB)}))
    write_layout(tmp_path / "in", {"x": test_image})
    source_reader = site.add_user({f"{repo}/one": "pull,push", f"{repo}/two": "pull,push"})
    other = site.add_user({f"{repo}/three": "pull,push"})
    with cutting_proxy(site.address) as proxy:
        name = f"docker://{proxy.address}/{repo}"
        credentials = f"{source_reader.name}:{source_reader.secret}"
        my_tools.copy(f"oci:{tmp_path / 'in'}:x", f"{name}/one:1", "--dest-creds", credentials)
        sent_before = proxy.sent
        my_tools.copy(f"{name}/one:1", f"{name}/two:1", "--src-creds", credentials, "--dest-creds", credentials)
        assert proxy.sent - sent_before < 64 * 1024
        assert_same_image(site.client(), f"{repo}/two", "1", test_image)
        my_tools.copy(f"oci:{tmp_path / 'in'}:x", f"{name}/three:1", "--dest-creds", f"{other.name}:{other.secret}")
        assert proxy.sent - sent_before > 4 * MIB
        assert_same_image(site.client(), f"{repo}/three", "1", test_image)


def test_a_robot_logs_in_until_it_is_disabled(
    my_tools: ContainerTools, site: SiteWithAccounts, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """skopeo can use a robot's API token as its password. After the robot (an account for a program) is disabled, the
    next command is refused."""
    robot, name = site.add_robot({f"{repo}/**": "pull,push"}), f"docker://{site.address}/{repo}/app:1"
    write_layout(tmp_path / "in", {"x": small_image})
    attempt_login(my_tools.skopeo, site.address, robot).demand()
    my_tools.copy(f"oci:{tmp_path / 'in'}:x", name)
    site.call_ok("PATCH", f"/robots/{robot.name}", {"enabled": False})
    for _ in range(4):  # often enough to reach both workers
        assert "credentials are not valid" in refused(my_tools.skopeo, "inspect", INSECURE, name)
        assert "credentials are not valid" in refused(my_tools.podman, "pull", INSECURE, name)
    assert "invalid username/password" in attempt_login(my_tools.podman, site.address, robot).err


def test_skopeo_uses_the_identity_token_of_docker(
    my_tools: ContainerTools, site: SiteWithAccounts, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """skopeo reads the identity token that `docker login` has stored in a config.json, and exchanges it for bearer
    tokens by POST."""
    login, name = site.add_user({f"{repo}/**": "pull,push"}), f"docker://{site.address}/{repo}/app:1"
    write_layout(tmp_path / "in", {"x": small_image})
    query = f"/token?service=entrepot&offline_token=true&client_id=tests&account={login.name}"
    refresh = site.client(login).ask("GET", query).json()["refresh_token"]
    stored_login = {"auth": ClientLogin(login.name, "").encoded, "identitytoken": refresh}
    Path(my_tools.skopeo.env["REGISTRY_AUTH_FILE"]).write_text(json.dumps({"auths": {site.address: stored_login}}))
    my_tools.copy(f"oci:{tmp_path / 'in'}:x", name)
    assert_same_image(site.client(), f"{repo}/app", "1", small_image)
    site.command("token", "revoke", refresh.split("_")[1])  # the second part of the token is its id
    assert "credentials are not valid" in refused(my_tools.skopeo, "inspect", INSECURE, name)
