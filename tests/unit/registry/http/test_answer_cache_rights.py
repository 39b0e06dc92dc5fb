"""The response cache and rights. A *ready* answer (a response in the cache) is sent only to the account for which it
was made, and only as long as this account still has the right to it. `site.request.ready` says whether the last
response was a ready answer."""

from __future__ import annotations

import base64
import time
from collections.abc import AsyncIterator
from pathlib import Path

import bcrypt
import pytest

from registry.auth.password.hashing import hash_password
from registry.auth.token import api_tokens
from storage.access import AccountKind, AccountName, Grantee
from storage.names import RepositoryName
from storage.patterns import NamePattern
from tests.fakes.answer_cache_site import APP, TAG, V2, AnswerCacheSite
from tests.fakes.app_in_process import running_app
from tests.fakes.asgi_client import AsgiAnswer
from tests.fakes.auth_worker import PASSWORD, AuthClock
from tests.fakes.registry_content import push_image
from tests.fakes.store_accounts import BY, add_account, add_grant

pytestmark = pytest.mark.slow

ALICE = AccountName("alice")
CATALOG = "/v2/_catalog"


@pytest.fixture
async def open_site(tmp_path: Path) -> AsyncIterator[AnswerCacheSite]:
    """Yields a registry without accounts, in which everyone may pull."""
    async with running_app(tmp_path / "data") as service:
        yield AnswerCacheSite(service, tmp_path / "data", await push_image(service.hosted, APP, "x", "latest"))


@pytest.fixture
async def site(open_site: AnswerCacheSite) -> AnswerCacheSite:
    """A registry where `alice` may pull from repositories below `team`."""
    await add_account(open_site.service.accounts, "alice")
    await add_grant(open_site.service.accounts, "user:alice", "team/**", "pull")
    return open_site


def basic(name: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{name}:{secret}".encode()).decode()


async def ready(site: AnswerCacheSite, login: str, target: str = TAG) -> AsgiAnswer:
    """Sends the request until it gets a ready answer, and returns this answer."""
    return await site.cached_answer(target, headers={"authorization": login})


async def status(site: AnswerCacheSite, login: str | None, target: str = TAG) -> int:
    return (await site.request("GET", target, {"authorization": login} if login is not None else {})).status


# Changes of accounts, credentials and grants by other processes


async def test_the_first_account_makes_all_ready_answers_invalid(open_site: AnswerCacheSite) -> None:
    """After another process has added the first account, no request gets an answer that was cached before, whatever
    credential the request has."""
    unknown_login = "Basic " + base64.b64encode(b"hub:password").decode()
    await open_site.cached_answer(TAG)
    await ready(open_site, unknown_login)
    async with open_site.other_process() as other:
        await add_account(other.accounts, "alice")
    assert not open_site.has_ready(TAG)
    for login in (None, unknown_login):
        for target in (TAG, "/v2/", CATALOG):
            assert await status(open_site, login, target) == 401


@pytest.mark.parametrize("target", [TAG, f"{V2}/tags/list", CATALOG, "/v2/"])
async def test_the_first_request_with_a_login_is_not_cached_for_anonymous_clients(
    open_site: AnswerCacheSite, target: str
) -> None:
    """Another process adds the first account. The next request has a login of this account, whose rights allow the
    response. The worker looks for a ready answer before it notices the account, as if the request had no login.
    Nevertheless, it does not cache the response for clients without a login."""
    await open_site.cached_answer(target)
    async with open_site.other_process() as other:
        await add_account(other.accounts, "alice")
        await add_grant(other.accounts, "user:alice", "team/**", "pull")
    login = await open_site.service.token("alice")
    assert (await open_site.request("GET", "/api/v1/me", {"authorization": login})).status == 200
    for _ in range(3):
        assert await status(open_site, login, target) == 200
        assert await status(open_site, None, target) == 401


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
@pytest.mark.parametrize(
    ("removed", "status_after"), [("token", 401), ("grant", 404), ("account", 401), ("disabled", 401)]
)
async def test_the_next_request_is_refused_after_another_process_has_removed_a_right(
    site: AnswerCacheSite, scheme: str, removed: str, status_after: int
) -> None:
    """Another process removes a token, a grant or the account, or disables the account. Then the next request with the
    same header is refused."""
    login = await site.service.token("alice")
    authorization = login if scheme == "basic" else await site.service.bearer(login, "repository:team/app:pull")
    for target in (TAG, f"{V2}/tags/list", "/v2/"):
        await ready(site, authorization, target)
    async with site.other_process() as other:
        accounts = other.accounts
        match removed:
            case "token":
                for token in accounts.tokens(ALICE, None, 10).items:
                    await accounts.revoke_token(token.id, by=BY)
            case "grant":
                await accounts.remove_grant(Grantee.parse("user:alice"), NamePattern("team/**"), by=BY)
            case "account":
                await accounts.remove_account(ALICE, by=BY)
            case "disabled":
                await accounts.set_enabled(ALICE, False, by=BY)
    for target in (TAG, f"{V2}/tags/list"):
        assert await status(site, authorization, target) == status_after


async def test_a_changed_password_makes_old_ready_answers_invalid(site: AnswerCacheSite) -> None:
    """After a change of the password, the next request with the old password is refused. So is a request with a bearer
    token that was issued for the old password. Requests with the new password get new ready answers."""
    name = AccountName("bob")
    password_hash = hash_password(PASSWORD)
    await site.service.accounts.add_account(name, AccountKind.USER, password_hash=password_hash, admin=False, by=BY)
    await add_grant(site.service.accounts, "user:bob", "team/**", "pull")
    old, new = basic("bob", PASSWORD), basic("bob", "another horse battery")
    bearer = await site.service.bearer(old, "repository:team/app:pull")
    await ready(site, old)
    await ready(site, bearer)
    async with site.other_process() as other:
        await other.accounts.set_password(name, hash_password("another horse battery"), by=BY)
    for authorization in (old, bearer):
        assert await status(site, authorization) == 401
    await ready(site, new)
    assert await status(site, old) == 401


@pytest.mark.parametrize("scheme", ["basic", "bearer"])
async def test_an_expired_token_gets_no_ready_answer(tmp_path: Path, scheme: str) -> None:
    """When a token expires, its ready answers are no longer sent, although the store has not changed."""
    clock = AuthClock(time.time())
    async with running_app(tmp_path / "data", clock) as service:
        site = AnswerCacheSite(service, tmp_path / "data", await push_image(service.hosted, APP, "x", "latest"))
        await add_account(service.accounts, "alice")
        await add_grant(service.accounts, "user:alice", "team/**", "pull")
        end = clock() + 20.0
        token = api_tokens.make(ALICE, now=clock(), expires=end)
        await service.accounts.add_token(token.token, token.secret_hash, by=BY)
        login = basic("alice", token.text)
        authorization = login if scheme == "basic" else await service.bearer(login, "repository:team/app:pull")
        await ready(site, authorization)
        clock.now = end - 1.0
        await ready(site, authorization)
        clock.now = end
        assert not site.has_ready(TAG, {"authorization": authorization})
        assert await status(site, authorization) == 401


# Each ready answer belongs to one credential and one address


async def test_a_ready_answer_is_only_for_its_account(site: AnswerCacheSite) -> None:
    """A ready answer for one account is not sent to another account, to a client without a credential, or to one with a
    wrong credential."""
    alice = await site.service.token("alice")
    mallory = await site.service.user("mallory")
    await ready(site, alice)
    wrong = [alice[:-4] + "AAA=", alice.upper(), "Basic", "Basic x", "", "Bearer " + alice[6:]]
    for _ in range(3):
        assert await status(site, mallory) == 404
        assert await status(site, None) == 401
        for login in wrong:
            assert not site.has_ready(TAG, {"authorization": login})
            assert await status(site, login) in (401, 429)  # 429 after several failed logins
        assert not site.request.ready
        assert await status(site, alice) == 200


async def test_each_account_gets_its_own_catalog(site: AnswerCacheSite) -> None:
    """Each account has its own ready answer with the list of repositories."""
    await push_image(site.service.hosted, RepositoryName("other/one"), "y", "1")
    alice, bob = await site.service.token("alice"), await site.service.user("bob")
    await add_grant(site.service.accounts, "user:bob", "other/*", "pull")
    for login, names in ((alice, [APP]), (bob, ["other/one"])) * 3:
        assert (await ready(site, login, CATALOG)).json["repositories"] == names
        assert await status(site, None, CATALOG) == 401


async def test_an_image_that_everyone_may_pull_is_ready_for_everyone(site: AnswerCacheSite) -> None:
    """The response with an image that everyone may pull is cached for anonymous clients, and for each account
    separately. After the grant is removed, requests are refused."""
    await add_grant(site.service.accounts, "everyone", "team/*", "pull")
    mallory = await site.service.user("mallory")
    await site.cached_answer(TAG)
    await ready(site, mallory)
    assert await status(site, None, "/v2/") == 401
    async with site.other_process() as other:
        await other.accounts.remove_grant(Grantee.parse("everyone"), NamePattern("team/*"), by=BY)
    assert await status(site, None) == 401
    assert await status(site, mallory) == 404


async def test_two_authorization_headers_are_refused(site: AnswerCacheSite) -> None:
    """A request with two Authorization headers is refused, even if one has a ready answer or both are the same."""
    alice = await site.service.token("alice")
    await ready(site, alice)
    for pair in ((alice, alice), (alice, "Basic x"), ("Basic x", alice)):
        answer = await site.request("GET", TAG, [("authorization", authorization) for authorization in pair])
        assert (answer.status, site.request.ready) == (401, False)
    assert await status(site, alice) == 200


async def test_a_ready_answer_is_only_for_its_address(site: AnswerCacheSite) -> None:
    """A ready answer belongs to a credential and an address. From another address, the credential is checked again,
    because failed logins may have blocked that address. The cache keeps pairs of credential and address apart even if
    their concatenations are equal (here "…" + "192.0.2.7", and "…19" + "2.0.2.7")."""
    alice = await site.service.token("alice")
    site.request.address = "192.0.2.7"
    await ready(site, alice)
    site.request.address = "2.0.2.7"
    for authorization in (alice, f"{alice}19"):
        await site.request("GET", TAG, {"authorization": authorization})
        assert not site.request.ready


async def test_responses_for_htpasswd_accounts_are_not_cached(tmp_path: Path) -> None:
    """Responses for an account of the htpasswd file are not cached, because a change of the file does not change the
    version of the store. Once the line is removed, the next request is refused."""
    file = tmp_path / "htpasswd"
    file.write_bytes(b"carol:" + bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(4)) + b"\n")
    async with running_app(tmp_path / "data", auth={"htpasswd": file}) as service:
        site = AnswerCacheSite(service, tmp_path / "data", await push_image(service.hosted, APP, "x", "latest"))
        await add_grant(service.accounts, "authenticated", "team/**", "pull")
        carol = basic("carol", PASSWORD)
        bearer = await service.bearer(carol, "repository:team/app:pull")
        for authorization in (carol, bearer):
            assert (await site.never_ready(TAG, headers={"authorization": authorization})).status == 200
        file.write_bytes(b"")
        for authorization in (carol, bearer):
            assert await status(site, authorization) == 401
