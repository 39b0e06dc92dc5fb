"""Tests with containerd and a registry that has accounts."""

from __future__ import annotations

from pathlib import Path

from tests.fakes.client_images import MIB, ClientImage, image, layer, noise
from tests.fakes.clients.containerd_daemon import Containerd
from tests.fakes.clients.cutting_proxy import cutting_proxy
from tests.fakes.clients.member_site import WRONG, ClientLogin, SiteWithAccounts
from tests.fakes.clients.registry_client import assert_same_image


def user(login: ClientLogin) -> tuple[str, str]:
    """Returns the option of ctr for a login."""
    return "--user", f"{login.name}:{login.secret}"


def refused(ctr: Containerd, verb: str, *args: str) -> str:
    """Runs a pull or a push that must fail. Returns the error of ctr."""
    options = ("--plain-http", *(("--snapshotter", "native") if verb == "pull" else ()))
    result = ctr.call.attempt("images", verb, *options, *args)
    assert result.code != 0, result.text
    return result.err


def test_push_and_pull(
    ctr: Containerd, site: SiteWithAccounts, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """With a login, containerd requests its token by POST, and can push and pull. Without a login, its pushes and pulls
    are refused."""
    login = site.add_user({f"{repo}/**": "pull,push"})
    source = f"localhost/{repo}:1"
    ctr.load(small_image, source, tmp_path / "in")
    with cutting_proxy(site.address) as proxy:
        name = f"{proxy.address}/{repo}/app:1"
        assert "401" in refused(ctr, "push", name, source)
        ctr.push(name, source, *user(login))
        assert_same_image(site.client(), f"{repo}/app", "1", small_image)
        ctr.forget(source)
        assert "401" in refused(ctr, "pull", name)
        ctr.pull(name, *user(login))
        assert ctr.has_same_bytes(small_image)
        ctr.forget(name)
        token_requests = {line.partition("?")[0] for line in proxy.request_lines if "/token" in line}
    assert token_requests == {"POST /token", "GET /token"}  # containerd sends the GET if it has no login


def test_a_token_of_a_robot(ctr: Containerd, site: SiteWithAccounts, repo: str, small_image: ClientImage) -> None:
    """containerd can use an API token as its password. After the token is revoked, the next command is refused."""
    robot = site.add_robot({f"{repo}/**": "pull"})
    site.client().push(f"{repo}/app", "1", small_image)
    name = f"{site.address}/{repo}/app:1"
    ctr.pull(name, *user(robot))
    ctr.forget(name)
    site.command("token", "revoke", robot.secret.split("_")[1])  # the second part of an API token is its id
    for _ in range(4):  # often enough to reach both workers
        assert "failed to fetch oauth token" in refused(ctr, "pull", *user(robot), name)


def test_anonymous_pull(
    ctr: Containerd, site: SiteWithAccounts, repo: str, small_image: ClientImage, tmp_path: Path
) -> None:
    """containerd pulls public images without a login, and with the login of an account that has no rights."""
    site.client().push(f"{repo}/open", "1", small_image)
    site.allow_everyone(f"{repo}/open")
    name, other = f"{site.address}/{repo}/open:1", f"localhost/{repo}:2"
    ctr.load(image(f"another {repo}"), other, tmp_path / "in")
    for options, status in (((), "401"), (user(site.add_user()), "403")):
        ctr.pull(name, *options)
        assert ctr.has_same_bytes(small_image)
        ctr.forget(name)
        assert status in refused(ctr, "push", *options, name, other)
    ctr.forget(other)


def test_denied(ctr: Containerd, site: SiteWithAccounts, repo: str, small_image: ClientImage, tmp_path: Path) -> None:
    """If the account has no right to a repository, a push gets 403 and a pull gets "not found". A wrong password gets
    401."""
    login, source = site.add_user({f"{repo}/read": "pull"}), f"localhost/{repo}:1"
    ctr.load(small_image, source, tmp_path / "in")
    site.client().push(f"{repo}/private", "1", small_image)
    site.client().push(f"{repo}/read", "1", image(f"another {repo}"))
    name = f"{site.address}/{repo}"
    for path in ("read", "private", "new"):
        assert "403 Forbidden" in refused(ctr, "push", *user(login), f"{name}/{path}:2", source)
    for path in ("private", "new"):
        assert f"{name}/{path}:1: not found" in refused(ctr, "pull", *user(login), f"{name}/{path}:1")
    wrong = user(ClientLogin(login.name, WRONG))
    assert "401 Unauthorized" in refused(ctr, "pull", *wrong, f"{name}/read:1")
    assert "401 Unauthorized" in refused(ctr, "push", *wrong, f"{name}/read:1", source)
    ctr.forget(source)


def test_mounts(ctr: Containerd, site: SiteWithAccounts, repo: str) -> None:
    """containerd pushes an image that it has pulled from another repository. If the login may pull from that
    repository, the registry mounts the layers. If not, containerd sends the layers."""
    test_image = image("mounted", layer({"heavy": noise(repo, 4 * MIB)}))
    site.client().push(f"{repo}/one", "1", test_image)
    source_reader = site.add_user({f"{repo}/one": "pull", f"{repo}/two": "pull,push"})
    other = site.add_user({f"{repo}/three": "pull,push"})
    with cutting_proxy(site.address) as proxy:
        source = f"{proxy.address}/{repo}/one:1"
        ctr.pull(source, *user(source_reader))
        ctr.push(f"{proxy.address}/{repo}/two:1", source, *user(source_reader))
        assert proxy.sent < 64 * 1024
        assert any(f"from={repo}/one" in line for line in proxy.request_lines)
        ctr.push(f"{proxy.address}/{repo}/three:1", source, *user(other))
        assert proxy.sent > 4 * MIB
    for path in ("two", "three"):
        assert_same_image(site.client(), f"{repo}/{path}", "1", test_image)
    ctr.forget(source)
