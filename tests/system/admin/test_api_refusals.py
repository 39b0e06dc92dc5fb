"""Tests that every route of the management API refuses callers who lack the rights."""

from __future__ import annotations

import re
import socket
from typing import Any

import pytest

from tests.fakes.admin_site import PASSWORD, AdminSite, code_of
from tests.fakes.api_document import api_document
from tests.fakes.plain_client import plain_client

ROUTES_NOT_ONLY_FOR_ADMINS = {
    ("GET", "/me"),
    ("GET", "/users/{name}"),
    ("PUT", "/users/{name}/password"),
    ("GET", "/robots/{name}"),
    ("GET", "/grants"),
    ("PUT", "/grants"),
    ("DELETE", "/grants"),
    ("GET", "/rights"),
    ("GET", "/tokens"),
    ("POST", "/tokens"),
    ("DELETE", "/tokens/{id}"),
    ("GET", "/sessions"),
    ("DELETE", "/sessions"),
    ("DELETE", "/sessions/{id}"),
    ("POST", "/mirror/refresh"),
    ("POST", "/mirror/purge"),
    ("GET", "/mirror/frozen"),
    ("PUT", "/mirror/frozen"),
    ("DELETE", "/mirror/frozen"),
    ("GET", "/repositories/{name}/tags/{tag}/history"),
    ("GET", "/repositories/{name}/tag-history"),
    ("PUT", "/repositories/{name}/tags/{tag}"),
    ("POST", "/repositories/{name}/tags/{tag}/restore"),
    ("GET", "/repositories/{name}/tag-list"),
    ("GET", "/repositories/{name}/manifests/{reference}/details"),
    ("GET", "/repositories/{name}/manifests/{reference}/raw"),
    ("GET", "/repositories/{name}/manifests/{reference}/config"),
    ("GET", "/repositories/{name}/manifests/{reference}/referrers"),
    ("GET", "/repositories/{name}/manifests/{reference}/files"),
    ("GET", "/repositories/{name}/comparison"),
    ("GET", "/repositories/{name}/manifests/{reference}/archive"),
    ("POST", "/repositories/{name}/tag-removal-plan"),
    ("POST", "/repositories/{name}/tag-removal"),
    ("POST", "/repositories/{name}/tag-restoration"),
    ("GET", "/repositories/{name}/description"),
    ("PUT", "/repositories/{name}/description"),
    ("GET", "/retention/preview"),
    ("GET", "/events"),
    ("GET", "/search"),
}
"""The routes that accounts other than admins may use, for their own data or with a grant."""

BODIES: dict[tuple[str, str], Any] = {  # a valid body for each route that needs one
    ("POST", "/users"): {"name": "x"},
    ("PATCH", "/users/{name}"): {"enabled": True},
    ("PUT", "/users/{name}/password"): {"new": PASSWORD},
    ("POST", "/robots"): {"name": "x"},
    ("PATCH", "/robots/{name}"): {"enabled": True},
    ("POST", "/groups"): {"name": "x"},
    ("PUT", "/grants"): {"subject": "everyone", "pattern": "**", "actions": ["pull"]},
    ("POST", "/tokens"): {"account": "root"},
    ("POST", "/keys"): {},
    ("PUT", "/mirror/frozen"): {"reference": "app:1"},
    ("POST", "/mirror/refresh"): {"reference": "app:1"},
    ("POST", "/mirror/purge"): {"reference": "app:1"},
    ("POST", "/mirror/warm"): {"references": ["app:1"]},
    ("POST", "/jobs/{job}/stop"): {},
    ("PUT", "/repositories/{name}/tags/{tag}"): {"digest": "v1"},
    ("POST", "/repositories/{name}/tags/{tag}/restore"): {},
    ("PUT", "/repositories/{name}/description"): {"text": "x"},
    ("POST", "/repositories/{name}/tag-removal-plan"): {"tags": ["v1"]},
    ("POST", "/repositories/{name}/tag-removal"): {"tags": ["v1"]},
    ("POST", "/repositories/{name}/tag-restoration"): {"tags": [{"tag": "v1", "digest": "sha256:" + 64 * "0"}]},
    ("POST", "/cache/evict"): {},
    ("POST", "/retention"): {},
    ("POST", "/events/retry"): {},
    ("POST", "/gc"): {},
    ("POST", "/fsck"): {},
    ("POST", "/scrub"): {},
    ("POST", "/backups"): {},
    ("POST", "/imports/directory"): {"path": "/none"},
    ("POST", "/imports/remote"): {"url": "http://127.0.0.1:1"},
}


def routes() -> list[tuple[str, str]]:
    """Returns the method and the path of every route in the OpenAPI document."""
    paths = api_document()["paths"]
    return sorted(
        (method.upper(), path.removeprefix("/api/v1"))
        for path, methods in paths.items()
        if path.startswith("/api/v1")
        for method in methods
    )


def filled(path: str) -> str:
    """Returns the path of a route with the parameters filled in. The account `root` exists."""
    queries = {
        "/grants": "?subject=everyone&pattern=**",
        "/rights": "?repository=team/app",
        "/repositories/{name}/comparison": "?base=v1&other=v2",
    }
    return re.sub(r"\{\w+\}", "root", path) + queries.get(path, "")


ROUTES = routes()


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_no_credentials(site: AdminSite, route: tuple[str, str]) -> None:
    """Without credentials, every route responds with 401 and a challenge. For this challenge, a browser asks for a
    login."""
    answer = site.call(route[0], filled(route[1]), BODIES.get(route), auth=None)
    assert (answer.status_code, code_of(answer)) == (401, "UNAUTHORIZED")
    assert answer.headers["www-authenticate"].startswith('Basic realm="Entrepot"')


@pytest.mark.parametrize("route", ROUTES, ids=" ".join)
def test_wrong_credentials(site: AdminSite, route: tuple[str, str]) -> None:
    """With wrong credentials, every route responds with 401."""
    answer = site.call(route[0], filled(route[1]), BODIES.get(route), auth=None, headers={"authorization": "Bearer x"})
    assert answer.status_code == 401


@pytest.mark.parametrize("route", sorted(set(ROUTES) - ROUTES_NOT_ONLY_FOR_ADMINS), ids=" ".join)
def test_routes_for_admins_only(site: AdminSite, route: tuple[str, str]) -> None:
    """On routes for admins, every other caller gets 403, whether or not the named object exists. So does an admin with
    a limited token."""
    user = site.user()
    admin = site.user(admin=True)
    limited = site.token(admin[0], limits=[{"pattern": "**", "actions": ["pull", "push", "delete", "admin"]}])
    for auth in (user, (admin[0], limited)):
        for path in (filled(route[1]), re.sub(r"\{\w+\}", "none", route[1])):
            answer = site.call(route[0], path, BODIES.get(route), auth=auth)
            assert (answer.status_code, code_of(answer)) == (403, "DENIED")


def test_refused_requests_are_in_the_audit_log(site: AdminSite) -> None:
    """The audit log names the account, the operation and the address of a refused request."""
    user = site.user()
    site.call("DELETE", "/groups/some", auth=user)
    while not (lines := site.call_ok("GET", "/audit", actor=user[0], outcome="denied")["items"]):
        pass
    (line,) = lines
    assert (line["action"], line["target"], line["address"]) == ("management.remove_group", "groups/some", "127.0.0.1")


@pytest.mark.parametrize(
    ("method", "path", "body", "operation"),
    [
        ("GET", "/users/{account}", None, "get_user"),
        ("PUT", "/users/{account}/password", {"new": PASSWORD}, "set_password"),
        ("POST", "/tokens", {"account": "root"}, "add_token"),
        ("DELETE", "/tokens/{token}", None, "revoke_token"),
        ("DELETE", "/sessions?account={account}", None, "end_other_sessions"),
    ],
)
def test_requests_for_other_accounts_are_in_the_audit_log(
    site: AdminSite, method: str, path: str, body: object, operation: str
) -> None:
    """A request for another account gets 404, and is in the audit log."""
    user = site.user()
    filled_path = path.format(account="root", token=site.token("root").split("_")[1])
    assert site.call(method, filled_path, body, auth=user).status_code == 404
    while not (lines := site.call_ok("GET", "/audit", actor=user[0], outcome="denied")["items"]):
        pass
    assert [line["action"] for line in lines] == [f"management.{operation}"]


@pytest.mark.parametrize("path", ["/api/v1/repositories/{}/tag-list", "/ui/repositories/{}", "/ui/tag-history/{}"])
def test_refused_reads_of_repositories_are_in_the_audit_log(site: AdminSite, path: str) -> None:
    """The API and the pages respond with 404 for a repository that the account may not pull. The request is in the
    audit log."""
    user, repo = site.user(), f"secret/{site.name('repo')}"
    with plain_client(site.server.url, headers={"sec-fetch-site": "same-origin"}) as browser:
        login = {"user": user[0], "password": user[1], "next": "/ui/"}
        assert browser.post("/ui/login", data=login).status_code == 303
        assert browser.get(path.format(repo)).status_code == 404
    while not (lines := site.call_ok("GET", "/audit", actor=user[0], outcome="denied")["items"]):
        pass
    assert [line["target"].endswith(f"/{repo}") or f"/{repo}/" in line["target"] for line in lines] == [True]


def test_a_refused_change_of_a_hidden_repository_is_in_the_audit_log(site: AdminSite) -> None:
    """An account that may only push gets 404 for a change that needs the right to pull. The request is in the audit
    log."""
    user, repo = site.user(), f"drop/{site.name('repo')}"
    site.call_ok("PUT", "/grants", {"subject": f"user:{user[0]}", "pattern": repo, "actions": ["push"]})
    path = f"/repositories/{repo}/description"
    assert site.call("PUT", path, {"text": "new"}, auth=user).status_code == 404
    while not (lines := site.call_ok("GET", "/audit", actor=user[0], outcome="denied")["items"]):
        pass
    assert [(line["action"], line["target"]) for line in lines] == [("management.put_description", path[1:])]


def test_audit_log_has_no_control_characters(site: AdminSite) -> None:
    """The audit log has the path as the client sent it, percent-encoded. So the log sends no control sequences to a
    terminal."""
    user = site.user()
    site.call("DELETE", "/groups/%1b[2J%0d", auth=user)
    while not (lines := site.call_ok("GET", "/audit", actor=user[0], outcome="denied")["items"]):
        pass
    assert [line["target"] for line in lines] == ["groups/%1b[2J%0d"]
    assert "\x1b" not in site.command("audit", "--actor", user[0])


def test_routes_not_only_for_admins_exist() -> None:
    """All routes in `ROUTES_NOT_ONLY_FOR_ADMINS` exist."""
    assert set(ROUTES) >= ROUTES_NOT_ONLY_FOR_ADMINS


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/users/{}", None),
        ("GET", "/robots/{}", None),
        ("PUT", "/users/{}/password", {"new": PASSWORD}),
        ("GET", "/tokens?account={}", None),
        ("GET", "/grants?for={}", None),
        ("GET", "/rights?repository=team/app&for={}", None),
    ],
)
def test_other_accounts_look_like_missing_ones(site: AdminSite, method: str, path: str, body: object) -> None:
    """For an account that the caller may not see, the response is the same as for a missing account."""
    user = site.user()
    answers = [site.call(method, path.format(name), body, auth=user) for name in ("root", "not-there")]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].text.replace("root", "") == answers[1].text.replace("not-there", "")


def test_tokens_of_others_look_like_missing_ones(site: AdminSite) -> None:
    """A caller cannot make or revoke a token of another account. The response does not show whether the token or the
    account exists."""
    user = site.user()
    root_token_id = site.token("root").split("_")[1]
    answers = [site.call("DELETE", f"/tokens/{token_id}", auth=user) for token_id in (root_token_id, "not-there")]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].text == answers[1].text
    for account in ("root", "not-there"):
        assert site.call("POST", "/tokens", {"account": account}, auth=user).status_code == 404
    assert site.call("DELETE", f"/tokens/{root_token_id}").status_code == 204


def test_rights_are_checked_before_the_body_is_received(site: AdminSite) -> None:
    """A client without a login gets a 401 as soon as the registry has the headers. So the registry parses no body for
    such a client."""
    for method, path in sorted(BODIES):
        head = (
            f"{method} /api/v1{filled(path)} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            "Content-Length: 1000\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", site.server.port), timeout=60) as connection:
            connection.sendall(head.encode())
            assert connection.recv(1000).startswith(b"HTTP/1.1 401 "), (method, path)
