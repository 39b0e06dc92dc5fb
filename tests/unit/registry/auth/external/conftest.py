"""Fixtures and helpers for the tests of trusted issuers, and of logins at an OpenID provider, which is a fake one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.auth.external.openid_login import AuthorizationResponse
from registry.auth.rights.principal import Identity
from registry.config import OIDCSettings
from storage.content import Actor
from tests.fakes.auth_worker import KNOWN_ADDRESS, AuthClock, AuthWorker
from tests.fakes.issuer_worker import worker_that_trusts
from tests.fakes.openid_server import CLIENT, CodeGrant, FakeOpenIDProvider, openid_provider
from tests.fakes.token_issuer import IssuerKey, KeySetServer, key_set, key_set_server

REDIRECT_URI = "http://127.0.0.1:5000/login/callback"
"""The URL of the registry to which the provider sends the browser back."""


@pytest.fixture
def fake_provider() -> Iterator[FakeOpenIDProvider]:
    with openid_provider() as provider:
        yield provider


def settings(fake_provider: FakeOpenIDProvider, **options: Any) -> OIDCSettings:
    return OIDCSettings(issuer=fake_provider.url, client_id=CLIENT, **options)


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


@pytest.fixture(scope="module")
def key() -> IssuerKey:
    return IssuerKey("one")


@pytest.fixture(scope="module")
def other_key() -> IssuerKey:
    return IssuerKey("two")


@pytest.fixture(scope="module")
def rsa_key() -> IssuerKey:
    return IssuerKey("rsa", "RS256")


@pytest.fixture
async def key_server() -> AsyncIterator[KeySetServer]:
    """Yields an HTTP server with the issuer's key set."""
    async with key_set_server() as server:
        yield server


@pytest.fixture
async def trusting_worker(
    tmp_path: Path, clock: AuthClock, key_server: KeySetServer, key: IssuerKey, rsa_key: IssuerKey
) -> AsyncIterator[AuthWorker]:
    """Yields a worker that trusts the issuer with the keys `key` and `rsa_key`, and has a robot account."""
    key_server.body = key_set(key.jwk(), rsa_key.jwk())
    async with worker_that_trusts(tmp_path, clock, {"jwks_url": key_server.url}) as started:
        yield started
