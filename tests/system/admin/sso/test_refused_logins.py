"""Logins that are refused: altered responses and ID tokens, people without an account, a provider that fails."""

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
from tests.system.admin.sso.conftest import Browser, assert_refused, failed

ALTERED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
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


def without(claims: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in claims.items() if key != name}


@pytest.mark.parametrize("fault", ALTERED)
def test_id_tokens_that_are_refused(browser: Browser, sso: FakeOpenIDProvider, fault: str) -> None:
    """ID tokens of another login, client, provider or time are refused, although the provider signed them."""
    sso.altered = ALTERED[fault]
    assert_refused(browser, browser.login())


def test_several_audiences(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """An ID token with several audiences is accepted if its `azp` is this client."""
    sso.altered = lambda claims: {**claims, "aud": ["other", CLIENT], "azp": CLIENT}
    assert browser.login().status_code == 303


def unsigned(sso: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    return signed_token({"alg": "none", "kid": sso.key.id}, claims)


def with_public_key(sso: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    """Returns a token signed with HMAC and the public key."""
    pem = sso.key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return signed_token({"alg": "HS256", "kid": sso.key.id}, claims, OctKey(pem, pem))


def with_secret(sso: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    return signed_token({"alg": "HS256", "kid": sso.key.id}, claims, OctKey.import_key(SECRET * 3))


def with_another_key(sso: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    return IssuerKey(sso.key.id, "RS256").sign(claims)


def with_unknown_key(sso: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    return IssuerKey("other", "RS256").sign(claims)


def with_crit(sso: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    return sso.key.sign(claims, crit=["exp"])


@pytest.mark.parametrize(
    "sign",
    [unsigned, with_public_key, with_secret, with_another_key, with_unknown_key, with_crit, lambda *_: "x"],
    ids=["none", "public key", "secret", "another key", "unknown key", "crit", "no token"],
)
def test_signatures_that_are_refused(
    browser: Browser, sso: FakeOpenIDProvider, sign: Callable[[FakeOpenIDProvider, dict[str, Any]], str]
) -> None:
    """Only a signature by a key of the provider's key set, with an asymmetric algorithm, is accepted."""
    sso.signed = lambda claims: sign(sso, claims)
    assert_refused(browser, browser.login())
    assert failed(browser.site, "the ID token: ")


@pytest.mark.parametrize("name", ["nobody", "Alice", "", "alice ", "system", None, 5, ["alice"], "<b>alice</b>"])
def test_who_has_no_account(browser: Browser, sso: FakeOpenIDProvider, name: object) -> None:
    """A name without an account, or one that no account can have, is refused. Case matters: Alice is not alice."""
    sso.person = {"preferred_username": name}
    answer = browser.login()
    assert_refused(browser, answer)
    assert "<b>" not in answer.text


def test_who_may_not_log_in(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """A disabled account and a robot get the same response as a missing account."""
    user, robot = browser.site.user()[0], browser.site.robot()
    browser.site.done("PATCH", f"/users/{user}", {"enabled": False})
    for name, reason in ((user, "the account is disabled"), (robot, "the account is a robot's")):
        sso.person = {"preferred_username": name}
        answer = browser.login()
        assert_refused(browser, answer)
        assert f"{name} has no account here that may log in".lower() in answer.text.lower()
        (line,) = (line for line in failed(browser.site, reason) if line["target"] == name)
        assert (line["address"], line["detail"]["how"]) == ("127.0.0.1", "openid")


def test_the_provider_says_no(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """The page says what to do, and shows nothing of the request. The audit log has the provider's error code."""
    sso.error = "access_denied"
    assert_refused(browser, browser.login())
    assert failed(browser.site, "the provider says access_denied")
    sso.error = "<script>alert(1)</script>"
    answer = browser.login()
    assert_refused(browser, answer)
    assert "script" not in answer.text
    assert failed(browser.site, "the provider says unnamed")


def test_another_state(browser: Browser, other: Browser, sso: FakeOpenIDProvider) -> None:
    """A response with the state of another login is refused, whether or not this browser has begun a login. A login
    that has begun can still be finished."""
    theirs = other.to_provider().headers["location"]
    assert_refused(browser, browser.get(theirs), 400)
    own = browser.to_provider().headers["location"]
    assert_refused(browser, browser.get(theirs), 400)
    assert_refused(browser, browser.get("/login/callback?code=x&state=%3Cb%3E"), 400)
    assert_refused(browser, browser.get("/login/callback"), 400)
    assert failed(browser.site, "another login")
    assert browser.get(own).status_code == 303


def test_another_code(browser: Browser, other: Browser, sso: FakeOpenIDProvider) -> None:
    """A code of another login is refused (PKCE)."""
    theirs = parse_qs(urlsplit(other.to_provider().headers["location"]).query)["code"][0]
    own = browser.to_provider().headers["location"]
    assert_refused(browser, browser.get(re.sub(r"code=[^&]+", f"code={theirs}", own)))
    assert failed(browser.site, "the provider refuses the code: invalid_grant")


def test_an_answer_counts_once(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """The same response a second time is refused."""
    back = browser.to_provider().headers["location"]
    kept = dict(browser.client.cookies)
    assert browser.get(back).status_code == 303
    assert browser.get(back).status_code == 400
    # With the cookie of the first attempt, the provider refuses the code.
    assert plain_request("GET", back, cookies=kept).status_code == 403


def test_answers_of_another_issuer(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """A response with an issuer has to name the provider (RFC 9207)."""
    sso.sends_issuer = "https://other.example.com"
    assert_refused(browser, browser.login())
    sso.sends_issuer = sso.url
    assert browser.login().status_code == 303


@pytest.mark.parametrize("query", ["code=a&code=b&state=x", "state=%zz", "code=a&state=x&state=y", "state=%ff"])
def test_answers_that_cannot_be_read(browser: Browser, query: str) -> None:
    """A response with a repeated parameter is refused."""
    assert_refused(browser, browser.get(f"/login/callback?{query}"), 400)


@pytest.mark.parametrize("status", [200, 302, 500, 503])
def test_a_provider_that_fails(browser: Browser, sso: FakeOpenIDProvider, status: int) -> None:
    """If the provider returns no token, nobody is logged in, and the login can be repeated."""
    sso.statuses["/token"] = status
    assert_refused(browser, browser.login(), 502)
    sso.clear_faults()
    assert browser.login().status_code == 303
