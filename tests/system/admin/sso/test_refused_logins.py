"""Tests of logins at a provider that are refused: altered responses and ID tokens, people without an account, and a
provider that fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc.jwk import OctKey

from tests.fakes.openid_server import CLIENT, DAY, SECRET, FakeOpenIDProvider
from tests.fakes.plain_client import plain_request
from tests.fakes.token_issuer import IssuerKey, signed_token
from tests.system.admin.sso.conftest import Browser, assert_refused, failed_logins

ALTERED_CLAIMS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another login's nonce": lambda claims: {**claims, "nonce": "x" * 43},
    "no nonce": lambda claims: without(claims, "nonce"),
    "nonce that is no text": lambda claims: {**claims, "nonce": 5},
    "another client": lambda claims: {**claims, "aud": "other"},
    "no audience": lambda claims: without(claims, "aud"),
    "several clients": lambda claims: {**claims, "aud": [CLIENT, "other"]},
    "made for another client": lambda claims: {**claims, "aud": [CLIENT, "other"], "azp": "other"},
    "another azp": lambda claims: {**claims, "azp": "other"},
    "another issuer": lambda claims: {**claims, "iss": "https://sso.example.com"},
    "no issuer": lambda claims: without(claims, "iss"),
    "expired": lambda claims: {**claims, "iat": claims["iat"] - DAY, "exp": claims["exp"] - DAY},
    "no expiry": lambda claims: without(claims, "exp"),
    "expiry that is no time": lambda claims: {**claims, "exp": True},
    "made tomorrow": lambda claims: {**claims, "iat": claims["iat"] + DAY, "exp": claims["exp"] + DAY},
    "no time": lambda claims: without(claims, "iat"),
    "no subject": lambda claims: without(claims, "sub"),
}
"""Changes of the claims of an ID token. The provider signs the changed claims."""


def without(claims: dict[str, Any], name: str) -> dict[str, Any]:
    """Returns the claims except the one with this name."""
    return {key: value for key, value in claims.items() if key != name}


@pytest.mark.parametrize("fault", ALTERED_CLAIMS)
def test_id_tokens_that_are_refused(browser: Browser, provider: FakeOpenIDProvider, fault: str) -> None:
    """An ID token for another login, client, provider or time is refused, although the provider has signed it."""
    provider.change_claims = ALTERED_CLAIMS[fault]
    assert_refused(browser, browser.login())


def test_several_audiences(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """An ID token with several audiences is accepted if its `azp` is this client."""
    provider.change_claims = lambda claims: {**claims, "aud": ["other", CLIENT], "azp": CLIENT}
    assert browser.login().status_code == 303


def unsigned(provider: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    """Returns a token with the algorithm `none`."""
    return signed_token({"alg": "none", "kid": provider.key.id}, claims)


def with_public_key(provider: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    """Returns a token that is signed with HMAC, with the provider's public key as the secret."""
    pem = provider.key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return signed_token({"alg": "HS256", "kid": provider.key.id}, claims, OctKey(pem, pem))


def with_secret(provider: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    """Returns a token that is signed with HMAC, with the client's secret as the key."""
    return signed_token({"alg": "HS256", "kid": provider.key.id}, claims, OctKey.import_key(SECRET))


def with_another_key(provider: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    """Returns a token that is signed with another key, under the ID of the provider's key."""
    return IssuerKey(provider.key.id, "RS256").sign(claims)


def with_unknown_key(provider: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    """Returns a token that is signed with a key whose ID the provider does not have."""
    return IssuerKey("other", "RS256").sign(claims)


def with_crit(provider: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    """Returns a token with a critical header parameter."""
    return provider.key.sign(claims, crit=["exp"])


@pytest.mark.parametrize(
    "sign",
    [unsigned, with_public_key, with_secret, with_another_key, with_unknown_key, with_crit, lambda *_: "x"],
    ids=["none", "public key", "secret", "another key", "unknown key", "crit", "no token"],
)
def test_signatures_that_are_refused(
    browser: Browser, provider: FakeOpenIDProvider, sign: Callable[[FakeOpenIDProvider, dict[str, Any]], str]
) -> None:
    """An ID token is refused unless it is signed with an asymmetric algorithm and a key of the provider's key set."""
    provider.signed = lambda claims: sign(provider, claims)
    assert_refused(browser, browser.login())
    assert failed_logins(browser.registry, "the ID token: ")


@pytest.mark.parametrize("name", ["nobody", "Alice", "", "alice ", "system", None, 5, ["alice"], "<b>alice</b>"])
def test_names_without_an_account(browser: Browser, provider: FakeOpenIDProvider, name: object) -> None:
    """A person whose name at the provider is not exactly the name of an account is refused. `Alice` is not `alice`."""
    provider.person = {"preferred_username": name}
    answer = browser.login()
    assert_refused(browser, answer)
    assert "<b>" not in answer.text


def test_disabled_accounts_and_robots(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """A disabled account and a robot get the same response as a missing account."""
    user, robot = browser.registry.user()[0], browser.registry.robot()
    browser.registry.call_ok("PATCH", f"/users/{user}", {"enabled": False})
    for name, reason in ((user, "the account is disabled"), (robot, "the account is a robot's")):
        provider.person = {"preferred_username": name}
        answer = browser.login()
        assert_refused(browser, answer)
        assert f"{name} has no account here that may log in".lower() in answer.text.lower()
        (line,) = (line for line in failed_logins(browser.registry, reason) if line["target"] == name)
        assert (line["address"], line["detail"]["how"]) == ("127.0.0.1", "openid")


def test_errors_of_the_provider(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """If the provider responds with an error, the login is refused, and the audit log has the provider's error code.
    The page and the log do not repeat a text that cannot be an error code; the log has `unnamed` in its place."""
    provider.error = "access_denied"
    assert_refused(browser, browser.login())
    assert failed_logins(browser.registry, "the provider says access_denied")
    provider.error = "<script>alert(1)</script>"
    answer = browser.login()
    assert_refused(browser, answer)
    assert "script" not in answer.text
    assert failed_logins(browser.registry, "the provider says unnamed")


def test_state_of_another_login(browser: Browser, other_browser: Browser, provider: FakeOpenIDProvider) -> None:
    """A response of the provider that belongs to another browser's login (by its `state`) is refused, whether or not
    this browser has begun a login. A login that this browser has begun can still be finished."""
    other_callback = other_browser.callback_url()
    assert_refused(browser, browser.get(other_callback), 400)
    own_callback = browser.callback_url()
    assert_refused(browser, browser.get(other_callback), 400)
    assert_refused(browser, browser.get("/login/callback?code=x&state=%3Cb%3E"), 400)
    assert_refused(browser, browser.get("/login/callback"), 400)
    assert failed_logins(browser.registry, "another login")
    assert browser.get(own_callback).status_code == 303


def test_code_of_another_login(browser: Browser, other_browser: Browser, provider: FakeOpenIDProvider) -> None:
    """A code that the provider has issued for another browser's login is refused, because of PKCE: the registry redeems
    the code with the secret of this browser's login, which does not belong to the code."""
    other_code = parse_qs(urlsplit(other_browser.callback_url()).query)["code"][0]
    own_callback = browser.callback_url()
    assert_refused(browser, browser.get(re.sub(r"code=[^&]+", f"code={other_code}", own_callback)))
    assert failed_logins(browser.registry, "the provider refuses the code: invalid_grant")


def test_response_can_be_used_once(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """If the browser sends the same response of the provider a second time, the login is refused."""
    callback = browser.callback_url()
    cookies_before = dict(browser.client.cookies)
    assert browser.get(callback).status_code == 303
    assert browser.get(callback).status_code == 400
    # If the cookie of the first attempt is sent again, the provider refuses the code.
    assert plain_request("GET", callback, cookies=cookies_before).status_code == 403


def test_response_of_another_issuer(browser: Browser, provider: FakeOpenIDProvider) -> None:
    """If the response has the parameter `iss`, it must be the issuer of the provider (RFC 9207)."""
    provider.sends_issuer = "https://other.example.com"
    assert_refused(browser, browser.login())
    provider.sends_issuer = provider.url
    assert browser.login().status_code == 303


@pytest.mark.parametrize("query", ["code=a&code=b&state=x", "state=%zz", "code=a&state=x&state=y", "state=%ff"])
def test_invalid_responses(browser: Browser, query: str) -> None:
    """A response with a repeated or invalid parameter is refused."""
    assert_refused(browser, browser.get(f"/login/callback?{query}"), 400)


@pytest.mark.parametrize("status", [200, 302, 500, 503])
def test_a_provider_that_fails(browser: Browser, provider: FakeOpenIDProvider, status: int) -> None:
    """If the provider returns no ID token, the login gets 502. A later login succeeds."""
    provider.statuses["/token"] = status
    assert_refused(browser, browser.login(), 502)
    provider.clear_faults()
    assert browser.login().status_code == 303
