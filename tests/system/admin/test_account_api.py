"""Tests of the management API for accounts, groups, grants, tokens, keys and the audit log."""

from __future__ import annotations

import pytest

from tests.fakes.admin_site import PASSWORD, AdminSite, code_of
from tests.fakes.plain_client import plain_request


def test_users(site: AdminSite) -> None:
    """A user can be added, shown, listed in pages, changed and removed."""
    name = site.name()
    added = site.call_ok("POST", "/users", {"name": name, "password": PASSWORD, "note": "on call"})
    assert (added["name"], added["admin"], added["password"]) == (name, False, None)
    assert site.call_ok("GET", f"/users/{name}")["note"] == "on call"
    assert site.call_ok("GET", "/me", auth=(name, PASSWORD))["name"] == name
    other, _ = site.user()
    found, after = [], None
    while True:
        page = site.call_ok("GET", "/users", limit=1, **({"after": after} if after else {}))
        found += [user["name"] for user in page["items"]]
        after = page["next"]
        if after is None:
            break
    assert {name, other} <= set(found)
    assert found == sorted(found)
    assert site.call_ok("PATCH", f"/users/{name}", {"admin": True})["admin"]
    assert site.call_ok("GET", "/users", auth=(name, PASSWORD))["items"]
    site.call_ok("DELETE", f"/users/{name}")
    assert site.call("GET", f"/users/{name}").status_code == 404
    assert site.call("GET", "/me", auth=(name, PASSWORD)).status_code == 401


def test_disabled_account_is_refused_at_the_next_request(site: AdminSite) -> None:
    """After an account is disabled, every worker refuses its next request, even if the worker has cached the login."""
    user = site.user()
    for _ in range(8):
        assert site.call("GET", "/me", auth=user).status_code == 200
    site.call_ok("PATCH", f"/users/{user[0]}", {"enabled": False})
    for _ in range(8):
        assert site.call("GET", "/me", auth=user).status_code == 401
    site.call_ok("PATCH", f"/users/{user[0]}", {"enabled": True})
    assert site.call("GET", "/me", auth=user).status_code == 200


def test_generated_passwords(site: AdminSite) -> None:
    """If a request has no password, the API generates one and returns it. The user can log in with it."""
    name = site.name()
    password = site.call_ok("POST", "/users", {"name": name})["password"]
    assert site.call("GET", "/me", auth=(name, password)).status_code == 200
    other = site.call_ok("PUT", f"/users/{name}/password", {})["password"]
    assert other != password
    assert site.call("GET", "/me", auth=(name, password)).status_code == 401
    assert site.call("GET", "/me", auth=(name, other)).status_code == 200


def test_change_of_the_own_password(site: AdminSite) -> None:
    """A user needs the old password to change their own password. An API token is not accepted instead."""
    user = site.user()
    secret = site.token(user[0])
    for old in (None, "not this one", secret):
        refused = site.call("PUT", f"/users/{user[0]}/password", {"old": old, "new": "another one"}, auth=user)
        assert (refused.status_code, code_of(refused)) == (403, "DENIED")
    with_token = site.call("PUT", f"/users/{user[0]}/password", {"old": PASSWORD}, auth=(user[0], secret))
    assert with_token.status_code == 403
    site.call_ok("PUT", f"/users/{user[0]}/password", {"old": PASSWORD, "new": "another one"}, auth=user)
    assert site.call("GET", "/me", auth=user).status_code == 401
    assert site.call("GET", "/me", auth=(user[0], "another one")).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/users", {"name": "Alice"}, 400, "ACCOUNT_INVALID"),
        ("POST", "/users", {"name": "root"}, 409, "ACCOUNT_EXISTS"),
        ("POST", "/users", {"name": "x", "password": "short"}, 400, "ACCOUNT_INVALID"),
        ("POST", "/users", {"name": "x" * 8, "password": "x" * 8}, 400, "ACCOUNT_INVALID"),
        ("POST", "/users", {"name": "x", "note": "two\nlines"}, 400, "ACCOUNT_INVALID"),
        ("GET", "/users/Alice", None, 400, "ACCOUNT_INVALID"),
        ("GET", "/users/none", None, 404, "ACCOUNT_UNKNOWN"),
        ("GET", "/robots/root", None, 404, "ACCOUNT_UNKNOWN"),
        ("GET", "/groups/none", None, 404, "ACCOUNT_UNKNOWN"),
        ("PUT", "/groups/none/members/root", None, 404, "ACCOUNT_UNKNOWN"),
        ("PUT", "/grants", {"subject": "root", "pattern": "**", "actions": ["pull"]}, 400, "ACCOUNT_INVALID"),
        ("PUT", "/grants", {"subject": "everyone", "pattern": "a/", "actions": ["pull"]}, 400, "ACCOUNT_INVALID"),
        ("PUT", "/grants", {"subject": "everyone", "pattern": "a/*", "actions": ["fly"]}, 422, "UNSUPPORTED"),
        ("PUT", "/grants", {"subject": "group:none", "pattern": "**", "actions": ["pull"]}, 404, "ACCOUNT_UNKNOWN"),
        ("DELETE", "/grants?subject=everyone&pattern=none/none", None, 404, "ACCOUNT_UNKNOWN"),
        ("POST", "/tokens", {"account": "none"}, 404, "ACCOUNT_UNKNOWN"),
        ("POST", "/tokens", {"account": "root", "expires_in": "soon"}, 400, "ACCOUNT_INVALID"),
        ("DELETE", "/tokens/none", None, 404, "ACCOUNT_UNKNOWN"),
        ("GET", "/audit?after=none", None, 400, "ACCOUNT_INVALID"),
        ("GET", "/users?limit=0", None, 422, "UNSUPPORTED"),
        ("GET", "/none", None, 404, "UNSUPPORTED"),
    ],
)
def test_errors(site: AdminSite, method: str, path: str, body: object, status: int, code: str) -> None:
    """Each error has the right status and code, in the format of the OCI spec."""
    answer = site.call(method, path, body)
    assert (answer.status_code, code_of(answer)) == (status, code)
    assert answer.headers["cache-control"] == "no-store"


def test_groups_and_grants(site: AdminSite) -> None:
    """A grant to a group (a right of the group) applies to its members, and is listed for them."""
    group, user = site.name("group"), site.user()
    assert site.call_ok("POST", "/groups", {"name": group}) == {"name": group, "members": []}
    site.call_ok("PUT", f"/groups/{group}/members/{user[0]}")
    assert site.call_ok("GET", f"/groups/{group}")["members"] == [user[0]]
    assert group in [each["name"] for each in site.call_ok("GET", "/groups", limit=1000)["items"]]
    grant = {"subject": f"group:{group}", "pattern": f"{group}/**", "actions": ["pull", "push"]}
    assert site.call_ok("PUT", "/grants", {**grant, "actions": ["push", "pull", "pull"]}) == grant
    assert site.call_ok("GET", "/grants", subject=f"group:{group}")["items"] == [grant]
    assert grant in site.call_ok("GET", "/grants", **{"for": user[0]}, auth=user)["items"]
    assert grant in site.call_ok("GET", "/me", auth=user)["grants"]
    assert grant in site.call_ok("GET", f"/users/{user[0]}", auth=user)["grants"]
    site.call_ok("DELETE", f"/groups/{group}/members/{user[0]}")
    assert grant not in site.call_ok("GET", "/me", auth=user)["grants"]
    site.call_ok("DELETE", "/grants", subject=grant["subject"], pattern=grant["pattern"])
    assert site.call_ok("GET", "/grants", subject=f"group:{group}")["items"] == []
    site.call_ok("DELETE", f"/groups/{group}")
    assert site.call("GET", f"/groups/{group}").status_code == 404


def test_rights(site: AdminSite) -> None:
    """`/rights` shows what an account may do with a repository, and which grants allow it. An admin can ask about
    every account. Other callers can ask about their own account and about a client without a login
    (`for=anonymous`)."""
    user = site.user()
    group = site.name("group")
    site.call_ok("POST", "/groups", {"name": group})
    site.call_ok("PUT", f"/groups/{group}/members/{user[0]}")
    grant = {"subject": f"group:{group}", "pattern": f"{group}/**", "actions": ["pull", "push"]}
    site.call_ok("PUT", "/grants", grant)
    repo = f"{group}/app"
    own_rights = site.call_ok("GET", "/rights", auth=user, repository=repo)
    assert own_rights == site.call_ok("GET", f"/rights?repository={repo}&for={user[0]}")
    hosted = own_rights["repositories"][0]
    assert (hosted["name"], hosted["upstream"], hosted["actions"]) == (repo, None, ["pull", "push"])
    assert grant in hosted["grants"]
    assert (own_rights["account"], own_rights["stored"], own_rights["enabled"], own_rights["admin"]) == (
        user[0],
        True,
        True,
        False,
    )
    nobody = site.call_ok("GET", f"/rights?repository={repo}&for=anonymous", auth=user)
    assert (nobody["account"], nobody["repositories"][0]["actions"]) == (None, [])
    assert site.call_ok("GET", "/rights", repository=repo)["admin"]
    assert site.call("GET", "/rights", repository="../etc").status_code == 400


def test_pages_of_grants(site: AdminSite) -> None:
    """A list of grants in pages has each grant once: each page continues after the last grant of the page before."""
    name = site.name("paged")
    for number in range(5):
        site.call_ok("PUT", "/grants", {"subject": f"user:{name}", "pattern": f"{name}/{number}", "actions": ["pull"]})
    first = site.call_ok("GET", "/grants", subject=f"user:{name}", limit=3)
    second = site.call_ok("GET", "/grants", subject=f"user:{name}", limit=3, after=first["next"])
    assert [len(first["items"]), len(second["items"]), second["next"]] == [3, 2, None]
    assert [each["pattern"] for each in first["items"] + second["items"]] == [f"{name}/{n}" for n in range(5)]


def test_admin_of_a_pattern_can_grant_below_it(site: AdminSite) -> None:
    """An account with the action `admin` on a pattern can add, remove and see grants for patterns below this pattern,
    and no others. The limits of its API token apply as well."""
    user, area = site.user(), site.name("area")
    site.call_ok("PUT", "/grants", {"subject": f"user:{user[0]}", "pattern": f"{area}/**", "actions": ["admin"]})
    below = {"subject": "everyone", "pattern": f"{area}/app-*", "actions": ["pull"]}
    assert site.call_ok("PUT", "/grants", below, auth=user) == below
    assert below in site.call_ok("GET", "/grants", auth=user)["items"]
    for pattern in ("**", f"{area}*/**", area, "*/app"):
        refused = site.call("PUT", "/grants", {**below, "pattern": pattern}, auth=user)
        assert (refused.status_code, code_of(refused)) == (403, "DENIED")
    visible_grants = site.call_ok("GET", "/grants", auth=user, limit=1000)["items"]
    assert [each for each in visible_grants if not each["pattern"].startswith(f"{area}/")] == []
    site.call_ok("DELETE", "/grants", auth=user, subject="everyone", pattern=below["pattern"])
    secret = site.token(user[0], limits=[{"pattern": f"{area}/a/**", "actions": ["admin"]}])
    assert site.call("PUT", "/grants", {**below, "pattern": f"{area}/a/b"}, auth=(user[0], secret)).is_success
    assert site.call("PUT", "/grants", {**below, "pattern": f"{area}/b/b"}, auth=(user[0], secret)).status_code == 403
    # Tests of searches on this site expect that clients without a login find nothing.
    site.call_ok("DELETE", "/grants", subject="everyone", pattern=f"{area}/a/b")


@pytest.mark.parametrize("pattern", ["*/app", "team/*/app", "**/app", "a*b"])
def test_new_patterns_are_simple(site: AdminSite, pattern: str) -> None:
    """The pattern of a new grant or token limit is an exact name, or a prefix that ends with `*` or `**`."""
    user = site.user()
    grant = {"subject": f"user:{user[0]}", "pattern": pattern, "actions": ["pull"]}
    limits = [{"pattern": pattern, "actions": ["pull"]}]
    for answer in (site.call("PUT", "/grants", grant), site.call("POST", "/tokens", {"limits": limits}, auth=user)):
        assert (answer.status_code, code_of(answer)) == (400, "ACCOUNT_INVALID")
        assert "team/app-*, team/*, team/** or **" in answer.text
    assert site.call_ok("GET", "/grants", subject=f"user:{user[0]}")["items"] == []
    assert site.call_ok("GET", "/tokens", auth=user)["items"] == []
    for simple in ("team/app", "team/app-*", "team/*", "team/**", "**"):
        site.call_ok("PUT", "/grants", {**grant, "pattern": simple})


def test_tokens(site: AdminSite) -> None:
    """A user can make an API token with their password, but not with an API token. Only the first response has the
    secret. The list of tokens has the other values of that response; only `used`, the time of the last use, may differ.
    The token is accepted as Basic and as Bearer. After its revocation, it is refused at once."""
    user = site.user()
    added_token = site.call_ok("POST", "/tokens", {"note": "laptop", "expires_in": "90d"}, auth=user)
    assert added_token["account"] == user[0]
    bearer = {"authorization": f"Bearer {added_token['secret']}"}
    assert site.call("GET", "/me", auth=None, headers=bearer).json()["name"] == user[0]
    assert site.call("GET", "/me", auth=(user[0], added_token["secret"])).json()["name"] == user[0]
    (listed,) = site.call_ok("GET", "/tokens", auth=user)["items"]
    assert listed == {**{name: added_token[name] for name in listed}, "used": listed["used"]}
    assert "secret" not in listed
    with_token = site.call("POST", "/tokens", {}, auth=(user[0], added_token["secret"]))
    assert (with_token.status_code, code_of(with_token)) == (403, "DENIED")
    site.call_ok("DELETE", f"/tokens/{added_token['id']}", auth=user)
    assert site.call("GET", "/me", auth=None, headers=bearer).status_code == 401
    assert site.call("GET", "/me", auth=(user[0], added_token["secret"])).status_code == 401


@pytest.mark.parametrize("wrong", ["0s", "37000d", "99999999999999w"])
def test_lifetimes_of_tokens_that_are_refused(site: AdminSite, wrong: str) -> None:
    """A lifetime of 0, or of more than a hundred years (36,525 days), is refused."""
    user = site.user()
    answer = site.call("POST", "/tokens", {"expires_in": wrong}, auth=user)
    assert (answer.status_code, code_of(answer)) == (400, "ACCOUNT_INVALID")
    assert site.call_ok("GET", "/tokens", auth=user)["items"] == []


def test_robots(site: AdminSite) -> None:
    """A robot (an account for a program) has no password, and logs in with API tokens that an admin makes."""
    robot = site.robot()
    auth = (robot, site.token(robot))
    assert site.call_ok("GET", "/me", auth=auth)["account"]["kind"] == "robot"
    assert site.call_ok("GET", f"/robots/{robot}", auth=auth)["name"] == robot
    assert robot in [each["name"] for each in site.call_ok("GET", "/robots", limit=1000)["items"]]
    assert site.call("PUT", f"/users/{robot}/password", {}).status_code == 404
    assert site.call("PATCH", f"/users/{robot}", {"admin": True}).status_code == 404
    assert not site.call_ok("PATCH", f"/robots/{robot}", {"enabled": False})["enabled"]
    assert site.call("GET", "/me", auth=auth).status_code == 401
    site.call_ok("DELETE", f"/robots/{robot}")
    assert site.call("GET", f"/robots/{robot}").status_code == 404


def test_keys(site: AdminSite) -> None:
    """A signing key can be replaced by a new one. Keys are listed without their secrets."""
    key = site.call_ok("POST", "/keys", {})
    assert site.call_ok("GET", "/keys")[0] == key
    assert set(key) == {"id", "created", "retired"}


def test_key_that_is_replaced_at_once(site: AdminSite) -> None:
    """If a signing key is replaced with `at_once`, by the API or the command, every worker refuses the bearer tokens
    that the old key has signed, although they have not expired."""
    user = site.user()
    for replace_key in (
        lambda: site.call_ok("POST", "/keys", {"at_once": True}),
        lambda: site.command("key", "rotate", "--at-once"),
    ):
        token = plain_request("GET", f"{site.server.url}/token?service=entrepot", auth=user).json()["token"]
        bearer = {"authorization": f"Bearer {token}"}
        assert {plain_request("GET", f"{site.server.url}/v2/", headers=bearer).status_code for _ in range(10)} == {200}
        replace_key()
        assert {plain_request("GET", f"{site.server.url}/v2/", headers=bearer).status_code for _ in range(10)} == {401}
        assert len(site.call_ok("GET", "/keys")) == 1


def test_audit(site: AdminSite) -> None:
    """An entry of the audit log has the actor, the action and the address. Later pages have older entries."""
    group = site.name("group")
    site.call_ok("POST", "/groups", {"name": group})
    site.call_ok("DELETE", f"/groups/{group}")
    page = site.call_ok("GET", "/audit", target=group, limit=1)
    (line,) = page["items"]
    assert (line["action"], line["actor"], line["address"], line["outcome"]) == (
        "group.remove",
        "root",
        "127.0.0.1",
        "ok",
    )
    assert line["user_agent"].startswith("python-httpx2")
    assert line["request_id"]
    (older,) = site.call_ok("GET", "/audit", target=group, limit=1, after=page["next"])["items"]
    assert older["action"] == "group.add"
    assert site.call_ok("GET", "/audit", target=group, since="2100-01-01T00:00:00Z")["items"] == []
    assert site.call_ok("GET", "/audit", target=group, until="2001-01-01T00:00:00Z")["items"] == []
    assert site.call_ok("GET", "/audit", target=group, until="2100-01-01T00:00:00Z")["items"] != []
    assert site.call_ok("GET", "/audit", target=group, until="0001-01-01T00:00:00")["items"] == []


def test_me(site: AdminSite) -> None:
    """`/me` shows the account of the caller, and in `open` whether the registry has no accounts yet. Without a login,
    it responds with 401."""
    me = site.call_ok("GET", "/me")
    assert (me["name"], me["admin"], me["open"], me["account"]["name"]) == ("root", True, False, "root")
    nobody = site.call("GET", "/me", auth=None)
    assert nobody.status_code == 401
    assert nobody.headers["www-authenticate"] == 'Basic realm="Entrepot", charset="UTF-8"'
