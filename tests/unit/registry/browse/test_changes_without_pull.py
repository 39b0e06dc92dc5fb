"""Changes of a repository over the API by an account that may push to it and delete from it, but not pull: the
repository looks like one that does not exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.routing import APIRoute

from registry.admin import repository_routes, tag_routes
from storage.names import RepositoryName, Tag
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.asgi_client import AsgiAnswer
from tests.fakes.registry_content import BY, all_tags, push_image
from tests.fakes.store_accounts import add_grant, limit

APP = RepositoryName("team/app")
MISSING = RepositoryName("team/non")
DIGEST = "sha256:" + 64 * "0"
CHANGES: dict[tuple[str, str], list[dict[str, Any]]] = {
    ("PUT", "/tags/{tag}"): [{"digest": "v2"}, {"digest": DIGEST}, {"digest": "none"}],
    ("POST", "/tags/{tag}/restore"): [{}, {"to": DIGEST}, {"at": "2001-01-01T00:00:00Z"}],
    ("POST", "/tag-restoration"): [{"tags": [{"tag": "v2", "digest": DIGEST}]}],
    ("POST", "/tag-removal-plan"): [{"tags": ["v1"]}],
    ("POST", "/tag-removal"): [{"tags": ["v1"]}],
    ("PUT", "/description"): [{"text": "x"}, {"text": "x", "revision": 7}],
}
"""Bodies of requests that change a repository or plan a change, by method and end of the path."""
UPSTREAMS = [[], [{"name": "docker.io", "default": True, "endpoints": ["http://127.0.0.1:9"]}]]


async def push_content(site: AppInProcess) -> str:
    """Pushes two images to the repository, moves one of its tags, and deletes another. Returns the digest of the
    manifest to which the deleted tag pointed."""
    await push_image(site.hosted, APP, "first", "v1")
    await push_image(site.hosted, APP, "second", "v1", "v2")
    deleted = await push_image(site.hosted, APP, "third", "deleted")
    await site.hosted.delete_tag(APP, Tag("deleted"), by=BY)
    return deleted.digest


async def blind_account(site: AppInProcess) -> str:
    """Adds an account that may push and delete, but not pull. Returns the Authorization header of its logins."""
    login = await site.user("blind")
    await add_grant(site.accounts, "user:blind", "team/**", "push,delete")
    return login


def comparable(answer: AsgiAnswer, repo: str) -> tuple[int, bytes]:
    return answer.status, answer.body.replace(repo.encode(), b"NAME")


def test_all_changes_are_tested() -> None:
    """`CHANGES` has each route below `/api/v1/repositories/NAME` that is not a GET."""
    prefix = "/api/v1/repositories/{name:path}"
    routes = [*repository_routes.router.routes, *tag_routes.router.routes]
    changes = {
        (method, route.path.removeprefix(prefix))
        for route in routes
        if isinstance(route, APIRoute)
        for method in route.methods or ()
        if method != "GET"
    }
    assert changes == set(CHANGES)


@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.slow
async def test_the_api_answers_as_for_a_missing_repository(tmp_path: Path, upstream: list[Any]) -> None:
    """Each change gets the same 404, byte for byte, for the repository and for one that does not exist, also if a
    default upstream has more repositories. Nothing is changed."""
    async with running_app(tmp_path / "data", upstream=upstream) as site:
        deleted = await push_content(site)
        headers = {"authorization": await blind_account(site), "content-type": "application/json"}
        for (method, path), bodies in CHANGES.items():
            for body in bodies:
                data = json.dumps(body).replace(DIGEST, deleted).encode()
                path_with_tag = path.replace("{tag}", "deleted")
                answers = [
                    await site.client(method, f"/api/v1/repositories/{name}{path_with_tag}", headers, data)
                    for name in (APP, MISSING)
                ]
                assert (answers[0].status, answers[0].code) == (404, "NAME_UNKNOWN"), (path, answers[0].body)
                assert comparable(answers[0], APP) == comparable(answers[1], MISSING), path
        assert await all_tags(site.hosted, APP) == ["v1", "v2"]


async def test_a_token_without_pull_gets_a_challenge(tmp_path: Path) -> None:
    """If the account may pull but the limits of its token do not allow it, a change gets 401, because another login of
    the account would be accepted. The response has no digest."""
    async with running_app(tmp_path / "data") as site:
        await push_content(site)
        await site.user("alice")
        await add_grant(site.accounts, "user:alice", "team/**", "pull,push")
        for actions, status in (("push", 401), ("pull,push", 200)):
            token = await site.token("alice", [limit("team/**", actions)])
            headers = {"authorization": token, "content-type": "application/json"}
            path = f"/api/v1/repositories/{APP}/tags/deleted/restore"
            answer = await site.client("POST", path, headers, b"{}")
            assert (answer.status, b"sha256" in answer.body) == (status, status == 200)
