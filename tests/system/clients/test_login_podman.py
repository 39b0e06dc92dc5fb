"""podman, skopeo and buildah with a registry that has accounts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fakes.client_images import MIB, ClientImage, image, layer, noise, write_layout
from tests.fakes.clients.container_tools import INSECURE, ContainerTools
from tests.fakes.clients.cutting_proxy import cutting_proxy
from tests.fakes.clients.member_site import WRONG, ClientLogin, MemberSite, tools_logged_out
from tests.fakes.clients.programs import ForeignProgram, ProgramResult
from tests.fakes.clients.registry_client import assert_same_files, assert_same_image

from .test_podman import loaded


@pytest.fixture
def mine(tools: ContainerTools, tmp_path: Path) -> ContainerTools:
    """The three programs of a person without any login. They share their logins."""
    return tools_logged_out(tools, tmp_path)


def attempt_login(program: ForeignProgram, address: str, login: ClientLogin) -> ProgramResult:
    return program.attempt("login", INSECURE, "-u", login.name, "--password-stdin", address, given=login.secret)


def refused(program: ForeignProgram, *args: str) -> str:
    """Returns the error of a command that must fail."""
    done = program.attempt(*args)
    assert done.code != 0, done.text
    return done.err


def test_login_push_pull_and_logout(
    mine: ContainerTools, club: MemberSite, repo: str, fresh: ClientImage, tmp_path: Path
) -> None:
    """skopeo and buildah use podman's login until the logout."""
    name = f"{club.address}/{repo}/app"
    loaded(mine, fresh, name, tmp_path / "in")
    assert "unauthorized" in refused(mine.podman, "push", INSECURE, name)
    login = club.person({f"{repo}/**": "pull,push"})
    assert "Login Succeeded" in attempt_login(mine.podman, club.address, login).demand().out
    mine.podman("push", INSECURE, name)
    assert_same_files(club.wire(), f"{repo}/app", "latest", fresh)
    mine.podman("rmi", "--force", mine.image_id(name))
    mine.podman("pull", INSECURE, name)
    assert mine.output_of(name) == f"hello from {repo}\n"
    mine.copy(f"docker://{name}", f"docker://{name}:copied")
    container = mine.buildah("from", "--quiet", INSECURE, f"{name}:copied").out.split()[-1]
    mine.buildah("config", "--label", "made=by buildah", container)
    mine.buildah("commit", "--quiet", "--rm", container, f"{name}:built")
    mine.buildah("push", INSECURE, f"{name}:built")
    assert club.wire().tags(f"{repo}/app") == ["built", "copied", "latest"]
    mine.podman("logout", club.address)
    words = f"unauthorized: log in to pull from {repo}/app"
    assert words in refused(mine.podman, "pull", INSECURE, f"{name}:copied")
    assert words in refused(mine.buildah, "pull", "--policy", "always", INSECURE, f"{name}:copied")
    assert "log in to pull" in refused(mine.skopeo, "inspect", INSECURE, f"docker://{name}")


def test_bad_logins(mine: ContainerTools, club: MemberSite) -> None:
    """All three show the same error for a wrong password and for a missing account. No login is stored."""
    login = club.person()
    for bad in (ClientLogin(login.name, WRONG), ClientLogin(club.name("nobody"), WRONG)):
        for program in (mine.podman, mine.skopeo, mine.buildah):
            failed = attempt_login(program, club.address, bad)
            assert failed.code != 0
            assert "invalid username/password" in failed.err
    assert club.address not in Path(mine.podman.env["REGISTRY_AUTH_FILE"]).read_text()


def test_anonymous_pull(mine: ContainerTools, club: MemberSite, repo: str, fresh: ClientImage, tmp_path: Path) -> None:
    """They pull public images without a login, and with the login of an account that has no rights."""
    club.wire().push(f"{repo}/open", "1", fresh)
    club.allow_everyone(f"{repo}/open")
    name = f"{club.address}/{repo}/open:1"
    mine.podman("pull", INSECURE, name)
    assert mine.output_of(name) == f"hello from {repo}\n"
    mine.copy(f"docker://{name}", f"oci:{tmp_path / 'out'}:1")
    attempt_login(mine.skopeo, club.address, club.person()).demand()
    assert json.loads(mine.skopeo("list-tags", INSECURE, f"docker://{club.address}/{repo}/open").out)["Tags"] == ["1"]
    assert "denied" in refused(mine.podman, "push", INSECURE, name)


def test_denied(mine: ContainerTools, club: MemberSite, repo: str, fresh: ClientImage, tmp_path: Path) -> None:
    """If an account may not push, the error of all three names the account and the repository. A repository from which
    the account may not pull looks like a missing one."""
    login = club.person({f"{repo}/read": "pull"})
    for path in ("read", "private"):
        club.wire().push(f"{repo}/{path}", "1", fresh)
    made, who = image(f"another {repo}"), f"{login.name}:{login.secret}"
    loaded(mine, made, "localhost/denied", tmp_path / "in")
    name = f"docker://{club.address}/{repo}"
    for path in ("read", "private", "new"):
        words = f"denied: {login.name} may not push to {repo}/{path}"
        assert words in refused(mine.podman, "push", INSECURE, "--creds", who, "localhost/denied", f"{name}/{path}:2")
        copy = ("copy", "--dest-tls-verify=false", "--dest-creds", who, f"oci:{tmp_path / 'in'}:x")
        assert words in refused(mine.skopeo, *copy, f"{name}/{path}:2")
    for path in ("private", "new"):
        pulled = refused(mine.podman, "pull", INSECURE, "--creds", who, f"{name}/{path}:1")
        assert f"manifest unknown: {repo}/{path} has no manifest 1" in pulled
        assert "404" in refused(mine.skopeo, "list-tags", INSECURE, "--creds", who, f"{name}/{path}")
    deleted = refused(mine.skopeo, "delete", INSECURE, "--creds", who, f"{name}/read:1")
    assert f"{login.name} may not delete from {repo}/read" in deleted
    assert club.wire().tags(f"{repo}/read") == ["1"]


def test_a_copy_between_repositories_mounts(mine: ContainerTools, club: MemberSite, repo: str, tmp_path: Path) -> None:
    """skopeo mounts layers from a repository from which the login may pull, and sends none. From another repository it
    cannot mount, and sends the layers."""
    made = image("mounted", layer({"heavy": noise(repo, 4 * MIB)}))
    write_layout(tmp_path / "in", {"x": made})
    both = club.person({f"{repo}/one": "pull,push", f"{repo}/two": "pull,push"})
    other = club.person({f"{repo}/three": "pull,push"})
    with cutting_proxy(club.address) as line:
        name = f"docker://{line.address}/{repo}"
        who = f"{both.name}:{both.secret}"
        mine.copy(f"oci:{tmp_path / 'in'}:x", f"{name}/one:1", "--dest-creds", who)
        sent = line.sent
        mine.copy(f"{name}/one:1", f"{name}/two:1", "--src-creds", who, "--dest-creds", who)
        assert line.sent - sent < 64 * 1024
        assert_same_image(club.wire(), f"{repo}/two", "1", made)
        mine.copy(f"oci:{tmp_path / 'in'}:x", f"{name}/three:1", "--dest-creds", f"{other.name}:{other.secret}")
        assert line.sent - sent > 4 * MIB
        assert_same_image(club.wire(), f"{repo}/three", "1", made)


def test_a_robot_logs_in_until_it_is_disabled(
    mine: ContainerTools, club: MemberSite, repo: str, fresh: ClientImage, tmp_path: Path
) -> None:
    """An API token works as the password. After the robot was disabled, the next command is refused."""
    robot, name = club.machine({f"{repo}/**": "pull,push"}), f"docker://{club.address}/{repo}/app:1"
    write_layout(tmp_path / "in", {"x": fresh})
    attempt_login(mine.skopeo, club.address, robot).demand()
    mine.copy(f"oci:{tmp_path / 'in'}:x", name)
    club.done("PATCH", f"/robots/{robot.name}", {"enabled": False})
    for _ in range(4):  # on either worker
        assert "credentials are not valid" in refused(mine.skopeo, "inspect", INSECURE, name)
        assert "credentials are not valid" in refused(mine.podman, "pull", INSECURE, name)
    assert "invalid username/password" in attempt_login(mine.podman, club.address, robot).err


def test_a_token_that_docker_keeps(
    mine: ContainerTools, club: MemberSite, repo: str, fresh: ClientImage, tmp_path: Path
) -> None:
    """skopeo reads the identity token of a `docker login` from a config.json, and exchanges it for tokens by POST."""
    login, name = club.person({f"{repo}/**": "pull,push"}), f"docker://{club.address}/{repo}/app:1"
    write_layout(tmp_path / "in", {"x": fresh})
    query = f"/token?service=entrepot&offline_token=true&client_id=tests&account={login.name}"
    refresh = club.wire(login).ask("GET", query).json()["refresh_token"]
    kept = {"auth": ClientLogin(login.name, "").encoded, "identitytoken": refresh}
    Path(mine.skopeo.env["REGISTRY_AUTH_FILE"]).write_text(json.dumps({"auths": {club.address: kept}}))
    mine.copy(f"oci:{tmp_path / 'in'}:x", name)
    assert_same_image(club.wire(), f"{repo}/app", "1", fresh)
    club.command("token", "revoke", refresh.split("_")[1])
    assert "credentials are not valid" in refused(mine.skopeo, "inspect", INSECURE, name)
