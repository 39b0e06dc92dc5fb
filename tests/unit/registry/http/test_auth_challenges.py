"""The challenge in a 401 response (the header WWW-Authenticate): its realm, service, scope and error. No request can
inject text into the challenge."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from registry.http import Challenges
from storage.names import RepositoryName, Tag
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.registry_content import push_image
from tests.fakes.store_accounts import add_account, add_grant

CHALLENGE = re.compile(
    r'Bearer realm="(https?://[^"\\\s]+)/token",service="([^"\\\s]+)"'
    r'(?:,scope="([a-z0-9:._/,* -]+)")?(?:,error="([a-z_]+)")?'
)
"""The parts of a challenge: the realm, the service, the scope and the error."""
DIGEST = "sha256:" + "0" * 64


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AppInProcess]:
    """Yields a registry with one account and no content. All tests share it."""
    async with running_app(tmp_path_factory.mktemp("service") / "data") as opened:
        await add_account(opened.accounts, "root", admin=True)
        yield opened


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/v2/", None),
        ("GET", "/v2/_catalog", "registry:catalog:*"),
        ("GET", "/v2/a/b/manifests/1", "repository:a/b:pull"),
        ("HEAD", f"/v2/a/b/blobs/{DIGEST}", "repository:a/b:pull"),
        ("GET", "/v2/a/b/tags/list", "repository:a/b:pull"),
        ("GET", f"/v2/a/b/referrers/{DIGEST}", "repository:a/b:pull"),
        ("PUT", "/v2/a/b/manifests/1", "repository:a/b:pull,push"),
        ("POST", "/v2/a/b/blobs/uploads/", "repository:a/b:pull,push"),
        ("POST", f"/v2/a/b/blobs/uploads/?mount={DIGEST}", "repository:a/b:pull,push"),
        ("POST", f"/v2/a/b/blobs/uploads/?mount={DIGEST}&from=c/d", "repository:a/b:pull,push repository:c/d:pull"),
        ("POST", "/v2/a/b/blobs/uploads/?from=c/d", "repository:a/b:pull,push"),
        ("PATCH", "/v2/a/b/blobs/uploads/00000000-0000-0000-0000-000000000000", "repository:a/b:pull,push"),
        ("GET", "/v2/a/b/blobs/uploads/00000000-0000-0000-0000-000000000000", "repository:a/b:pull,push"),
        ("DELETE", "/v2/a/b/blobs/uploads/00000000-0000-0000-0000-000000000000", "repository:a/b:pull,push"),
        ("DELETE", "/v2/a/b/manifests/1", "repository:a/b:delete"),
        ("DELETE", f"/v2/a/b/blobs/{DIGEST}", "repository:a/b:delete"),
    ],
)
async def test_the_scope_has_the_rights_that_the_request_needs(
    service: AppInProcess, method: str, path: str, scope: str | None
) -> None:
    """The scope in the challenge has the rights that the request needs, for the repository name in the request."""
    answer = await service.client(method, path, {"host": "registry.test:5000"})
    assert answer.status == 401
    challenge = CHALLENGE.fullmatch(answer["www-authenticate"])
    assert challenge is not None
    assert challenge.groups() == ("http://registry.test:5000", "entrepot", scope, None)
    assert answer["cache-control"] == "no-store"


@pytest.mark.parametrize(
    "source", ['c"d', "c/d%22,x=%22", "C/D", "a//b", "../x", "a%0d%0ab", "%00", "%", "x" * 300, "", "&from=e/f"]
)
async def test_an_invalid_mount_source_is_not_repeated_in_the_challenge(service: AppInProcess, source: str) -> None:
    """If the source of a mount is not a valid name, it is not repeated in the challenge. A query that cannot be parsed
    gets 400 without a challenge."""
    answer = await service.client("POST", f"/v2/a/b/blobs/uploads/?mount={DIGEST}&from={source}")
    if answer.status == 400:
        assert "www-authenticate" not in answer
        return
    challenge = CHALLENGE.fullmatch(answer["www-authenticate"])
    assert challenge is not None
    assert challenge[3] == "repository:a/b:pull,push"


@pytest.mark.parametrize(
    ("host", "valid"),
    [
        ("registry.test", True),
        ("my_registry:5000", True),
        ("REGISTRY.test:443", True),
        ("127.0.0.1:5000", True),
        ("[::1]:5000", True),
        ("registry.test@evil.test", False),
        ("user:pass@registry.test", False),
        ("registry.test/../evil", False),
        ('registry.test",service="evil', False),
        ("registry.test\r\nx: y", False),
        ("registry.test\n", False),
        ("registry.test:", False),
        ("registry.test:99999999", False),
        ("registry test", False),
        ("-registry.test", False),
        ("evil.test#", False),
        ("evil.test?x", False),
        ("evil.test\\", False),
        ("[evil.test]", False),
        ("evil.test%00", False),
        ("ev\u00edl.test", False),
        ("", False),
        ("x" * 300, False),
    ],
)
async def test_an_invalid_host_is_not_in_the_realm(service: AppInProcess, host: str, valid: bool) -> None:
    """If the Host header is not a valid host, the realm has the server's own address."""
    answer = await service.client("GET", "/v2/a/manifests/1", {"host": host})
    challenge = CHALLENGE.fullmatch(answer["www-authenticate"])
    assert challenge is not None
    assert challenge[1] == ("http://" + (host if valid else "127.0.0.1:5000"))


async def test_without_a_host_the_realm_is_at_the_servers_address(service: AppInProcess) -> None:
    """Without a Host header, as HTTP/1.0 allows, the realm has the server's own address."""
    answer = await service.client("GET", "/v2/")
    assert answer["www-authenticate"].startswith('Bearer realm="http://127.0.0.1:5000/token"')


async def test_the_realm_is_at_the_public_url_whatever_the_host(tmp_path: Path) -> None:
    """If `public_url` is set, the realm, the service and the Location headers are made from it, whatever the Host
    header says."""
    async with running_app(tmp_path / "data", public_url="https://registry.example.com") as service:
        root = await service.user("root", admin=True)
        for host in ("evil.test", "registry.example.com"):
            answer = await service.client("GET", "/v2/", {"host": host})
            assert answer["www-authenticate"] == (
                'Bearer realm="https://registry.example.com/token",service="registry.example.com"'
            )
            answer = await service.client("POST", "/v2/a/b/blobs/uploads/", {"host": host, "authorization": root})
            assert answer["location"].startswith("https://registry.example.com/v2/a/b/blobs/uploads/")


async def test_a_location_never_contains_the_host(service: AppInProcess) -> None:
    """Without `public_url`, a Location header has only a path, and not the host of the request."""
    root = await service.token("root")
    answer = await service.client("POST", "/v2/a/b/blobs/uploads/", {"host": "evil.test", "authorization": root})
    assert answer["location"].startswith("/v2/a/b/blobs/uploads/")
    assert not any("evil" in value for _, value in answer.fields)


async def test_forwarded_headers_do_not_change_the_realm(service: AppInProcess) -> None:
    """Headers such as X-Forwarded-Host do not change the realm, because any client can send them."""
    headers = {"host": "registry.test", "x-forwarded-host": "evil.test", "x-forwarded-proto": "https"}
    headers |= {"forwarded": "host=evil.test;proto=https", "x-original-host": "evil.test", "x-host": "evil.test"}
    answer = await service.client("GET", "/v2/", headers)
    assert answer["www-authenticate"].startswith('Bearer realm="http://registry.test/token"')


async def test_a_service_that_would_break_the_header_is_refused_at_the_start() -> None:
    """A service name that would need escapes in the challenge is refused."""
    for service in ('a"b', "a\\b", "a\nb", "\u00e9"):
        with pytest.raises(ValueError, match="service"):
            Challenges(None, service)


async def test_a_token_with_the_scope_of_the_challenge_is_enough(tmp_path: Path) -> None:
    """A token with the scope of the challenge is enough for the request. Docker asks for such a token after a 401."""
    async with running_app(tmp_path / "data") as service:
        await add_account(service.accounts, "root", admin=True)
        await push_image(service.hosted, RepositoryName("team/app"), "x", "latest")
        await add_grant(service.accounts, "everyone", "team/**", "pull")
        await add_grant(service.accounts, "user:alice", "team/**", "pull,push")
        alice = await service.user("alice")
        for method, path, login, status in (
            ("GET", "/v2/team/app/manifests/latest", None, 200),
            ("POST", "/v2/team/app/blobs/uploads/", alice, 202),
            ("GET", "/v2/_catalog", alice, 200),
        ):
            answer = await service.client(
                method, path, {"authorization": await service.bearer(None, "repository:x:pull")}
            )
            challenge = CHALLENGE.fullmatch(answer["www-authenticate"])
            assert challenge is not None
            scope = challenge[3]
            assert scope is not None
            token = await service.bearer(login, scope)
            assert (await service.client(method, path, {"authorization": token})).status == status
        assert await service.hosted.resolve_manifest(RepositoryName("team/app"), Tag("latest"))
