"""Tests of searches over the management API and over the API of registry version 1, which docker uses, and of the
extensions of /v2."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite, Auth, code_of
from tests.fakes.plain_client import plain_client
from tests.fakes.process_resources import eventually

from .test_tag_api import basic, grant, put

ADMIN_LOGIN = (ADMIN, PASSWORD)


def get(site: AdminSite, path: str, auth: Auth = ADMIN_LOGIN, **query: Any) -> httpx2.Response:
    """Sends a GET to any path of the server, outside the management API."""
    with plain_client(site.server.url, timeout=60) as client:
        return client.get(path, auth=auth, params=query or None)


def wait_until_found(site: AdminSite, text: str, kind: str) -> None:
    """Waits until a search for one kind of results finds something. The search index is updated a little after a
    push."""

    def is_found() -> bool:
        return bool(site.call_ok("GET", "/search", q=text, kind=kind)[kind]["items"])

    assert eventually(is_found, patience=60), f"a search for {text} finds no {kind}"


def indexed(site: AdminSite, repo: str, tag: str = "v1") -> str:
    """Pushes an image index to a repository, waits until searches find its tag and its digest, and returns the
    digest."""
    digest = put(site, repo, tag, repo)
    wait_until_found(site, f"{repo}:{tag}", "tags")
    wait_until_found(site, digest, "digests")
    return digest


@pytest.fixture
def repo(site: AdminSite) -> str:
    """Returns a repository name that only this test uses."""
    return f"found-{site.name('x')}/app"


def test_all_kinds_at_once(site: AdminSite, repo: str) -> None:
    """One search finds repositories, tags, labels and digests that match the text."""
    digest = indexed(site, repo)
    found = site.call_ok("GET", "/search", q=repo)
    in_repository = {"repository": repo, "mirrored_from": None}
    assert found["repositories"] == {"items": [in_repository], "next": None, "complete": True}
    assert found["target"] == {**in_repository, "kind": "repository", "tag": None, "digest": None}
    assert (found["indexing"], found["tags"]["items"]) == (False, [])
    assert found["labels"]["items"] == [{**in_repository, "digest": digest, "tag": "v1", "labels": {"text": repo}}]
    [entry] = site.call_ok("GET", "/search", q=digest[:30])["digests"]["items"]
    assert entry == {**in_repository, "digest": digest, "kind": "manifest", "tag": "v1"}


def test_search_for_a_complete_reference(site: AdminSite, repo: str) -> None:
    """A search for a pull command or a complete reference returns the repository, tag or manifest that it names."""
    digest = indexed(site, repo)
    host = site.server.address
    for text, kind in (
        (f"docker pull {host}/{repo}:v1", "tag"),
        (f"{host}/{repo}@{digest}", "manifest"),
        (f"{repo}", "repository"),
    ):
        target = site.call_ok("GET", "/search", q=text)["target"]
        assert (target["repository"], target["kind"]) == (repo, kind), text
    for text in (f"docker pull {host}/{repo}:v2", "docker pull none/there:v1"):
        assert site.call_ok("GET", "/search", q=text)["target"] is None
    assert site.call_ok("GET", "/search", q=f"{repo}:v1", kind="tags", after="0")["target"] is not None


def test_pages(site: AdminSite) -> None:
    """A search for one kind of results is listed in pages."""
    area = site.name("paged")
    for number in range(3):
        indexed(site, f"{area}/app{number}")
    first = site.call_ok("GET", "/search", q=f"{area}/", kind="repositories", limit=2)
    assert (len(first["repositories"]["items"]), first["tags"], first["repositories"]["next"]) == (2, None, "2")
    second = site.call_ok("GET", "/search", q=f"{area}/", kind="repositories", limit=2, after="2")["repositories"]
    assert ([item["repository"] for item in second["items"]], second["next"]) == ([f"{area}/app2"], None)
    assert site.call("GET", "/search", q=area, after="2").status_code == 400
    assert site.call("GET", "/search", q="x" * 1025).status_code == 422


def test_accounts_find_only_what_they_may_pull(site: AdminSite, repo: str) -> None:
    """With every kind of search, an account finds only content that it may pull. A limited token finds only content
    within its limits."""
    digest = indexed(site, repo)
    hidden = repo.replace("found", "hidden")
    indexed(site, hidden)
    member = site.user()
    grant(site, member[0], repo, "pull")
    outsider = site.user()
    limited = (member[0], site.token(member[0], limits=[{"pattern": "other/**", "actions": ["pull"]}]))
    for auth, visible in ((ADMIN_LOGIN, [repo, hidden]), (member, [repo]), (outsider, []), (limited, [])):
        for name in (repo, hidden):
            found = site.call_ok("GET", "/search", auth=auth, q=f"docker pull {name}:v1")
            assert (found["target"] is not None) == (name in visible)
            tags = site.call_ok("GET", "/search", auth=auth, q=f"{name}:v1", kind="tags")["tags"]["items"]
            assert [item["repository"] for item in tags] == ([name] if name in visible else [])
            assert (get(site, f"/v1/repositories/{name}/tags", auth).status_code == 200) == (name in visible)
        found_digests = site.call_ok("GET", "/search", auth=auth, q=digest)["digests"]["items"]
        assert bool(found_digests) == (repo in visible)
        text_in_both_names = repo.partition("-")[2]
        results = get(site, "/v1/search", auth, q=text_in_both_names).json()["results"]
        assert sorted(result["name"] for result in results) == sorted(visible)


def test_search_without_a_login(site: AdminSite, repo: str) -> None:
    """A search without a login finds the repositories from which everyone may pull. If it finds none, it gets 401."""
    indexed(site, repo)
    for answer in (site.call("GET", "/search", auth=None, q="app"), get(site, "/v1/search", None, q="app")):
        assert (answer.status_code, code_of(answer)) == (401, "UNAUTHORIZED")
        assert answer.headers["www-authenticate"].startswith("Basic ")
    site.call_ok("PUT", "/grants", {"subject": "everyone", "pattern": repo, "actions": ["pull"]})
    try:
        found = site.call_ok("GET", "/search", auth=None, q="app")["repositories"]["items"]
        assert [item["repository"] for item in found] == [repo]
        assert [result["name"] for result in get(site, "/v1/search", None, q="app").json()["results"]] == [repo]
        assert get(site, "/v1/search", None, q="nothing-there").status_code == 401
    finally:
        site.call_ok("DELETE", "/grants", subject="everyone", pattern=repo)


def test_search_api_of_registry_version_1(site: AdminSite) -> None:
    """The API of registry version 1 has the fields and headers that docker needs."""
    area = site.name("old")
    digests = [indexed(site, f"{area}/app{number}") for number in range(3)]
    answer = get(site, "/v1/_ping", None)
    assert (answer.json(), answer.headers["x-docker-registry-standalone"]) == ({"standalone": True}, "true")
    assert answer.headers["x-docker-registry-version"]
    pages = [get(site, "/v1/search", q=f"{area}/", n=2, page=number).json() for number in (1, 2, 3)]
    assert [[result["name"] for result in page["results"]] for page in pages] == [
        [f"{area}/app0", f"{area}/app1"],
        [f"{area}/app2"],
        [],
    ]
    assert pages[0]["results"][0] == {
        "name": f"{area}/app0", "description": "", "star_count": 0,
        "is_official": False, "is_automated": False, "is_trusted": False,
    }  # fmt: skip
    assert [(page["num_results"], page["num_pages"]) for page in pages[:2]] == [(3, 2), (3, 2)]
    assert get(site, f"/v1/repositories/{area}/app1/tags").json() == {"v1": digests[1].partition(":")[2]}
    for path in ("/v1/search?n=x", "/v1/search?page=-1"):
        assert get(site, path).status_code == 422
    assert get(site, "/v1/users").status_code == 404


def test_extensions(site: AdminSite) -> None:
    """`/v2/_oci/ext/discover` lists the extensions of this registry."""
    [oci_extension, entrepot_extension] = get(site, "/v2/_oci/ext/discover", None).json()["extensions"]
    assert (oci_extension["name"], entrepot_extension["name"], entrepot_extension["endpoints"]) == (
        "_oci",
        "_entrepot",
        ["_entrepot/history"],
    )


def test_history_over_v2(site: AdminSite, repo: str) -> None:
    """Clients that may pull can read the history of a tag over /v2: in pages, newest entry first. The entries do not
    contain the IP addresses of the clients that moved the tag."""
    digests = [put(site, repo, "v1", text) for text in ("first", "second", "third")]
    path = f"/v2/{repo}/_entrepot/history/v1"
    page = get(site, path, None, n=2)
    assert (page.status_code, page.headers["www-authenticate"].partition(" ")[0]) == (401, "Bearer")
    assert f"repository:{repo}:pull" in page.headers["www-authenticate"]
    member, outsider = site.user(), site.user()
    grant(site, member[0], repo, "pull")
    with plain_client(site.server.url) as client:
        first = client.get(path, params={"n": 2}, headers={"authorization": basic(member)})
        second = client.get(first.links["next"]["url"], headers={"authorization": basic(member)})
    entries = first.json()["history"] + second.json()["history"]
    assert [entry["digest"] for entry in entries] == digests[::-1]
    assert [entry["previous"] for entry in entries] == [digests[1], digests[0], None]
    assert {entry["actor"] for entry in entries} == {ADMIN}
    assert "127.0.0.1" not in first.text
    assert "next" not in second.links
    hidden, unknown = get(site, path, outsider), get(site, "/v2/none/_entrepot/history/v1", outsider)
    assert hidden.status_code == unknown.status_code == 404
    assert hidden.text.replace(repo, "none") == unknown.text
    assert get(site, f"/v2/{repo}/_entrepot/history/none").json()["history"] == []
    assert get(site, path, n="x").status_code == 400
    assert get(site, f"/v2/{repo}/_entrepot/history/-").status_code == 400
    assert get(site, f"/v2/{repo}/_entrepot/other/v1").status_code == 404
