"""Authentication of HTTP requests: which credentials are accepted, how they are cached, when changes in the store take
effect, and that a request is refused before its body is read."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.access import AccountName, AuditQuery, Grantee
from storage.content import OCI_MANIFEST
from storage.names import RepositoryName
from storage.patterns import NamePattern
from tests.fakes.app_in_process import AppInProcess, running_app
from tests.fakes.asgi_client import AsgiConnection, scope_of
from tests.fakes.registry_content import push_image
from tests.fakes.store_accounts import BY, add_account, add_grant

APP = RepositoryName("team/app")
TAG = "/v2/team/app/manifests/latest"


@pytest.fixture
async def open_service(tmp_path: Path) -> AsyncIterator[AppInProcess]:
    """Yields an application with an image and no accounts, so everyone may pull and push."""
    async with running_app(tmp_path / "data") as opened:
        await push_image(opened.hosted, APP, "x", "latest")
        yield opened


@pytest.fixture
async def service(open_service: AppInProcess) -> AppInProcess:
    """Returns an application with the account `alice`, which may pull and push below `team`."""
    await add_account(open_service.accounts, "alice")
    await add_grant(open_service.accounts, "user:alice", "team/**", "pull,push")
    return open_service


async def status(service: AppInProcess, login: str | None, target: str = TAG, method: str = "GET") -> int:
    return (await service.client(method, target, {"authorization": login} if login else {})).status


@pytest.mark.parametrize(
    "stray", ["Basic " + base64.b64encode(b"hub:password").decode(), "Basic !", "Bearer x", "Negotiate abc", "", "\xff"]
)
@pytest.mark.slow
async def test_without_accounts_credentials_are_ignored(open_service: AppInProcess, stray: str) -> None:
    """A registry without accounts ignores credentials, because older versions of docker send their login for Docker Hub
    to every mirror. After the first account was added, the credentials are checked."""
    for target in ("/v2/", TAG, "/v2/_catalog"):
        assert await status(open_service, stray, target) == 200
    await add_account(open_service.accounts, "alice")
    assert await status(open_service, stray, "/v2/") == 401


async def test_the_next_request_after_the_first_account_is_refused(open_service: AppInProcess) -> None:
    """After the first account was added, the next request needs a credential, and an account needs a grant."""
    assert await status(open_service, None) == 200
    await add_account(open_service.accounts, "alice")
    assert await status(open_service, None) == 401
    assert await status(open_service, await open_service.token("alice")) == 404


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
async def test_changes_in_the_store_apply_to_the_next_request(service: AppInProcess, scheme: str) -> None:
    """After a grant was added or removed, or an account was disabled, the change applies to the next request, even if
    the credential is cached."""
    login = await service.token("alice")
    authorization = login if scheme == "basic" else await service.bearer(login, "repository:team/app:pull")
    accounts, subject, pattern = service.accounts, Grantee.parse("user:alice"), NamePattern("team/**")
    for _ in range(2):
        assert await status(service, authorization) == 200
    await accounts.remove_grant(subject, pattern, by=BY)
    assert await status(service, authorization) == 404
    await add_grant(accounts, "user:alice", "team/**", "pull")
    assert await status(service, authorization) == 200
    await accounts.set_enabled(AccountName("alice"), False, by=BY)
    assert await status(service, authorization) == 401
    await accounts.set_enabled(AccountName("alice"), True, by=BY)
    # An API token is valid again. A bearer token is not, because it was issued for an earlier version of the account.
    assert await status(service, authorization) == (200 if scheme == "basic" else 401)


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
async def test_bearer_tokens_end_with_their_api_token(service: AppInProcess, scheme: str) -> None:
    """A revoked API token is refused at the next request, and so are the bearer tokens that were issued for it."""
    login = await service.token("alice")
    authorization = login if scheme == "basic" else await service.bearer(login, "repository:team/app:pull")
    assert await status(service, authorization) == 200
    (token,) = service.accounts.tokens(AccountName("alice"), None, 10).items
    await service.accounts.revoke_token(token.id, by=BY)
    assert await status(service, authorization) == 401


async def test_ambiguous_headers_are_refused(service: AppInProcess) -> None:
    """Two Authorization headers are refused, because a proxy may have checked only one of them. Other headers with a
    credential are ignored."""
    login, bearer = await service.token("alice"), await service.bearer(None, "repository:team/app:pull")
    assert await status(service, login) == 200
    for pair in ((login, bearer), (bearer, login), (login, login)):
        answer = await service.client("GET", TAG, [("authorization", each) for each in pair])
        assert answer.status == 401
    for other_header in (
        "proxy-authorization",
        "x-authorization",
        "authorization\x00",
        "x-forwarded-user",
        "remote-user",
    ):
        answer = await service.client("GET", TAG, [(other_header, login)])
        assert answer.status == 401


async def test_only_a_bad_bearer_token_gets_invalid_token(service: AppInProcess) -> None:
    """The response to a bad bearer token has the error `invalid_token`, which makes clients fetch a new token. The
    response to a bad password does not have it."""
    answer = await service.client("GET", TAG, {"authorization": "Bearer abc.def.ghi"})
    assert answer["www-authenticate"].endswith(',error="invalid_token"')
    wrong_login = "Basic " + base64.b64encode(b"alice:ent_000000000000_" + b"0" * 43).decode()
    answer = await service.client("GET", TAG, {"authorization": wrong_login})
    assert (answer.status, answer.code) == (401, "UNAUTHORIZED")
    assert "error=" not in answer["www-authenticate"]
    assert "0" * 43 not in answer.body.decode()


async def test_the_cache_has_no_secrets(service: AppInProcess) -> None:
    """The cache has keyed hashes of Authorization headers, and no secrets. A header with an invalid credential is not
    cached."""
    access = service.app.service.access
    assert access is not None
    cache = access.components.credential_verifier.cache
    login = await service.token("alice")
    assert await status(service, login) == 200
    assert await status(service, "Bearer abc.def.ghi") == 401
    assert len(cache) == 1
    key = cache.key_of(login.encode(), "192.0.2.7")
    assert cache.get(key) is not None
    assert len(key) == 16
    assert login not in repr(vars(cache))
    secret = base64.b64decode(login.removeprefix("Basic ")).decode().partition(":")[2]
    assert secret not in repr(vars(cache))


async def status_without_body(service: AppInProcess, method: str, target: str, login: str | None) -> int:
    """Sends a request whose body must not be read, and returns the status of the response."""
    headers = {"content-length": "1000000000", "content-type": OCI_MANIFEST, "expect": "100-continue"}
    if login:
        headers["authorization"] = login
    connection = AsgiConnection(method, [], leaves=False)

    async def receive() -> dict[str, object]:
        raise AssertionError("the body was asked for")

    await service.app(scope_of(method, target, headers), receive, connection.send)
    return connection.answer.status


@pytest.mark.parametrize("login", [None, "alice"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "manifests/1"),
        ("POST", "blobs/uploads/?digest=sha256:" + "0" * 64),
        ("PATCH", "blobs/uploads/00000000-0000-0000-0000-000000000000"),
        ("PUT", "blobs/uploads/00000000-0000-0000-0000-000000000000?digest=sha256:" + "0" * 64),
    ],
)
@pytest.mark.slow
async def test_requests_are_refused_before_the_body_is_read(
    service: AppInProcess, login: str | None, method: str, path: str
) -> None:
    """A refused request gets its response before the registry reads any of its body."""
    authorization = await service.token(login) if login else None
    assert await status_without_body(service, method, f"/v2/other/app/{path}", authorization) == (403 if login else 401)


async def test_calls_and_upload_sessions_belong_to_an_account(
    service: AppInProcess, caplog: pytest.LogCaptureFixture
) -> None:
    """The log line of a call has the name of the account. An upload session belongs to the account that started it."""
    await add_account(service.accounts, "bob")
    await add_grant(service.accounts, "user:bob", "team/**", "pull,push")
    alice, bob = await service.token("alice"), await service.token("bob")
    with caplog.at_level("DEBUG", "registry.calls"):
        answer = await service.client("POST", "/v2/team/app/blobs/uploads/", {"authorization": alice})
    assert "actor=alice" in caplog.text
    session = answer["location"]
    for method in ("GET", "PATCH", "DELETE"):
        assert await status(service, bob, session, method) == 404
    assert await status(service, alice, session) == 204


async def test_denials_of_accounts_are_in_the_audit_log(tmp_path: Path) -> None:
    """The audit log records denials with the account, the action, the repository, the address and a count. Refusals of
    anonymous clients are not recorded."""
    async with running_app(tmp_path / "data") as service:
        await add_account(service.accounts, "alice")
        login = await service.token("alice")
        accounts = service.accounts
        for _ in range(3):
            assert await status(service, login) == 404
        assert await status(service, login, "/v2/team/app/blobs/uploads/", "POST") == 403
        assert await status(service, None) == 401
        await service.audit_buffer.flush()
        lines = accounts.audit(AuditQuery(outcome="denied"), 10).items
    recorded = {(line.actor, line.action, line.target, line.address, line.count) for line in lines}
    assert recorded == {("alice", "pull", "team/app", "192.0.2.7", 3), ("alice", "push", "team/app", "192.0.2.7", 1)}


async def test_health_checks_need_no_login(service: AppInProcess) -> None:
    """Health checks need no login."""
    for path in ("/health/live", "/health/ready"):
        scope = scope_of("GET", path, {"host": "registry.test"})
        connection = AsgiConnection("GET", [], leaves=False)
        await service.app(scope, connection.receive, connection.send)
        assert connection.answer.status == 200
