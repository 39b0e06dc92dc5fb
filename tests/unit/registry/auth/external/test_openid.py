"""Login at an OpenID provider: the provider's metadata, keys and tokens, login attempts, and the accounts and groups of
the persons."""

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
from registry.auth.external.openid_login import EXCHANGE_LIMITS, AuthorizationResponse, LoginFailed
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
from registry.auth.password.throttle import BY_ADDRESS
from registry.auth.rights.principal import Identity
from registry.auth.token.signing_keys import SigningKeys
from registry.config import OIDCSettings
from registry.config.auth_settings import AuthSettings
from storage.access import AccountKind, AccountName
from storage.content import Actor
from storage.errors import Denied, TooManyRequests, Unauthorized, UpstreamUnavailable
from tests.fakes.auth_worker import ADMIN, ALICE, CI, KNOWN_ADDRESS, OTHER_ADDRESS, AuthClock, AuthWorker, auth_worker
from tests.fakes.openid_server import CLIENT, SECRET, CodeGrant, FakeOpenIDProvider, openid_provider
from tests.unit.registry.conftest import wait_until

REDIRECT_URI = "http://127.0.0.1:5000/login/callback"
"""The URL of the registry to which the provider sends the browser back."""


BCRYPT = "$2b$04$" + "a" * 53
"""A valid bcrypt hash; no test needs its password."""


@pytest.fixture
def fake_provider() -> Iterator[FakeOpenIDProvider]:
    with openid_provider() as provider:
        yield provider


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    return file


def settings(fake_provider: FakeOpenIDProvider, **options: Any) -> OIDCSettings:
    return OIDCSettings(issuer=fake_provider.url, client_id=CLIENT, **options)


async def authorization_code(fake_provider: FakeOpenIDProvider, attempts: LoginAttempts) -> tuple[str, str]:
    """Returns an authorization code of the provider, and the verifier that belongs to the code (PKCE)."""
    attempt = attempts.begin(REDIRECT_URI, "/")
    query = {
        "response_type": "code",
        "client_id": CLIENT,
        "scope": "openid",
        "code_challenge_method": "S256",
        "redirect_uri": REDIRECT_URI,
        "state": attempt.state,
        "nonce": attempt.nonce,
        "code_challenge": create_s256_code_challenge(attempt.verifier),
    }
    redirect_url = fake_provider.authorize(query)
    return redirect_url.partition("code=")[2], attempt.verifier


async def test_metadata_is_fetched_once_and_again_after_an_hour(fake_provider: FakeOpenIDProvider) -> None:
    """The provider's metadata is fetched at the first login, not when the server starts. Concurrent callers share one
    fetch. After an hour, the metadata is fetched again. If that fails, the known metadata is used for a day."""
    clock = AuthClock()
    provider = OpenIDProvider(settings(fake_provider), clock)
    assert fake_provider.paths == []
    await asyncio.gather(*(provider.metadata() for _ in range(5)))
    assert len(fake_provider.paths) == 1
    clock.now += METADATA_FRESH_SECONDS
    fake_provider.statuses["/.well-known/openid-configuration"] = 500
    before = await provider.metadata()
    assert len(fake_provider.paths) == 2
    clock.now += METADATA_STALE_SECONDS
    with pytest.raises(ProviderUnavailable):
        await provider.metadata()
    fake_provider.statuses.clear()
    clock.now += METADATA_RETRY_SECONDS
    assert await provider.metadata() == before
    await provider.aclose()


async def test_the_fetch_is_repeated_only_after_a_pause(fake_provider: FakeOpenIDProvider) -> None:
    """If the provider is down, its metadata is requested again after some seconds, and not with every login."""
    fake_provider.statuses["/.well-known/openid-configuration"] = 503
    clock = AuthClock()
    provider = OpenIDProvider(settings(fake_provider), clock)
    for _ in range(3):
        with pytest.raises(ProviderUnavailable):
            await provider.metadata()
    assert len(fake_provider.paths) == 1
    fake_provider.statuses.clear()
    clock.now += METADATA_RETRY_SECONDS
    assert (await provider.metadata()).token_url == f"{fake_provider.url}/token"
    await provider.aclose()


async def test_a_refused_connection_is_an_unavailable_provider() -> None:
    """A refused connection is reported as an unavailable provider."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    provider = OpenIDProvider(OIDCSettings(issuer=f"http://127.0.0.1:{port}", client_id=CLIENT), AuthClock())
    with pytest.raises(ProviderUnavailable):
        await provider.metadata()
    await provider.aclose()


@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/token"])
@pytest.mark.slow
async def test_requests_to_a_slow_provider_time_out(
    fake_provider: FakeOpenIDProvider, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """A request to the provider times out after some seconds."""
    monkeypatch.setattr(identity_http, "TOTAL_SECONDS", 0.3)
    fake_provider.delayed_paths.add(path)
    provider = OpenIDProvider(settings(fake_provider), AuthClock())
    with pytest.raises(ProviderUnavailable):
        await provider.redeem("code", "verifier", REDIRECT_URI)
    await provider.aclose()


@pytest.mark.parametrize(
    "metadata",
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
async def test_unsafe_metadata_is_refused(fake_provider: FakeOpenIDProvider, metadata: dict[str, Any]) -> None:
    """Metadata of another issuer, or with unsafe URLs, is refused."""
    fake_provider.metadata_changes = metadata
    provider = OpenIDProvider(settings(fake_provider), AuthClock())
    with pytest.raises(ProviderUnavailable):
        await provider.metadata()
    await provider.aclose()


async def test_the_url_of_the_keys_changes_during_a_fetch(fake_provider: FakeOpenIDProvider) -> None:
    """If the URL of the keys changes while a caller waits for the keys, the caller gets no key. It is not cancelled."""
    clock = AuthClock()
    provider = OpenIDProvider(settings(fake_provider), clock)
    fake_provider.delayed_paths.add("/keys")
    waiting = asyncio.create_task((await provider.keys()).find("sso-1", "RS256"))
    deadline = time.monotonic() + 20
    while "/keys" not in fake_provider.paths:
        assert time.monotonic() < deadline, "nobody asked"
        await asyncio.sleep(0.005)
    fake_provider.metadata_changes = {"jwks_uri": f"{fake_provider.url}/other"}
    clock.now += METADATA_FRESH_SECONDS
    await provider.keys()
    assert await waiting is None
    await provider.aclose()


@pytest.mark.parametrize("public", [False, True], ids=["secret", "public"])
@pytest.mark.parametrize("post", [False, True], ids=["basic", "post"])
@pytest.mark.slow
async def test_how_the_registry_authenticates_at_the_provider(
    fake_provider: FakeOpenIDProvider, worker: AuthWorker, secret: Path, post: bool, public: bool
) -> None:
    """The registry sends its client secret in a Basic header, or in the form if the provider's metadata says so. A
    public client sends no secret. A code is accepted once."""
    fake_provider.takes_secret_in_form, fake_provider.secret = post, None if public else SECRET
    options = {} if public else {"client_secret_file": secret}
    provider = OpenIDProvider(settings(fake_provider, **options), AuthClock())
    received_code, verifier = await authorization_code(
        fake_provider, LoginAttempts(SigningKeys(worker.accounts, worker.clock), worker.clock)
    )
    assert await provider.redeem(received_code, verifier, REDIRECT_URI) == fake_provider.tokens[-1]
    assert ("client_secret" in fake_provider.forms[-1]) == (post and not public)
    with pytest.raises(CodeRefused, match="invalid_grant"):
        await provider.redeem(received_code, verifier, REDIRECT_URI)
    await provider.aclose()


async def test_a_wrong_or_unreadable_client_secret(
    fake_provider: FakeOpenIDProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the provider refuses the client secret, the code is refused. If the secret cannot be read, the provider counts
    as unavailable."""
    monkeypatch.setenv("SSO_SECRET", "wrong")
    provider = OpenIDProvider(settings(fake_provider, client_secret_env="SSO_SECRET"), AuthClock())
    with pytest.raises(CodeRefused, match="invalid_client"):
        await provider.redeem("x", "y", REDIRECT_URI)
    monkeypatch.delenv("SSO_SECRET")
    with pytest.raises(ProviderUnavailable, match="not in SSO_SECRET"):
        await provider.redeem("x", "y", REDIRECT_URI)
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
    """If the provider refuses the code, the error has the provider's error code, or `unnamed` if that code is not safe
    to log. Any other response without an ID token means that the provider is unavailable."""
    if refusal is None:
        with pytest.raises(ProviderUnavailable, match=f"status {status}"):
            parse_token_response(status, body)
    else:
        with pytest.raises(CodeRefused) as refused:
            parse_token_response(status, body)
        assert refused.value.reason == refusal


async def test_settings_are_checked_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server starts only if the settings have both the issuer and the client or neither, and if the secret can be
    read. The check sends no request."""
    monkeypatch.delenv("NOT_SET", raising=False)
    complete = OIDCSettings(issuer="https://sso.example.com", client_id=CLIENT)
    check_provider(OIDCSettings())
    check_provider(complete)
    for wrong, message in (
        (OIDCSettings(issuer="https://sso.example.com"), "oidc.client_id is not set"),
        (OIDCSettings(client_id=CLIENT), "oidc.issuer is not set"),
        (complete.model_copy(update={"client_secret_file": tmp_path / "none"}), "cannot read the client's secret"),
        (complete.model_copy(update={"client_secret_env": "NOT_SET"}), "is not in NOT_SET"),
    ):
        with pytest.raises(ProviderInvalid, match=message):
            check_provider(wrong)


# Login attempts


async def test_a_login_attempt(worker: AuthWorker, clock: AuthClock) -> None:
    """A login attempt is sealed (encrypted) in a cookie. It is valid on every worker for ten minutes, and only together
    with its own state. Clients can neither read nor change it."""
    attempts = LoginAttempts(SigningKeys(worker.accounts, clock), clock)
    attempt = attempts.begin(REDIRECT_URI, "/api/docs")
    sealed = await attempts.seal(attempt)
    assert LoginAttempts(SigningKeys(worker.accounts, clock), clock).open(sealed, attempt.state) == attempt
    for secret in (attempt.state, attempt.nonce, attempt.verifier):
        assert secret not in sealed
        assert len(secret) >= 43
    other = attempts.begin(REDIRECT_URI, "/")
    for wrong in ("", "x", "x.y", sealed[:-4], sealed[:-4] + "AAAA", sealed + "A" * 5000, "é.é"):
        with pytest.raises(LoginAttemptInvalid):
            attempts.open(wrong, attempt.state)
    for state in ("", other.state, "é", "\ud800"):
        with pytest.raises(LoginAttemptInvalid):
            attempts.open(sealed, state)
    clock.now += ATTEMPT_SECONDS
    with pytest.raises(LoginAttemptInvalid, match="too long"):
        attempts.open(sealed, attempt.state)


async def test_changed_settings_end_sessions(data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider) -> None:
    """A session ends when the provider's settings change."""
    before = settings(fake_provider)
    async with auth_worker(data, clock, {"oidc": before}) as worker:
        await worker.add_user(ALICE)
        proof = Identity(ALICE, version=worker.accounts.account(ALICE).version, stamp=provider_stamp(before))
        assert worker.access.revocation_check.check(proof) == proof
    for after in ({"oidc": settings(fake_provider, account_claim="sub")}, {}):
        async with auth_worker(data, clock, after) as worker:
            with pytest.raises(Unauthorized):
                worker.access.revocation_check.check(proof)


# Accounts and groups


async def log_in(worker: AuthWorker, fake_provider: FakeOpenIDProvider, by: Actor = KNOWN_ADDRESS) -> Identity:
    """Logs in at the provider, and returns the identity of the session. Raises LoginFailed."""
    openid = worker.access.openid_login
    assert openid is not None
    redirect_url, sealed = await openid.begin(REDIRECT_URI, "/")
    query = dict(part.split("=", 1) for part in redirect_url.partition("?")[2].split("&"))
    state, nonce, challenge = query["state"], query["nonce"], query["code_challenge"]
    code = "code-" + state
    fake_provider.grants[code] = CodeGrant(challenge, REDIRECT_URI, nonce)
    result = await openid.finish(AuthorizationResponse(state, code), sealed, by)
    return worker.access.login_sessions.verify(result.session)


async def begin_login(worker: AuthWorker) -> tuple[str, str]:
    """Begins a login. Returns its state and its sealed attempt."""
    assert worker.access.openid_login is not None
    redirect_url, sealed = await worker.access.openid_login.begin(REDIRECT_URI, "/")
    return dict(part.split("=", 1) for part in redirect_url.partition("?")[2].split("&"))["state"], sealed


async def finish_login(worker: AuthWorker, state: str, sealed: str, by: Actor = KNOWN_ADDRESS) -> LoginFailed:
    """Finishes a login with an invented code. Returns the error."""
    assert worker.access.openid_login is not None
    with pytest.raises(LoginFailed) as failed:
        await worker.access.openid_login.finish(AuthorizationResponse(state, "invented"), sealed, by)
    return failed.value


async def test_attempt_is_used_once(data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider) -> None:
    """A login attempt causes one request to the provider at most, on all workers together."""
    fake_provider.secret = None
    options = {"oidc": settings(fake_provider)}
    async with auth_worker(data, clock, options) as worker, auth_worker(data, clock, options) as other_worker:
        state, sealed = await begin_login(worker)
        errors = await asyncio.gather(*(finish_login(worker, state, sealed) for _ in range(3)))
        errors.append(await finish_login(other_worker, state, sealed))
        assert fake_provider.paths.count("/token") == 1
        assert sum("used before" in error.reason for error in errors) == 3
        assert all(error.is_finished for error in errors)


async def test_invented_codes_are_throttled(data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider) -> None:
    """Codes that the provider refuses count as failed logins of the client's address. After too many, the registry
    sends no more codes from this address to the provider, and other addresses can still log in."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider)}) as worker:
        await worker.add_user(ALICE)
        for _ in range(BY_ADDRESS.burst):
            assert isinstance((await finish_login(worker, *await begin_login(worker))).shown_error, Denied)
        before = fake_provider.paths.count("/token")
        error = await finish_login(worker, *await begin_login(worker))
        assert isinstance(error.shown_error, TooManyRequests)
        assert not error.is_finished
        assert fake_provider.paths.count("/token") == before
        assert (await log_in(worker, fake_provider, OTHER_ADDRESS)).name == ALICE


async def test_failures_of_the_provider_are_not_counted(
    data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider
) -> None:
    """A login that fails because the provider fails does not count as a failed login of the client's address."""
    fake_provider.statuses["/token"] = 503
    async with auth_worker(data, clock, {"oidc": settings(fake_provider)}) as worker:
        for _ in range(BY_ADDRESS.burst + 1):
            error = await finish_login(worker, *await begin_login(worker))
        assert isinstance(error.shown_error, UpstreamUnavailable)


async def test_one_network_cannot_take_all_exchanges(
    data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider
) -> None:
    """While the provider is slow, only a few logins of one network exchange a code at the same time. Some more wait,
    the rest are refused, and a login from another network goes on."""
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider)}) as worker:
        first_attempts = [await begin_login(worker) for _ in range(EXCHANGE_LIMITS.max_pending_per_visitor + 4)]
        other_attempt = await begin_login(worker)
        fake_provider.delayed_paths.add("/token")
        logins = [asyncio.create_task(finish_login(worker, *attempt)) for attempt in first_attempts]
        logins.append(asyncio.create_task(finish_login(worker, *other_attempt, by=OTHER_ADDRESS)))
        deadline = time.monotonic() + 30
        while fake_provider.paths.count("/token") < 1 + EXCHANGE_LIMITS.max_running_per_visitor:
            assert time.monotonic() < deadline, "the login from the other network does not go on"
            await asyncio.sleep(0.01)
        refused = [login for login in logins if login.done()]
        assert len(refused) == len(first_attempts) - EXCHANGE_LIMITS.max_pending_per_visitor
        assert all(isinstance(login.result().shown_error, TooManyRequests) for login in refused)
        assert fake_provider.paths.count("/token") == 1 + EXCHANGE_LIMITS.max_running_per_visitor
        for login in logins:
            login.cancel()
        await asyncio.gather(*logins, return_exceptions=True)


async def test_disconnected_client_does_not_stop_the_count(
    data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider
) -> None:
    """A client that disconnects while its code is exchanged does not stop the exchange. The refused code counts as a
    failed login of its address, and the client holds its slot until the provider has answered."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider)}) as worker:
        for _ in range(BY_ADDRESS.burst - 1):
            await finish_login(worker, *await begin_login(worker))
        fake_provider.delayed_paths.add("/token")
        fake_provider.open.clear()
        login = asyncio.create_task(finish_login(worker, *await begin_login(worker)))
        await wait_until(lambda: fake_provider.paths.count("/token") == BY_ADDRESS.burst)
        login.cancel()
        await asyncio.wait([login])
        fake_provider.open.set()
        key, until = f"provider {KNOWN_ADDRESS.address}", clock.now + BY_ADDRESS.cost_seconds * BY_ADDRESS.burst
        await wait_until(lambda: worker.accounts.throttled_until(key) >= until)
        assert isinstance((await finish_login(worker, *await begin_login(worker))).shown_error, TooManyRequests)


async def test_groups_of_a_session(data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider) -> None:
    """A session has the groups in the provider's claim that the store has too, at most a hundred."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider, groups_claim="groups")}) as worker:
        await worker.add_user(ALICE)
        group_names = [f"{'g' * 50}-{number:03}" for number in range(MAX_CLAIM_GROUPS + 1)]
        for name in ("dev", *group_names):
            await worker.accounts.add_group(AccountName(name), by=ADMIN)
        fake_provider.person["groups"] = ["dev", "none", "Not A Name", 5]
        assert (await log_in(worker, fake_provider)).groups == ("dev",)
        fake_provider.person["groups"] = group_names
        assert (await log_in(worker, fake_provider)).groups == tuple(group_names[:MAX_CLAIM_GROUPS])


@pytest.mark.slow
async def test_first_login_creates_an_account(data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider) -> None:
    """With the setting `create`, the first login creates an account for the person, without a password and without
    admin rights. A login under the name of a group or a robot is refused."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider, create=True)}) as worker:
        await worker.add_robot()
        await worker.accounts.add_group(AccountName("dev"), by=ADMIN)
        for _ in range(2):
            assert (await log_in(worker, fake_provider)).name == ALICE
        account = worker.accounts.account(ALICE)
        assert (account.kind, account.admin, account.has_password) == (AccountKind.USER, False, False)
        audit_line = (await worker.audited("account.add"))[0]
        assert (audit_line.actor, audit_line.target, audit_line.address) == ("system", "alice", KNOWN_ADDRESS.address)
        for name in (CI, "dev", "system", "Alice", "", None, 5, "a b"):
            fake_provider.person["preferred_username"] = name
            with pytest.raises(LoginFailed):
                await log_in(worker, fake_provider)
        (*failed, _) = await worker.audited()
        assert {line.outcome for line in failed} == {"failed"}


@pytest.mark.parametrize("line", ["ci:" + BCRYPT, "ci:{SHA}x", None], ids=["valid", "invalid hash", "unreadable file"])
async def test_create_does_not_take_a_name_of_the_htpasswd_file(
    data: Path, tmp_path: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider, line: str | None
) -> None:
    """With the setting `create`, a login under a name in the htpasswd file creates no account. An account of the store
    would replace the one in the file, and would have the rights that were granted to it. While the file cannot be
    read, no account is created at all."""
    clock.now = time.time()
    fake_provider.secret = None
    fake_provider.person["preferred_username"] = CI
    file = tmp_path / "htpasswd"
    if line is not None:
        file.write_text(f"carol:{BCRYPT}\n{line}\n")
    options = {"oidc": settings(fake_provider, create=True), "auth": AuthSettings(htpasswd=file)}
    async with auth_worker(data, clock, options) as worker:
        with pytest.raises(LoginFailed, match="htpasswd") as failed:
            await log_in(worker, fake_provider)
        assert isinstance(failed.value.shown_error, Denied)
        assert worker.accounts.accounts(None, None, 10).items == []
        if line is not None:
            fake_provider.person["preferred_username"] = ALICE
            assert (await log_in(worker, fake_provider)).name == ALICE


@pytest.mark.parametrize("rights", ["grant", "membership"])
async def test_create_does_not_give_a_new_account_old_rights(
    data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider, rights: str
) -> None:
    """With the setting `create`, a login creates no account if the store has grants to the name or has it in a group,
    such as for a removed line of an htpasswd file. An admin can add the account, and then the person can log in."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider, create=True)}) as worker:
        if rights == "grant":
            await worker.grant("user:alice", "prod/**", "pull,push")
        else:
            await worker.accounts.add_group(AccountName("dev"), by=ADMIN)
            await worker.accounts.add_member(AccountName("dev"), ALICE, by=ADMIN)
        with pytest.raises(LoginFailed, match="rights") as failed:
            await log_in(worker, fake_provider)
        assert isinstance(failed.value.shown_error, Denied)
        assert worker.accounts.accounts(None, None, 10).items == []
        await worker.add_user(ALICE, None)
        assert (await log_in(worker, fake_provider)).name == ALICE


async def test_without_create_no_account_is_made(
    data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider
) -> None:
    """Without `create`, a person without an account is refused."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider)}) as worker:
        with pytest.raises(LoginFailed, match="no such account"):
            await log_in(worker, fake_provider)
        assert worker.accounts.accounts(None, None, 10).items == []
