"""containerd with a registry that has accounts."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.client_images import MIB, ClientImage, image, layer, noise
from tests.fakes.clients.containerd_daemon import Containerd
from tests.fakes.clients.cutting_proxy import cutting_proxy
from tests.fakes.clients.member_site import WRONG, ClientLogin, MemberSite
from tests.fakes.clients.registry_client import assert_same_image


def user(login: ClientLogin) -> tuple[str, str]:
    return "--user", f"{login.name}:{login.secret}"


def refused(ctr: Containerd, verb: str, *args: str) -> str:
    """Returns the error of ctr for a pull or push that must fail."""
    options = ("--plain-http", *(("--snapshotter", "native") if verb == "pull" else ()))
    done = ctr.call.attempt("images", verb, *options, *args)
    assert done.code != 0, done.text
    return done.err


def test_push_and_pull(ctr: Containerd, club: MemberSite, repo: str, fresh: ClientImage, tmp_path: Path) -> None:
    """With a login, containerd gets its token by POST, and pushes and pulls. Without a login it is refused."""
    login = club.person({f"{repo}/**": "pull,push"})
    source = f"localhost/{repo}:1"
    ctr.load(fresh, source, tmp_path / "in")
    with cutting_proxy(club.address) as line:
        name = f"{line.address}/{repo}/app:1"
        assert "401" in refused(ctr, "push", name, source)
        ctr.push(name, source, *user(login))
        assert_same_image(club.wire(), f"{repo}/app", "1", fresh)
        ctr.forget(source)
        assert "401" in refused(ctr, "pull", name)
        ctr.pull(name, *user(login))
        assert ctr.has_same_bytes(fresh)
        ctr.forget(name)
        tokens = {asked.partition("?")[0] for asked in line.asked if "/token" in asked}
    assert tokens == {"POST /token", "GET /token"}  # GET: without a login


def test_a_token_of_a_robot(ctr: Containerd, club: MemberSite, repo: str, fresh: ClientImage) -> None:
    """An API token works as the password. After the token was revoked, the next command is refused."""
    robot = club.machine({f"{repo}/**": "pull"})
    club.wire().push(f"{repo}/app", "1", fresh)
    name = f"{club.address}/{repo}/app:1"
    ctr.pull(name, *user(robot))
    ctr.forget(name)
    club.command("token", "revoke", robot.secret.split("_")[1])
    for _ in range(4):  # on either worker
        assert "failed to fetch oauth token" in refused(ctr, "pull", *user(robot), name)


def test_anonymous_pull(ctr: Containerd, club: MemberSite, repo: str, fresh: ClientImage, tmp_path: Path) -> None:
    """containerd pulls public images without a login, and with the login of an account that has no rights."""
    club.wire().push(f"{repo}/open", "1", fresh)
    club.allow_everyone(f"{repo}/open")
    name, other = f"{club.address}/{repo}/open:1", f"localhost/{repo}:2"
    ctr.load(image(f"another {repo}"), other, tmp_path / "in")
    for options, status in (((), "401"), (user(club.person()), "403")):
        ctr.pull(name, *options)
        assert ctr.has_same_bytes(fresh)
        ctr.forget(name)
        assert status in refused(ctr, "push", *options, name, other)
    ctr.forget(other)


def test_denied(ctr: Containerd, club: MemberSite, repo: str, fresh: ClientImage, tmp_path: Path) -> None:
    """A push without the right is denied, a pull without it finds nothing, and a wrong password is refused."""
    login, source = club.person({f"{repo}/read": "pull"}), f"localhost/{repo}:1"
    ctr.load(fresh, source, tmp_path / "in")
    club.wire().push(f"{repo}/private", "1", fresh)
    club.wire().push(f"{repo}/read", "1", image(f"another {repo}"))
    name = f"{club.address}/{repo}"
    for path in ("read", "private", "new"):
        assert "403 Forbidden" in refused(ctr, "push", *user(login), f"{name}/{path}:2", source)
    for path in ("private", "new"):
        assert f"{name}/{path}:1: not found" in refused(ctr, "pull", *user(login), f"{name}/{path}:1")
    wrong = user(ClientLogin(login.name, WRONG))
    assert "401 Unauthorized" in refused(ctr, "pull", *wrong, f"{name}/read:1")
    assert "401 Unauthorized" in refused(ctr, "push", *wrong, f"{name}/read:1", source)
    ctr.forget(source)


def test_mounts(ctr: Containerd, club: MemberSite, repo: str) -> None:
    """containerd mounts layers from a repository from which it has pulled and from which the login may pull. If the
    login may no longer pull there, the layers are sent."""
    made = image("mounted", layer({"heavy": noise(repo, 4 * MIB)}))
    club.wire().push(f"{repo}/one", "1", made)
    both = club.person({f"{repo}/one": "pull", f"{repo}/two": "pull,push"})
    other = club.person({f"{repo}/three": "pull,push"})
    with cutting_proxy(club.address) as line:
        source = f"{line.address}/{repo}/one:1"
        ctr.pull(source, *user(both))
        ctr.push(f"{line.address}/{repo}/two:1", source, *user(both))
        assert line.sent < 64 * 1024
        assert any(f"from={repo}/one" in asked for asked in line.asked)
        ctr.push(f"{line.address}/{repo}/three:1", source, *user(other))
        assert line.sent > 4 * MIB
    for path in ("two", "three"):
        assert_same_image(club.wire(), f"{repo}/{path}", "1", made)
    ctr.forget(source)
