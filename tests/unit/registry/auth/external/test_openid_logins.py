"""Logins at an OpenID provider: what protects a login attempt, how often it may be used, how many a client may make,
and when a session ends."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from registry.auth.external.login_attempts import (
    ATTEMPT_SECONDS,
    LoginAttempt,
    LoginAttemptInvalid,
    LoginAttempts,
    UsedAttempts,
)
from registry.auth.external.openid_login import EXCHANGE_LIMITS, AuthorizationResponse, LoginFailed
from registry.auth.external.openid_settings import provider_stamp
from registry.auth.password.throttle import BY_ADDRESS
from registry.auth.rights.principal import Identity
from registry.auth.token.signing_keys import SigningKeys
from storage.content import Actor
from storage.errors import Denied, TooManyRequests, Unauthorized, UpstreamUnavailable
from tests.fakes.auth_worker import ALICE, KNOWN_ADDRESS, OTHER_ADDRESS, AuthClock, AuthWorker, auth_worker
from tests.fakes.openid_server import FakeOpenIDProvider
from tests.unit.registry.auth.external.conftest import REDIRECT_URI, log_in, settings
from tests.unit.registry.conftest import wait_until


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


async def test_attempt_is_used_once(data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider) -> None:
    """A login attempt causes one request to the provider at most, on all workers together, also if they get it at the
    same moment."""
    fake_provider.secret = None
    options = {"oidc": settings(fake_provider)}
    async with auth_worker(data, clock, options) as worker, auth_worker(data, clock, options) as other_worker:
        state, sealed = await begin_login(worker)
        workers = [worker, worker, other_worker, other_worker]
        errors = await asyncio.gather(*(finish_login(each, state, sealed) for each in workers))
        errors.append(await finish_login(other_worker, state, sealed))
        assert fake_provider.paths.count("/token") == 1
        assert sum("used before" in error.reason for error in errors) == 4
        assert all(error.ends_attempt for error in errors)


async def test_concurrent_workers_use_an_attempt_once(
    data: Path, clock: AuthClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If several requests in two workers use the same attempt, and none sees the use by another yet, one of them
    succeeds. Another attempt can be used."""
    attempt = LoginAttempt("state", "nonce", "verifier", "https://registry.example/callback", "/ui", clock())
    async with auth_worker(data, clock) as worker, auth_worker(data, clock) as other_worker:
        for accounts in (worker.accounts, other_worker.accounts):
            monkeypatch.setattr(accounts, "throttled_until", lambda _key: 0.0)
        first, second = UsedAttempts(worker.accounts), UsedAttempts(other_worker.accounts)
        uses = (used_attempts.mark_used(attempt) for used_attempts in (first, second, first, second))
        outcomes = await asyncio.gather(*uses, return_exceptions=True)
        assert sum(outcome is None for outcome in outcomes) == 1
        assert sum(isinstance(outcome, LoginAttemptInvalid) for outcome in outcomes) == 3
        await second.mark_used(replace(attempt, state="another"))


@pytest.mark.slow
async def test_invented_codes_are_throttled(data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider) -> None:
    """Codes that the provider refuses count as failed logins of the client's address. After too many, the registry
    sends no more codes from this address to the provider, and other addresses can still log in."""
    clock.now = time.time()
    fake_provider.secret = None
    async with auth_worker(data, clock, {"oidc": settings(fake_provider)}) as worker:
        await worker.add_user(ALICE)
        for _ in range(BY_ADDRESS.burst):
            assert isinstance((await finish_login(worker, *await begin_login(worker))).shown_error, Denied)
        requests_before = fake_provider.paths.count("/token")
        error = await finish_login(worker, *await begin_login(worker))
        assert isinstance(error.shown_error, TooManyRequests)
        assert not error.ends_attempt
        assert fake_provider.paths.count("/token") == requests_before
        assert (await log_in(worker, fake_provider, OTHER_ADDRESS)).name == ALICE


@pytest.mark.slow
async def test_failures_of_the_provider_are_not_counted(
    data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider
) -> None:
    """A login that fails because the provider fails does not count as a failed login of the client's address."""
    fake_provider.statuses["/token"] = 503
    async with auth_worker(data, clock, {"oidc": settings(fake_provider)}) as worker:
        for _ in range(BY_ADDRESS.burst + 1):
            error = await finish_login(worker, *await begin_login(worker))
        assert isinstance(error.shown_error, UpstreamUnavailable)


@pytest.mark.slow
async def test_keys_that_cannot_be_fetched_are_a_failure_of_the_provider(
    data: Path, clock: AuthClock, fake_provider: FakeOpenIDProvider
) -> None:
    """While the provider's keys cannot be fetched, a login with a valid code fails because the provider fails. It does
    not count as a failed login of the client's address."""
    clock.now = time.time()
    fake_provider.secret = None
    fake_provider.statuses["/keys"] = 503
    async with auth_worker(data, clock, {"oidc": settings(fake_provider)}) as worker:
        await worker.add_user(ALICE)
        for _ in range(BY_ADDRESS.burst + 1):
            with pytest.raises(LoginFailed) as failed:
                await log_in(worker, fake_provider)
            assert isinstance(failed.value.shown_error, UpstreamUnavailable)


@pytest.mark.slow
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


@pytest.mark.slow
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
