"""Requests to an OpenID provider: its metadata, its keys, and the exchange of a code for a token. If the provider fails
or answers wrongly, a login fails with a known error."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from authlib.oauth2.rfc7636 import create_s256_code_challenge

from registry.auth.external import identity_http
from registry.auth.external.login_attempts import LoginAttempts
from registry.auth.external.openid_protocol import parse_token_response
from registry.auth.external.openid_provider import (
    METADATA_FRESH_SECONDS,
    METADATA_RETRY_SECONDS,
    METADATA_STALE_SECONDS,
    OpenIDProvider,
)
from registry.auth.external.openid_settings import CodeRefused, ProviderInvalid, ProviderUnavailable, check_provider
from registry.auth.token.signing_keys import SigningKeys
from registry.config import OIDCSettings
from tests.fakes.auth_worker import AuthClock, AuthWorker
from tests.fakes.openid_server import CLIENT, SECRET, FakeOpenIDProvider
from tests.unit.registry.auth.external.conftest import REDIRECT_URI, settings


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    return file


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


async def test_metadata_is_fetched_at_the_first_login_and_every_hour(fake_provider: FakeOpenIDProvider) -> None:
    """The provider's metadata is fetched at the first login, not when the server starts. Concurrent callers share one
    fetch. After an hour, the metadata is fetched again. If that fails, the known metadata is used for a day."""
    clock = AuthClock()
    provider = OpenIDProvider(settings(fake_provider), clock)
    assert fake_provider.paths == []
    await asyncio.gather(*(provider.get_metadata() for _ in range(5)))
    assert len(fake_provider.paths) == 1
    clock.now += METADATA_FRESH_SECONDS
    fake_provider.statuses["/.well-known/openid-configuration"] = 500
    before = await provider.get_metadata()
    assert len(fake_provider.paths) == 2
    clock.now += METADATA_STALE_SECONDS
    with pytest.raises(ProviderUnavailable):
        await provider.get_metadata()
    fake_provider.statuses.clear()
    clock.now += METADATA_RETRY_SECONDS
    assert await provider.get_metadata() == before
    await provider.aclose()


async def test_the_fetch_is_repeated_only_after_a_pause(fake_provider: FakeOpenIDProvider) -> None:
    """If the provider is down, its metadata is requested again after some seconds, and not with every login."""
    fake_provider.statuses["/.well-known/openid-configuration"] = 503
    clock = AuthClock()
    provider = OpenIDProvider(settings(fake_provider), clock)
    for _ in range(3):
        with pytest.raises(ProviderUnavailable):
            await provider.get_metadata()
    assert len(fake_provider.paths) == 1
    fake_provider.statuses.clear()
    clock.now += METADATA_RETRY_SECONDS
    assert (await provider.get_metadata()).token_url == f"{fake_provider.url}/token"
    await provider.aclose()


async def test_a_refused_connection_is_an_unavailable_provider() -> None:
    """A refused connection is reported as an unavailable provider."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    provider = OpenIDProvider(OIDCSettings(issuer=f"http://127.0.0.1:{port}", client_id=CLIENT), AuthClock())
    with pytest.raises(ProviderUnavailable):
        await provider.get_metadata()
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
        await provider.get_metadata()
    await provider.aclose()


async def test_the_url_of_the_keys_changes_during_a_fetch(fake_provider: FakeOpenIDProvider) -> None:
    """If the URL of the keys changes while a caller waits for the keys, the caller gets no key, and its task is not
    cancelled."""
    clock = AuthClock()
    provider = OpenIDProvider(settings(fake_provider), clock)
    fake_provider.delayed_paths.add("/keys")
    waiting = asyncio.create_task((await provider.get_key_set()).find("sso-1", "RS256"))
    deadline = time.monotonic() + 20
    while "/keys" not in fake_provider.paths:
        assert time.monotonic() < deadline, "nobody asked"
        await asyncio.sleep(0.005)
    fake_provider.metadata_changes = {"jwks_uri": f"{fake_provider.url}/other"}
    clock.now += METADATA_FRESH_SECONDS
    await provider.get_key_set()
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
    with pytest.raises(ProviderUnavailable, match="missing or empty in SSO_SECRET"):
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
        (complete.model_copy(update={"client_secret_file": tmp_path / "none"}), "cannot read the client secret"),
        (complete.model_copy(update={"client_secret_env": "NOT_SET"}), "is missing or empty in NOT_SET"),
    ):
        with pytest.raises(ProviderInvalid, match=message):
            check_provider(wrong)
