"""An import over the network from an old registry that requires a login, refuses some repositories, or lists deleted
ones."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from registry.migration.request_retries import FAILURES_TO_END, MAX_REFUSED_REQUESTS
from storage.imports import ImportInvalid, OldRegistryDown
from tests.fakes.hub.hub import Hub
from tests.fakes.import_run import ImportRun
from tests.fakes.upstream_content import UpstreamContent, noise_image
from tests.fakes.upstream_source import answer, scripted_server
from tests.unit.registry.migration.remote_import.conftest import APP, Pauses

BAD_GATEWAY = answer(502, "<html>502 Bad Gateway</html>")


@pytest.fixture(autouse=True)
def password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLD_PASSWORD", "secret")


def asks_for_login() -> bytes:
    return answer(401, "", www_authenticate='Basic realm="r"')


def has_password(head: str) -> bool:
    return "authorization: basic" in head.lower()


def names_reply(names: list[str]) -> bytes:
    return answer(200, json.dumps({"repositories": names}))


def tags_reply(tags: list[str]) -> bytes:
    return answer(200, json.dumps({"tags": tags}))


def listing_reply(
    names: list[str], reply: Callable[[str], bytes], requested_paths: list[str]
) -> Callable[[str], bytes]:
    """Returns the `reply` of a server whose GET `/v2/` works and which lists the repositories with these names. `reply`
    responds to the other requests, by their path. `requested_paths` gets these paths."""

    def reply_to(head: str) -> bytes:
        path = head.split()[1]
        if path == "/v2/":
            return answer(200, "{}")
        if "/_catalog" in path:
            return names_reply(names)
        requested_paths.append(path)
        return reply(path)

    return reply_to


async def test_an_outage_behind_a_login_ends_the_import(run_import: ImportRun) -> None:
    """A proxy asks for the login before it asks the old registry, which is down: GET `/v2/` gets 401 without the login
    and 502 with it. So the import ends, although only one repository was asked for."""

    def reply(head: str) -> bytes:
        if not has_password(head):
            return asks_for_login()
        is_list = head.split()[1].endswith("/tags/list?n=1000")
        return tags_reply([f"{number:03}" for number in range(100)]) if is_list else BAD_GATEWAY

    async with scripted_server(reply) as script:
        with pytest.raises(OldRegistryDown, match="run the import again later"):
            await run_import(url=script.url, username="ann", password_env="OLD_PASSWORD")
    assert len(run_import.reports()) < 2 * FAILURES_TO_END


@pytest.mark.slow
async def test_a_token_service_that_is_down_ends_the_import(
    old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """GET `/v2/` gets a 401 from the old registry, but its token service is down. So no request can succeed."""
    for number in range(40):
        content.add(APP, noise_image(f"image {number}", 10), f"{number:02}")
    old_registry.put(content)
    old_registry.set(auth="bearer", username="ann", password="secret", token_uses=1)
    old_registry.fault(on="token", method="", skip=5, status=503, page=True, times=None)
    with pytest.raises(OldRegistryDown, match="run the import again later"):
        await run_import(jobs=1, username="ann", password_env="OLD_PASSWORD")


@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_a_broken_repository_behind_a_login_does_not_end_the_import(
    old_registry: Hub, run_import: ImportRun, content: UpstreamContent, auth: str
) -> None:
    """One repository is broken at an old registry that requires a login. GET `/v2/` works with the login, so the other
    repository is imported."""
    count = FAILURES_TO_END + 2
    for number in range(count):
        content.add("broken", noise_image(f"broken {number}", 10), f"{number:02}")
    content.add(APP, noise_image("image", 10), "1")
    old_registry.put(content)
    old_registry.set(auth=auth, username="ann", password="secret")
    old_registry.fault(on="manifest", method="", match="/broken/", status=502, times=None)

    result = await run_import(repositories=["broken", str(APP)], jobs=1, username="ann", password_env="OLD_PASSWORD")

    assert (result["tags"], result["problems"]) == (1, count)


@pytest.mark.parametrize("challenge", [False, True])
async def test_repositories_that_an_old_registry_refuses_to_anonymous_clients(
    run_import: ImportRun, pauses: Pauses, challenge: bool
) -> None:
    """Without a login, Artifactory responds with 403 and the code UNAUTHORIZED for private repositories. They are
    problems. They are no sign that the old registry is down, and the requests are not repeated."""
    private = [f"private/{number:02}" for number in range(FAILURES_TO_END + 2)]
    requested_paths: list[str] = []

    def reply(path: str) -> bytes:
        if "/private/" not in path:
            return tags_reply([])
        headers = {"www_authenticate": 'Basic realm="r"'} if challenge else {}
        return answer(403, '{"errors": [{"code": "UNAUTHORIZED", "message": "no permission"}]}', **headers)

    async with scripted_server(listing_reply([*private, "public"], reply, requested_paths)) as script:
        result = await run_import(url=script.url, repositories=None)
    assert (result["repositories"], result["problems"], pauses) == (len(private) + 1, len(private), [])
    assert any("/public/" in path for path in requested_paths)


async def test_deleted_repositories_in_the_list(run_import: ImportRun) -> None:
    """The old registry lists deleted repositories, and a proxy in front of it replaces the bodies of its 404 responses.
    They are problems, and do not end the import as long as GET `/v2/` works. After FAILURES_TO_END repositories, the
    requests are repeated only once."""
    deleted = [f"deleted{number:02}" for number in range(FAILURES_TO_END + 4)]
    requested_paths: list[str] = []

    def reply(path: str) -> bytes:
        return answer(404, "<html>not found</html>") if "/deleted" in path else tags_reply([])

    async with scripted_server(listing_reply([*deleted, "public"], reply, requested_paths)) as script:
        result = await run_import(url=script.url, repositories=None)
    assert result["problems"] == len(deleted)
    assert len(requested_paths) == 5 * FAILURES_TO_END + 2 * 4 + 1


async def test_a_short_failure_after_deleted_repositories(run_import: ImportRun) -> None:
    """The old registry lists many deleted repositories, and a proxy replaces the bodies of its 404 responses. Then one
    repository is broken. It is a problem like the deleted ones, and the next repository is read."""
    deleted = [f"deleted{number:02}" for number in range(FAILURES_TO_END)]
    requested_paths: list[str] = []

    def reply(path: str) -> bytes:
        if "/deleted" in path:
            return answer(404, "<html>not found</html>")
        return BAD_GATEWAY if "/failing/" in path else tags_reply([])

    async with scripted_server(listing_reply([*deleted, "failing", "public"], reply, requested_paths)) as script:
        result = await run_import(url=script.url, repositories=None)
    assert result["problems"] == len(deleted) + 1
    assert "/public/" in requested_paths[-1]


async def test_a_token_service_that_knows_only_scopes_of_repositories(run_import: ImportRun) -> None:
    """As at Quay, the token service responds with 400 to other scopes than those of repositories. One repository is
    broken. GET `/v2/` works with a token without a scope, so the next repository is read."""
    requested_paths: list[str] = []

    def reply(head: str) -> bytes:
        path = head.split()[1]
        if path.startswith("/token"):
            is_known = "scope=" not in path or "scope=repository" in path
            return answer(200, '{"token": "t"}') if is_known else answer(400, '{"error": "Invalid request"}')
        if "authorization:" not in head.lower():
            host = next(line.split()[1] for line in head.split("\r\n") if line.lower().startswith("host:"))
            return answer(401, "", www_authenticate=f'Bearer realm="http://{host}/token",service="s"')
        if path == "/v2/":
            return answer(200, "{}")
        requested_paths.append(path)
        if "/broken/" in path:
            return tags_reply([f"{number:02}" for number in range(20)]) if "/tags/" in path else BAD_GATEWAY
        return tags_reply([])

    async with scripted_server(reply) as script:
        result = await run_import(
            url=script.url, repositories=["broken", "public"], jobs=1, username="ann", password_env="OLD_PASSWORD"
        )
    assert result["problems"] == 20
    assert "/public/" in requested_paths[-1]


@pytest.mark.parametrize("auth", ["basic", "bearer"])
@pytest.mark.slow
async def test_private_repositories_do_not_end_the_import(run_import: ImportRun, auth: str) -> None:
    """The account may not pull from many repositories in a row, but the login is right: GET `/v2/` accepts it. So the
    repositories are problems, and the import goes on."""
    private = [f"private/{number:03}" for number in range(3 * MAX_REFUSED_REQUESTS)]
    requested_paths: list[str] = []

    def reply(head: str) -> bytes:
        path = head.split()[1]
        if path.startswith("/token"):
            return answer(200, '{"token": "t"}')
        if "authorization:" not in head.lower():
            if auth == "basic":
                return asks_for_login()
            host = next(line.split()[1] for line in head.split("\r\n") if line.lower().startswith("host:"))
            return answer(401, "", www_authenticate=f'Bearer realm="http://{host}/token",service="s"')
        if path == "/v2/":
            return answer(200, "{}")
        if "/_catalog" in path:
            return names_reply([*private, "public"])
        requested_paths.append(path)
        if "/private/" in path:
            return answer(403, '{"errors": [{"code": "DENIED", "message": "no"}]}')
        return tags_reply([])

    async with scripted_server(reply) as script:
        result = await run_import(url=script.url, repositories=None, username="ann", password_env="OLD_PASSWORD")
    assert result["problems"] == len(private)
    assert any("/public/" in path for path in requested_paths)


async def test_a_login_that_ends_during_a_repository(run_import: ImportRun) -> None:
    """The password stops working while a repository with many tags is imported. Each refused request can be a failed
    login, so the import ends after MAX_REFUSED_REQUESTS of them."""
    refusal_count = 0

    def reply(head: str) -> bytes:
        nonlocal refusal_count
        if not has_password(head):
            return asks_for_login()
        if head.split()[1].endswith("/tags/list?n=1000"):
            return tags_reply([f"{number:03}" for number in range(300)])
        refusal_count += 1
        return asks_for_login()

    async with scripted_server(reply) as script:
        with pytest.raises(ImportInvalid, match=r"refuses the login.* check the user name and the password"):
            await run_import(url=script.url, jobs=1, username="ann", password_env="OLD_PASSWORD")
    # A HEAD request, and the GET request that checks the login at the end.
    assert refusal_count == MAX_REFUSED_REQUESTS + 1


async def test_a_cached_token_does_not_hide_a_refused_password(run_import: ImportRun) -> None:
    """The token for the list of repositories is cached, and also valid for GET `/v2/`. Then the password stops working:
    the token service refuses it. The check of the login does not use the cached token, so the import ends."""
    names = [f"app{number:03}" for number in range(3 * MAX_REFUSED_REQUESTS)]
    token_requests = 0

    def reply(head: str) -> bytes:
        nonlocal token_requests
        path = head.split()[1]
        if path.startswith("/token"):
            token_requests += 1
            return answer(200, '{"token": "t", "expires_in": 3600}') if token_requests == 1 else answer(401)
        if "authorization: bearer" not in head.lower():
            host = next(line.split()[1] for line in head.split("\r\n") if line.lower().startswith("host:"))
            return answer(401, "", www_authenticate=f'Bearer realm="http://{host}/token",service="s"')
        return names_reply(names) if "/_catalog" in path else answer(200, "{}")

    async with scripted_server(reply) as script:
        with pytest.raises(ImportInvalid, match=r"refuses the login.* check the user name and the password"):
            await run_import(url=script.url, repositories=None, username="ann", password_env="OLD_PASSWORD")
    assert len(run_import.reports()) == MAX_REFUSED_REQUESTS - 1
