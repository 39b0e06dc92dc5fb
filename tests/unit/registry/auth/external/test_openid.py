"""The OpenID provider and login attempts, in one process."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from authlib.oauth2.rfc7636 import create_s256_code_challenge

from registry.auth.external import identity_http
from registry.auth.external.identity_claims import MAX_CLAIM_GROUPS
from registry.auth.external.login_attempts import ATTEMPT_SECONDS, LoginAttemptInvalid, LoginAttempts
from registry.auth.external.openid_login import AuthorizationResponse, LoginFailed
from registry.auth.external.openid_protocol import parse_token_response
from registry.auth.external.openid_provider import (
    METADATA_FRESH_SECONDS,
    METADATA_RETRY_SECONDS,
    METADATA_STALE_SECONDS,
    OpenIDProvider,
)
from registry.auth.external.openid_settings import (
    CodeRefused,
    ProviderInvalid,
    ProviderUnavailable,
    check_provider,
    provider_stamp,
)
from registry.auth.rights.principal import Identity
from registry.auth.token.signing_keys import SigningKeys
from registry.config import OIDCSettings
from storage.access import AccountKind, AccountName
from storage.errors import Unauthorized
from tests.fakes.auth_worker import ADMIN, ALICE, AT_HOME, CI, AuthClock, AuthWorker, auth_worker
from tests.fakes.openid_server import CLIENT, SECRET, CodeGrant, FakeOpenIDProvider, openid_provider

BACK = "http://127.0.0.1:5000/login/callback"


@pytest.fixture
def sso() -> Iterator[FakeOpenIDProvider]:
    with openid_provider() as made:
        yield made


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    return file


def settings(sso: FakeOpenIDProvider, **more: Any) -> OIDCSettings:
    return OIDCSettings(issuer=sso.url, client_id=CLIENT, **more)


async def code(sso: FakeOpenIDProvider, attempts: LoginAttempts) -> tuple[str, str]:
    """Returns an authorization code of the provider, and its verifier."""
    attempt = attempts.begin(BACK, "/")
    query = {
        "response_type": "code",
        "client_id": CLIENT,
        "scope": "openid",
        "code_challenge_method": "S256",
        "redirect_uri": BACK,
        "state": attempt.state,
        "nonce": attempt.nonce,
        "code_challenge": create_s256_code_challenge(attempt.verifier),
    }
    place = sso.authorize(query)
    return place.partition("code=")[2], attempt.verifier


async def test_it_is_asked_once_for_all(sso: FakeOpenIDProvider) -> None:
    """The provider's metadata is fetched at the first login and not at the start, once for all callers, and again after
    an hour. If that fetch fails, the known metadata is used for a day."""
    clock = AuthClock()
    provider = OpenIDProvider(settings(sso), clock)
    assert sso.paths == []
    await asyncio.gather(*(provider.metadata() for _ in range(5)))
    assert len(sso.paths) == 1
    clock.now += METADATA_FRESH_SECONDS
    sso.statuses["/.well-known/openid-configuration"] = 500
    before = await provider.metadata()
    assert len(sso.paths) == 2
    clock.now += METADATA_STALE_SECONDS
    with pytest.raises(ProviderUnavailable):
        await provider.metadata()
    sso.statuses.clear()
    clock.now += METADATA_RETRY_SECONDS
    assert await provider.metadata() == before
    await provider.aclose()


async def test_down(sso: FakeOpenIDProvider) -> None:
    """A provider that is down is asked again after some seconds, not with every login."""
    sso.statuses["/.well-known/openid-configuration"] = 503
    clock = AuthClock()
    provider = OpenIDProvider(settings(sso), clock)
    for _ in range(3):
        with pytest.raises(ProviderUnavailable):
            await provider.metadata()
    assert len(sso.paths) == 1
    sso.statuses.clear()
    clock.now += METADATA_RETRY_SECONDS
    assert (await provider.metadata()).token_url == f"{sso.url}/token"
    await provider.aclose()


async def test_nobody_there() -> None:
    """A refused connection is reported as an unavailable provider."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    provider = OpenIDProvider(OIDCSettings(issuer=f"http://127.0.0.1:{port}", client_id=CLIENT), AuthClock())
    with pytest.raises(ProviderUnavailable):
        await provider.metadata()
    await provider.aclose()


@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/token"])
@pytest.mark.slow
async def test_slow(sso: FakeOpenIDProvider, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A slow provider is given up after some seconds."""
    monkeypatch.setattr(identity_http, "TOTAL_SECONDS", 0.3)
    sso.held.add(path)
    provider = OpenIDProvider(settings(sso), AuthClock())
    with pytest.raises(ProviderUnavailable):
        await provider.redeem("code", "verifier", BACK)
    await provider.aclose()


@pytest.mark.parametrize(
    "described",
    [
        {"issuer": "https://other.example.com"},
        {"issuer": None},
        {"token_endpoint": "http://sso.example.com/token"},
        {"token_endpoint": None},
        {"token_endpoint": "https://u:p@sso.example.com/token"},
        {"authorization_endpoint": "javascript:alert(1)"},
        {"authorization_endpoint": "https://sso.example.com/a\r\nset-cookie: x=y"},
        {"authorization_endpoint": ["https://sso.example.com"]},
        {"jwks_uri": "ftp://sso.example.com/keys"},
    ],
    ids=str,
)
@pytest.mark.slow
async def test_descriptions_that_are_refused(sso: FakeOpenIDProvider, described: dict[str, Any]) -> None:
    """Metadata of another issuer, or with unsafe URLs, is refused."""
    sso.described = described
    provider = OpenIDProvider(settings(sso), AuthClock())
    with pytest.raises(ProviderUnavailable):
        await provider.metadata()
    await provider.aclose()


async def test_keys_that_moved_while_somebody_waited(sso: FakeOpenIDProvider) -> None:
    """If the URL of the keys changes during a fetch, waiting callers get an error, not a cancellation."""
    clock = AuthClock()
    provider = OpenIDProvider(settings(sso), clock)
    sso.held.add("/keys")
    waiting = asyncio.create_task((await provider.keys()).find("sso-1", "RS256"))
    deadline = time.monotonic() + 20
    while "/keys" not in sso.paths:
        assert time.monotonic() < deadline, "nobody asked"
        await asyncio.sleep(0.005)
    sso.described = {"jwks_uri": f"{sso.url}/other"}
    clock.now += METADATA_FRESH_SECONDS
    await provider.keys()
    assert await waiting is None
    await provider.aclose()


@pytest.mark.parametrize("public", [False, True], ids=["secret", "public"])
@pytest.mark.parametrize("post", [False, True], ids=["basic", "post"])
@pytest.mark.slow
async def test_how_the_client_shows_who_it_is(
    sso: FakeOpenIDProvider, worker: AuthWorker, secret: Path, post: bool, public: bool
) -> None:
    """The client sends its secret with Basic, or in the form if the provider wants that; a public client sends none. A
    code is accepted once."""
    sso.post, sso.secret = post, None if public else SECRET
    more = {} if public else {"client_secret_file": secret}
    provider = OpenIDProvider(settings(sso, **more), AuthClock())
    given, verifier = await code(sso, LoginAttempts(SigningKeys(worker.accounts, worker.clock), worker.clock))
    assert await provider.redeem(given, verifier, BACK) == sso.tokens[-1]
    assert ("client_secret" in sso.forms[-1]) == (post and not public)
    with pytest.raises(CodeRefused, match="invalid_grant"):
        await provider.redeem(given, verifier, BACK)
    await provider.aclose()


async def test_a_wrong_secret(sso: FakeOpenIDProvider, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong secret is refused. A secret that cannot be read is reported in the log only."""
    monkeypatch.setenv("SSO_SECRET", "wrong")
    provider = OpenIDProvider(settings(sso, client_secret_env="SSO_SECRET"), AuthClock())
    with pytest.raises(CodeRefused, match="invalid_client"):
        await provider.redeem("x", "y", BACK)
    monkeypatch.delenv("SSO_SECRET")
    with pytest.raises(ProviderUnavailable, match="not in SSO_SECRET"):
        await provider.redeem("x", "y", BACK)
    await provider.aclose()


@pytest.mark.parametrize(
    ("status", "body", "refusal"),
    [
        (400, b'{"error": "invalid_grant", "error_description": "Code ung\xc3\xbcltig"}', "invalid_grant"),
        (200, b'{"error": "invalid_grant"}', "invalid_grant"),
        (401, b"<html>", "unnamed"),
        (403, b'{"error": ["x"]}', "unnamed"),
        (400, b'{"error": "<b>"}', "unnamed"),
        (400, b"{}", "unnamed"),
        (400, b'{"id_token": "x"}', "unnamed"),
        (429, b'{"error": "slow_down"}', None),
        (302, b'{"id_token": "x"}', None),
        (503, b'{"id_token": "x"}', None),
        (200, b"<html>", None),
        (200, b'["id_token"]', None),
        (200, b'{"id_token": 7}', None),
        (200, b'{"access_token": "x"}', None),
        (200, b'{"id_token": "x", "expires_in": "soon"}', None),
        (200, b"[" * 20_000, None),
    ],
)
def test_token_responses(status: int, body: bytes, refusal: str | None) -> None:
    """If the provider refuses, the error has the provider's error code, provided that the code is fit for a log. Any
    other response without an ID token is reported as an unusable provider."""
    if refusal is None:
        with pytest.raises(ProviderUnavailable, match=f"status {status}"):
            parse_token_response(status, body)
    else:
        with pytest.raises(CodeRefused) as refused:
            parse_token_response(status, body)
        assert refused.value.reason == refusal


async def test_settings_are_looked_at_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server starts only if the settings have both the issuer and the client, and the secret can be read. The start
    sends no request."""
    monkeypatch.delenv("NOT_SET", raising=False)
    whole = OIDCSettings(issuer="https://sso.example.com", client_id=CLIENT)
    check_provider(OIDCSettings())
    check_provider(whole)
    for wrong, said in (
        (OIDCSettings(issuer="https://sso.example.com"), "oidc.client_id is not set"),
        (OIDCSettings(client_id=CLIENT), "oidc.issuer is not set"),
        (whole.model_copy(update={"client_secret_file": tmp_path / "none"}), "cannot read the client's secret"),
        (whole.model_copy(update={"client_secret_env": "NOT_SET"}), "is not in NOT_SET"),
    ):
        with pytest.raises(ProviderInvalid, match=said):
            check_provider(wrong)


# Attempts


async def test_an_attempt(worker: AuthWorker, clock: AuthClock) -> None:
    """A login attempt is valid on every worker for ten minutes, and only with its own state. Nobody else can read or
    change it."""
    attempts = LoginAttempts(SigningKeys(worker.accounts, clock), clock)
    attempt = attempts.begin(BACK, "/api/docs")
    sealed = await attempts.seal(attempt)
    assert LoginAttempts(SigningKeys(worker.accounts, clock), clock).open(sealed, attempt.state) == attempt
    for secret in (attempt.state, attempt.nonce, attempt.verifier):
        assert secret not in sealed
        assert len(secret) >= 43
    other = attempts.begin(BACK, "/")
    for wrong in ("", "x", "x.y", sealed[:-4], sealed[:-4] + "AAAA", sealed + "A" * 5000, "é.é"):
        with pytest.raises(LoginAttemptInvalid):
            attempts.open(wrong, attempt.state)
    for state in ("", other.state, "é", "\ud800"):
        with pytest.raises(LoginAttemptInvalid):
            attempts.open(sealed, state)
    clock.now += ATTEMPT_SECONDS
    with pytest.raises(LoginAttemptInvalid, match="too long"):
        attempts.open(sealed, attempt.state)


async def test_other_settings_end_sessions(data: Path, clock: AuthClock, sso: FakeOpenIDProvider) -> None:
    """A session ends when the provider's settings change."""
    before = settings(sso)
    async with auth_worker(data, clock, {"oidc": before}) as worker:
        await worker.add_user(ALICE)
        proof = Identity(ALICE, version=worker.accounts.account(ALICE).version, stamp=provider_stamp(before))
        assert worker.access.revocation_check.check(proof) == proof
    for after in ({"oidc": settings(sso, account_claim="sub")}, {}):
        async with auth_worker(data, clock, after) as worker:
            with pytest.raises(Unauthorized):
                worker.access.revocation_check.check(proof)


# Accounts and groups


async def logged_in(worker: AuthWorker, sso: FakeOpenIDProvider) -> Identity:
    """Logs in at the provider, and returns the identity. Raises LoginFailed."""
    openid = worker.access.openid_login
    assert openid is not None
    place, sealed = await openid.begin(BACK, "/")
    query = dict(part.split("=", 1) for part in place.partition("?")[2].split("&"))
    state, nonce, challenge = query["state"], query["nonce"], query["code_challenge"]
    given = "code-" + state
    sso.grants[given] = CodeGrant(challenge, BACK, nonce)
    result = await openid.finish(AuthorizationResponse(state, given), sealed, AT_HOME)
    return worker.access.login_sessions.verify(result.session)


async def test_groups(data: Path, clock: AuthClock, sso: FakeOpenIDProvider) -> None:
    """A session holds the claim's groups that the store has, at most a hundred."""
    clock.now = time.time()
    sso.secret = None
    async with auth_worker(data, clock, {"oidc": settings(sso, groups_claim="groups")}) as worker:
        await worker.add_user(ALICE)
        many = [f"{'g' * 50}-{number:03}" for number in range(MAX_CLAIM_GROUPS + 1)]
        for name in ("dev", *many):
            await worker.accounts.add_group(AccountName(name), by=ADMIN)
        sso.person["groups"] = ["dev", "none", "Not A Name", 5]
        assert (await logged_in(worker, sso)).groups == ("dev",)
        sso.person["groups"] = many
        assert (await logged_in(worker, sso)).groups == tuple(many[:MAX_CLAIM_GROUPS])


@pytest.mark.slow
async def test_first_login(data: Path, clock: AuthClock, sso: FakeOpenIDProvider) -> None:
    """With `create`, the first login creates a person without a password and without admin rights. It replaces no group
    and no robot."""
    clock.now = time.time()
    sso.secret = None
    async with auth_worker(data, clock, {"oidc": settings(sso, create=True)}) as worker:
        await worker.add_robot()
        await worker.accounts.add_group(AccountName("dev"), by=ADMIN)
        for _ in range(2):
            assert (await logged_in(worker, sso)).name == ALICE
        account = worker.accounts.account(ALICE)
        assert (account.kind, account.admin, account.has_password) == (AccountKind.USER, False, False)
        made = (await worker.audited("account.add"))[0]
        assert (made.actor, made.target, made.address) == ("system", "alice", AT_HOME.address)
        for name in (CI, "dev", "system", "Alice", "", None, 5, "a b"):
            sso.person["preferred_username"] = name
            with pytest.raises(LoginFailed):
                await logged_in(worker, sso)
        (*failed, _) = await worker.audited()
        assert {line.outcome for line in failed} == {"failed"}


async def test_without_create_nothing_is_made(data: Path, clock: AuthClock, sso: FakeOpenIDProvider) -> None:
    """Without `create`, a person without an account is refused."""
    clock.now = time.time()
    sso.secret = None
    async with auth_worker(data, clock, {"oidc": settings(sso)}) as worker:
        with pytest.raises(LoginFailed, match="no such account"):
            await logged_in(worker, sso)
        assert worker.accounts.accounts(None, None, 10).items == []
