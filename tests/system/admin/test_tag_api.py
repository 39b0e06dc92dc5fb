"""Tests of the management API for tags: their history, and restores and moves of tags by accounts that may push."""

from __future__ import annotations

import base64
import json
from typing import Any
from urllib.parse import quote

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite, Auth, code_of
from tests.fakes.plain_client import plain_request
from tests.system.cli.test_tag_commands import INDEX_TYPE, index

ADMIN_LOGIN = (ADMIN, PASSWORD)


def basic(auth: tuple[str, str]) -> str:
    """Returns the value of the Authorization header."""
    return "Basic " + base64.b64encode(":".join(auth).encode()).decode()


def put(site: AdminSite, repo: str, tag: str, text: str, auth: tuple[str, str] = ADMIN_LOGIN) -> str:
    """Pushes an index over /v2, and returns its digest."""
    body, digest = index(text)
    url = f"{site.server.url}/v2/{repo}/manifests/{tag}"
    answer = plain_request("PUT", url, content=body, headers={"content-type": INDEX_TYPE, "authorization": basic(auth)})
    assert answer.status_code == 201, answer.text
    return digest


def v2_status(site: AdminSite, method: str, repo: str, tag: str, auth: Auth) -> int:
    """Returns the status of a read (GET) or a push (PUT) of the tag over /v2."""
    headers = {"accept": INDEX_TYPE, "content-type": INDEX_TYPE} | (
        {} if auth is None else {"authorization": basic(auth)}
    )
    content = index("by v2")[0] if method == "PUT" else None
    url = f"{site.server.url}/v2/{repo}/manifests/{tag}"
    return plain_request(method, url, content=content, headers=headers).status_code


def grant(site: AdminSite, account: str, repo: str, *actions: str) -> None:
    site.call_ok("PUT", "/grants", {"subject": f"user:{account}", "pattern": repo, "actions": actions})


def history(site: AdminSite, repo: str, tag: str, auth: Auth = ADMIN_LOGIN, **query: Any) -> dict[str, Any]:
    """Returns a page of the history of a tag."""
    found: dict[str, Any] = site.call_ok("GET", f"/repositories/{repo}/tags/{tag}/history", auth=auth, **query)
    return found


def test_history_and_restore(site: AdminSite) -> None:
    """An account that may push can read the history of a tag, and restore the tag to an earlier digest. The history
    names the account of each change."""
    repo = f"team/{site.name('repo')}"
    pusher = site.user()
    grant(site, pusher[0], repo, "pull", "push")
    first, second = put(site, repo, "v1", "first"), put(site, repo, "v1", "second", pusher)
    newest, oldest = history(site, repo, "v1", pusher)["items"]
    assert (newest["digest"], newest["previous"], newest["actor"]) == (second, first, pusher[0])
    assert (oldest["digest"], oldest["previous"], oldest["actor"]) == (first, None, ADMIN)
    assert (newest["address"], newest["availability"]) == ("127.0.0.1", "stored")
    assert site.call_ok("POST", f"/repositories/{repo}/tags/v1/restore", {}, auth=pusher) == {
        "repository": repo, "tag": "v1", "digest": first, "previous": second, "restored": [],
    }  # fmt: skip
    site.call_ok("POST", f"/repositories/{repo}/tags/v1/restore", {"to": second}, auth=pusher)
    site.call_ok("POST", f"/repositories/{repo}/tags/v1/restore", {"at": oldest["at"]}, auth=pusher)
    assert [entry["digest"] for entry in history(site, repo, "v1")["items"]] == [first, second, first, second, first]


def test_moved_tag_restores_a_deleted_manifest(site: AdminSite) -> None:
    """A tag that is moved to the digest of a deleted manifest restores the manifest."""
    repo = f"team/{site.name('repo')}"
    digest = put(site, repo, "v1", "first")
    url = f"{site.server.url}/v2/{repo}/manifests/{digest}"
    assert plain_request("DELETE", url, headers={"authorization": basic(ADMIN_LOGIN)}).status_code == 202
    moved = site.call_ok("PUT", f"/repositories/{repo}/tags/again", {"digest": digest})
    assert (moved["previous"], moved["restored"]) == (None, [digest])
    assert v2_status(site, "GET", repo, "again", ADMIN_LOGIN) == 200


def test_pages(site: AdminSite) -> None:
    """The history of a tag is listed in pages, newest entry first."""
    repo = f"team/{site.name('repo')}"
    digests = [put(site, repo, "v1", str(number)) for number in range(5)]
    found, after = [], None
    while True:
        page = history(site, repo, "v1", limit=2, **({"after": after} if after else {}))
        found += [entry["digest"] for entry in page["items"]]
        if (after := page["next"]) is None:
            break
    assert found == digests[::-1]
    answer = site.call("GET", f"/repositories/{repo}/tags/v1/history", after="x")
    assert answer.status_code == 400


@pytest.mark.parametrize("name", ["one", "a/b/c", "a/tags/b", "tags/v1/history", "tags/tags"])
def test_names_with_slashes(site: AdminSite, name: str) -> None:
    """The name of a repository in the path may have slashes, plain or percent-encoded, and may contain the same words
    as the path of the route."""
    repo = f"{site.name('repo')}/{name}"
    first, second = put(site, repo, "tags", "first"), put(site, repo, "history", "second")
    assert [entry["digest"] for entry in history(site, repo, "tags")["items"]] == [first]
    assert [entry["digest"] for entry in history(site, quote(repo, safe=""), "history")["items"]] == [second]
    assert site.call_ok("PUT", f"/repositories/{repo}/tags/restore", {"digest": "tags"})["digest"] == first
    site.call_ok("PUT", f"/repositories/{repo}/tags/restore", {"digest": "history"})
    assert site.call_ok("POST", f"/repositories/{repo}/tags/restore/restore", {})["digest"] == first


def test_history_and_changes_need_the_rights_of_v2(site: AdminSite) -> None:
    """With every combination of rights, and for existing and missing repositories, a request for the history gets the
    same status as a read of the tag over /v2. A change of the tag needs the rights to push and to pull. Without the
    right to pull, it gets 404, as for a missing repository."""
    repo = f"team/{site.name('repo')}"
    put(site, repo, "v1", "first")
    put(site, repo, "v1", "second")
    for actions in ([], ["pull"], ["push"], ["pull", "push"], ["delete"]):
        auth = site.user()
        if actions:
            grant(site, auth[0], "team/**", *actions)
        for name in (repo, "team/none"):
            read = site.call("GET", f"/repositories/{name}/tags/v1/history", auth=auth)
            assert read.status_code == v2_status(site, "GET", name, "v1", auth), (actions, name)
            for method, path, body in (("PUT", "", {"digest": "v1"}), ("POST", "/restore", {})):
                change = site.call(method, f"/repositories/{name}/tags/v1{path}", body, auth=auth)
                if "push" not in actions:
                    assert (change.status_code, code_of(change)) == (403, "DENIED")
                else:
                    assert change.status_code == (200 if name == repo and "pull" in actions else 404)
    assert v2_status(site, "PUT", "team/none2", "v1", auth) == 403


def test_invisible_repository_looks_like_a_missing_one(site: AdminSite) -> None:
    """For a repository that the account may not see, the responses are the same as for a missing repository."""
    repo = f"team/{site.name('repo')}"
    put(site, repo, "v1", "first")
    auth = site.user()
    for method, path, body in (("GET", "/history", None), ("PUT", "", {"digest": "v1"}), ("POST", "/restore", {})):
        answers = [
            site.call(method, f"/repositories/{name}/tags/v1{path}", body, auth=auth) for name in (repo, "team/none")
        ]
        assert answers[0].text.replace(repo, "team/none") == answers[1].text
        assert answers[0].status_code == answers[1].status_code
        assert "sha256" not in answers[0].text


def test_limits_of_a_token_apply(site: AdminSite) -> None:
    """A token whose limits do not allow a change gets 401, as over /v2, because another login of the account would be
    accepted."""
    repo = f"team/{site.name('repo')}"
    put(site, repo, "v1", "first")
    name, _ = site.user()
    grant(site, name, repo, "pull", "push")
    token = (name, site.token(name, limits=[{"pattern": "team/**", "actions": ["pull"]}]))
    assert history(site, repo, "v1", token)["items"]
    answer = site.call("PUT", f"/repositories/{repo}/tags/v2", {"digest": "v1"}, auth=token)
    assert answer.status_code == v2_status(site, "PUT", repo, "v2", token) == 401


def test_accounts_that_may_only_pull_do_not_see_addresses(site: AdminSite) -> None:
    """An account that may only pull sees who changed the tag and when, but not from which address."""
    repo = f"team/{site.name('repo')}"
    put(site, repo, "v1", "first")
    name, password = site.user()
    grant(site, name, repo, "pull")
    [entry] = history(site, repo, "v1", (name, password))["items"]
    assert (entry["actor"], entry["address"], entry["request"], entry["user_agent"]) == (ADMIN, None, None, None)


def test_force_is_for_admins(site: AdminSite) -> None:
    """Only an admin can send `"force": true`."""
    repo = f"team/{site.name('repo')}"
    put(site, repo, "v1", "first")
    pusher = site.user()
    grant(site, pusher[0], repo, "pull", "push")
    body = {"digest": "v1", "force": True}
    assert site.call("PUT", f"/repositories/{repo}/tags/v2", body, auth=pusher).status_code == 403
    site.call_ok("PUT", f"/repositories/{repo}/tags/v2", body)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "text"),
    [
        ("PUT", "/repositories/{}/tags/v1", {"digest": "sha256:00"}, 400, "is not a digest"),
        ("PUT", "/repositories/{}/tags/v1", {}, 422, "digest"),
        ("PUT", "/repositories/{}/tags/v1", {"digest": "v1", "to": "v2"}, 422, "to"),
        ("PUT", "/repositories/{}/tags/v1", {"digest": "none"}, 404, "has no tag none"),
        ("PUT", "/repositories/UPPER/tags/v1", {"digest": "v1"}, 400, "is not a repository name"),
        ("PUT", "/repositories/{}/tags/-", {"digest": "v1"}, 400, "is not a tag"),
        ("POST", "/repositories/{}/tags/v1/restore", {"to": "v1"}, 400, "is not a digest"),
        ("POST", "/repositories/{}/tags/v1/restore", {}, 404, "never pointed at anything other than"),
        ("POST", "/repositories/{}/tags/v1/restore", {"at": "2001-01-01T00:00:00Z"}, 404, "did not exist at that"),
    ],
)
def test_bad_requests(site: AdminSite, method: str, path: str, body: object, status: int, text: str) -> None:
    """An invalid request gets an error that says what is wrong."""
    repo = f"team/{site.name('repo')}"
    put(site, repo, "v1", "first")
    answer = site.call(method, path.format(repo), body)
    assert (answer.status_code, text in json.dumps(answer.json())) == (status, True), answer.text


def test_the_history_of_all_tags(site: AdminSite) -> None:
    """The history of a repository has the changes of all its tags, including deleted tags, in pages. Only accounts that
    may pull can read it."""
    repo = f"team/{site.name('repo')}"
    put(site, repo, "v1", "first")
    put(site, repo, "v2", "second")
    site.call_ok("POST", f"/repositories/{repo}/tag-removal", {"tags": ["v1"]})
    path = f"/repositories/{repo}/tag-history"
    first = site.call_ok("GET", path, limit=2)
    second = site.call_ok("GET", path, limit=2, after=first["next"])
    found = [(entry["tag"], entry["digest"] is None) for entry in first["items"] + second["items"]]
    assert found == [("v1", True), ("v2", False), ("v1", False)]
    assert second["next"] is None
    assert site.call("GET", path, auth=site.user()).status_code == 404
