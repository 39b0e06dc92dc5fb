"""`/login` with a browser, a real provider and a real server, and attacks on it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.fakes.admin_site import ADMIN, PASSWORD, AdminSite
from tests.fakes.commands import entrepot_output
from tests.fakes.openid_server import CLIENT, DAY, SECRET, FakeOpenIDProvider, openid_provider
from tests.fakes.plain_client import plain_client
from tests.fakes.server_process import running_server
from tests.fakes.token_issuer import IssuerKey

SESSION, ATTEMPT = "entrepot-session", "entrepot-login"


@dataclass
class Browser:
    """A client that keeps cookies and follows redirects."""

    site: AdminSite
    client: httpx2.Client

    def get(self, path: str, **more: Any) -> httpx2.Response:
        """Gets one page, without following redirects."""
        return self.client.get(path if path.startswith("http") else self.site.server.url + path, **more)

    def to_provider(self, path: str = "/login") -> httpx2.Response:
        """Returns the parameters of the provider's redirect back to the registry."""
        begun = self.get(path)
        assert begun.status_code == 303, begun.text
        answer = self.get(begun.headers["location"])
        assert answer.status_code == 302
        return answer

    def login(self, path: str = "/login") -> httpx2.Response:
        """Logs in at the provider. Returns the registry's answer to the provider's redirect."""
        return self.get(self.to_provider(path).headers["location"])

    def call(self, method: str, path: str, body: object = None, **headers: str) -> httpx2.Response:
        return self.client.request(method, f"{self.site.server.url}/api/v1{path}", json=body, headers=headers)

    @property
    def own(self) -> str:
        return self.site.server.url

    @property
    def session(self) -> str | None:
        return self.client.cookies.get(SESSION)


@pytest.fixture(scope="module")
def made_provider() -> Iterator[FakeOpenIDProvider]:
    with openid_provider() as made:
        yield made


@pytest.fixture
def sso(made_provider: FakeOpenIDProvider) -> FakeOpenIDProvider:
    made_provider.clear_faults()
    return made_provider


def variables(sso: FakeOpenIDProvider, folder: Path, **more: str) -> dict[str, str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "secret").write_text(SECRET)
    given = {"ISSUER": sso.url, "CLIENT_ID": CLIENT, "CLIENT_SECRET_FILE": str(folder / "secret"), **more}
    return {f"ENTREPOT_OIDC__{name}": value for name, value in given.items()}


@pytest.fixture(scope="module")
def site(made_provider: FakeOpenIDProvider, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdminSite]:
    """Yields a site with the admin root and the people alice and bob."""
    folder = tmp_path_factory.mktemp("login")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, given=PASSWORD)
    entrepot_output("user", "add", "alice", "--password-file", "-", folder=folder, given=PASSWORD)
    with running_server(folder, workers=2, env=variables(made_provider, folder, GROUPS_CLAIM="groups")) as server:
        yield AdminSite(server, folder)


@pytest.fixture
def browser(site: AdminSite) -> Iterator[Browser]:
    with plain_client(timeout=60) as client:
        yield Browser(site, client)


@pytest.fixture
def other(site: AdminSite) -> Iterator[Browser]:
    """Yields another person's browser."""
    with plain_client(timeout=60) as client:
        yield Browser(site, client)


def failed(site: AdminSite, part: str) -> list[dict[str, Any]]:
    """Waits for failed logins in the audit log whose reason contains a text, and returns them."""
    while True:
        lines = site.done("GET", "/audit", action="login", outcome="failed", limit=1000)["items"]
        if found := [line for line in lines if part in json.dumps(line["detail"])]:
            return found


# A login


def test_a_login(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """After a login the browser is at the API's documentation, and its session counts at the API on every worker."""
    answer = browser.login()
    assert (answer.status_code, answer.headers["location"]) == (303, "/api/docs")
    assert browser.get("/api/docs").status_code == 200
    assert browser.client.cookies.get(ATTEMPT) is None
    for _ in range(4):
        with plain_client(cookies={SESSION: browser.session or ""}) as again:
            me = again.get(f"{browser.own}/api/v1/me")
            assert (me.status_code, me.json()["name"], me.json()["admin"]) == (200, "alice", False)
    assert browser.call("GET", "/users").status_code == 403
    lines: list[dict[str, Any]] = []
    while not lines:
        every = browser.site.done("GET", "/audit", action="login", actor="alice", outcome="ok", limit=1000)["items"]
        lines = [line for line in every if line["detail"] == {"how": "openid"}]
    assert lines[0]["address"] == "127.0.0.1"


def test_an_admin(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """An account that is an admin has admin rights in its session."""
    sso.person = {"preferred_username": ADMIN}
    browser.login()
    assert browser.call("GET", "/users").status_code == 200


def test_what_the_provider_is_asked(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """State, nonce and challenge belong to one login. The secret and the verifier are sent to the token endpoint
    only."""
    sso.asked.clear()
    browser.login()
    browser.login()
    first, second = sso.asked
    for name in ("state", "nonce", "code_challenge"):
        assert first[name] != second[name]
        assert len(first[name]) >= 43
    assert first["redirect_uri"] == f"{browser.own}/login/callback"
    assert first["scope"] == "openid profile email"
    assert "code_verifier" not in first


def test_cookies(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """The cookies are HttpOnly, SameSite, for this host only, and expire with what they hold."""
    begun = browser.get("/login")
    assert_kept(begun, ATTEMPT, 600)
    assert begun.headers["cache-control"] == "no-store"
    back = browser.get(browser.get(begun.headers["location"]).headers["location"])
    assert_kept(back, SESSION, 8 * 3600)
    assert back.headers["cache-control"] == "no-store"


def assert_kept(answer: httpx2.Response, name: str, seconds: int) -> None:
    (line,) = (line for line in answer.headers.get_list("set-cookie") if line.startswith(f"{name}="))
    parts = {part.strip().lower() for part in line.split(";")[1:]}
    assert parts == {"httponly", "samesite=lax", "path=/", f"max-age={seconds}"}


def test_https(sso: FakeOpenIDProvider, tmp_path: Path) -> None:
    """With a public https URL the cookies have the `__Host-` prefix, and cookies of plain http do not count."""
    public = "https://registry.example.com"
    sso.person = {"preferred_username": ADMIN}
    entrepot_output("user", "add", ADMIN, "--admin", "--generate", folder=tmp_path)
    env = {**variables(sso, tmp_path), "ENTREPOT_PUBLIC_URL": public}
    with running_server(tmp_path, workers=1, env=env) as server, plain_client() as client:
        begun = client.get(f"{server.url}/login")
        assert f"__Host-{ATTEMPT}=" in begun.headers["set-cookie"]
        assert "; Secure" in begun.headers["set-cookie"]
        back = client.get(begun.headers["location"]).headers["location"]
        assert back.startswith(f"{public}/login/callback?")
        kept = begun.headers["set-cookie"].partition(";")[0]
        plain = kept.removeprefix("__Host-")
        here = back.replace(public, server.url)
        assert client.get(here, headers={"cookie": plain}).status_code == 400
        session = client.get(here, headers={"cookie": kept}).headers.get_list("set-cookie")[1].partition(";")[0]
        assert session.startswith(f"__Host-{SESSION}=")
        url = f"{server.url}/api/v1/me"
        assert httpx2.get(url, headers={"cookie": session}).status_code == 200
        assert httpx2.get(url, headers={"cookie": session.removeprefix("__Host-")}).status_code == 401
        for origin, status in ((public, 201), (server.url, 201), ("https://evil.example.com", 403)):
            headers = {"cookie": session, "origin": origin}
            assert httpx2.post(f"{server.url}/api/v1/keys", json={}, headers=headers).status_code == status


@pytest.mark.parametrize("place", ["/", "/api/docs#/tokens", "/api/v1/me?a=b&c=d", "/%2F/evil.example.com"])
def test_places_to_come_back_to(browser: Browser, sso: FakeOpenIDProvider, place: str) -> None:
    """Any path of this registry can be the page after the login."""
    begun = browser.get("/login", params={"next": place})
    answer = browser.get(browser.get(begun.headers["location"]).headers["location"])
    assert answer.headers["location"] == place


@pytest.mark.parametrize(
    "place",
    [
        "https://evil.example.com",
        "//evil.example.com",
        "/\\evil.example.com",
        "\\\\evil.example.com",
        "/\t/evil.example.com",
        "/\n/evil.example.com",
        " //evil.example.com",
        "javascript:alert(1)",
        "api/docs",
        "/é",
        "/" + "x" * 2000,
    ],
)
def test_other_places(browser: Browser, place: str) -> None:
    """No login redirects to another site."""
    answer = browser.get("/login", params={"next": place})
    assert answer.status_code == 400
    assert "location" not in answer.headers
    assert "evil" not in answer.text


def test_groups(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """A grant to a group that the provider names counts in the session."""
    group = browser.site.name("group")
    browser.site.done("POST", "/groups", {"name": group})
    browser.site.done("PUT", "/grants", {"subject": f"group:{group}", "pattern": "team/**", "actions": ["admin"]})
    browser.login()
    assert browser.call("GET", "/me").json()["grants"] == []
    sso.person["groups"] = [group, "none"]
    browser.login()
    (grant,) = browser.call("GET", "/me").json()["grants"]
    assert grant["subject"] == f"group:{group}"
    body = {"subject": "user:alice", "pattern": "team/x", "actions": ["pull"]}
    assert browser.call("PUT", "/grants", body, origin=browser.own).status_code == 200
    browser.site.done("DELETE", "/grants", subject="user:alice", pattern="team/x")


# Refused logins


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


def assert_refused(browser: Browser, answer: httpx2.Response, status: int = 403) -> None:
    """Checks that the answer is a short page without a session."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert (
        answer.headers["content-security-policy"]
        == "default-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    assert '<a href="/login">' in answer.text
    assert len(answer.text) < 1000
    assert browser.session is None
    assert browser.call("GET", "/me").status_code == 401


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
    return jwt.encode(claims, "", "none", headers={"kid": sso.key.id})


def with_public_key(sso: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    """Returns a token signed with HMAC and the public key. PyJWT refuses to make one."""
    pem = sso.key.private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    head = jwt.encode(claims, "x" * 64, "HS256", headers={"kid": sso.key.id}).rpartition(".")[0]
    mark = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(head.encode(), pem)
    return f"{head}.{jwt.utils.base64url_encode(mark).decode()}"


def with_secret(sso: FakeOpenIDProvider, claims: dict[str, Any]) -> str:
    return jwt.encode(claims, SECRET * 3, "HS256", headers={"kid": sso.key.id})


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
    """Only a key of the provider's key set counts, with an asymmetric algorithm."""
    sso.signed = lambda claims: sign(sso, claims)
    assert_refused(browser, browser.login())
    assert failed(browser.site, "the ID token: ")


@pytest.mark.parametrize("name", ["nobody", "Alice", "", "alice ", "system", None, 5, ["alice"], "<b>alice</b>"])
def test_who_has_no_account(browser: Browser, sso: FakeOpenIDProvider, name: object) -> None:
    """A name that has no account, or cannot have one, is refused. Names are taken as they are, so Alice is not
    alice."""
    sso.person = {"preferred_username": name}
    answer = browser.login()
    assert_refused(browser, answer)
    assert "<b>" not in answer.text


def test_who_may_not_log_in(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """A disabled account and a robot get the same answer as a missing account."""
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
    """The page tells what to do and shows nothing of the request. The audit log has the provider's error code."""
    sso.error = "access_denied"
    assert_refused(browser, browser.login())
    assert failed(browser.site, "the provider says access_denied")
    sso.error = "<script>alert(1)</script>"
    answer = browser.login()
    assert_refused(browser, answer)
    assert "script" not in answer.text
    assert failed(browser.site, "the provider says unnamed")


def test_another_state(browser: Browser, other: Browser, sso: FakeOpenIDProvider) -> None:
    """A response for another login is refused, whether or not this browser has begun one, and a login that has begun
    can still end."""
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
    assert httpx2.get(back, cookies=kept).status_code == 403  # with the cookie of then the provider refuses the code


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


def test_a_provider_that_is_down(tmp_path: Path) -> None:
    """The server starts and serves without the provider. A login gets an error that asks to try again."""
    with openid_provider() as gone:
        env = variables(gone, tmp_path)
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=tmp_path, given=PASSWORD)
    with running_server(tmp_path, workers=1, env=env) as server:
        answer = httpx2.get(f"{server.url}/login")
        assert answer.status_code == 502
        assert "set-cookie" not in answer.headers
        assert httpx2.get(f"{server.url}/api/v1/me", auth=(ADMIN, PASSWORD)).status_code == 200


def test_first_login(sso: FakeOpenIDProvider, tmp_path: Path) -> None:
    """With `create`, the first login creates an account, which is no admin. A registry with a provider is closed."""
    with running_server(tmp_path, workers=1, env=variables(sso, tmp_path, CREATE="true")) as server:
        assert httpx2.get(f"{server.url}/v2/").status_code == 401
        with plain_client(follow_redirects=True) as client:
            assert client.get(f"{server.url}/login?next=/api/v1/me").json()["name"] == "alice"
            assert client.get(f"{server.url}/api/v1/me").json()["account"]["admin"] is False
            assert client.get(f"{server.url}/api/v1/users").status_code == 403
        assert "alice" in entrepot_output("user", "list", folder=tmp_path)


def test_without_a_provider(tmp_path: Path) -> None:
    """Without a provider the login pages do not exist."""
    with running_server(tmp_path, workers=1) as server:
        for path in ("/login", "/login/callback", "/logout"):
            assert httpx2.get(server.url + path).status_code == 404


# The session


def test_where_it_counts(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """A session counts at the management API only, and as a cookie only; not at `/v2` or `/token`."""
    browser.login()
    assert browser.call("GET", "/me").status_code == 200
    session = browser.session
    assert session is not None
    for path in ("/v2/", "/v2/_catalog"):
        assert browser.get(path).status_code == 401
        assert httpx2.get(browser.own + path, headers={"authorization": f"Bearer {session}"}).status_code == 401
    token = browser.get("/token?scope=repository:team/app:pull&service=entrepot").json()["token"]
    assert jwt.decode(token, options={"verify_signature": False})["sub"] == ""
    for auth in (("alice", session), ("entrepot", session)):
        assert httpx2.get(f"{browser.own}/token", auth=auth).status_code == 401
        assert httpx2.get(f"{browser.own}/api/v1/me", auth=auth).status_code == 401
    form = {"grant_type": "refresh_token", "refresh_token": session, "service": "entrepot"}
    assert httpx2.post(f"{browser.own}/token", data=form).status_code == 401
    headers = {"authorization": f"Bearer {session}"}
    assert httpx2.get(f"{browser.own}/api/v1/me", headers=headers).status_code == 401


def test_a_token_is_no_session(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """A bearer token, an ID token and an altered session are refused as sessions."""
    browser.login()
    token = httpx2.get(f"{browser.own}/token", auth=(ADMIN, PASSWORD)).json()["token"]
    session = browser.session or ""
    head, body, mark = session.split(".")
    forged = jwt.encode(jwt.decode(session, options={"verify_signature": False}), "", "none")
    api_token = browser.site.token("alice")
    for wrong in (token, sso.tokens[-1], api_token, f"{head}.{body}.{mark[:-4]}AAAA", forged, "x", "x" * 5000):
        answer = httpx2.get(f"{browser.own}/api/v1/me", headers={"cookie": f"{SESSION}={wrong}"})
        assert answer.status_code == 401


def test_what_ends_it(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """Disabling the account, a new password and removing it end the session at the next request."""
    changes: list[Callable[[str], Any]] = [
        lambda name: browser.site.done("PATCH", f"/users/{name}", {"enabled": False}),
        lambda name: browser.site.done("PUT", f"/users/{name}/password", {}),
        lambda name: browser.site.done("DELETE", f"/users/{name}"),
    ]
    for change in changes:
        name = browser.site.user()[0]
        sso.person = {"preferred_username": name}
        browser.login()
        assert browser.call("GET", "/me").json()["name"] == name
        change(name)
        for _ in range(3):
            assert browser.call("GET", "/me").status_code == 401


def test_a_new_key_ends_it_later(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """A session signed by the old key is accepted as long as bearer tokens of that key."""
    browser.login()
    browser.site.done("POST", "/keys", {})
    assert browser.call("GET", "/me").status_code == 200


def test_a_login_goes_before_it(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """Credentials in a header have precedence over the session, also wrong ones."""
    browser.login()
    me = f"{browser.own}/api/v1/me"
    assert browser.client.get(me, auth=(ADMIN, PASSWORD)).json()["name"] == ADMIN
    assert browser.client.get(me, auth=(ADMIN, "wrong")).status_code == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "https://evil.example.com"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": ""},
    ],
    ids=str,
)
def test_other_sites_change_nothing(browser: Browser, sso: FakeOpenIDProvider, headers: dict[str, str]) -> None:
    """A request that does not come from a page of this registry changes nothing in a session, and does not log out."""
    browser.login()
    for method, path, body in (("POST", "/tokens", {}), ("DELETE", "/tokens/none", None), ("PUT", "/grants", {})):
        assert browser.call(method, path, body, **headers).status_code == 403
    refused = browser.client.post(f"{browser.own}/logout", headers=headers)
    assert refused.status_code == 403
    assert "set-cookie" not in refused.headers
    assert browser.call("GET", "/me").status_code == 200


def test_another_site_lies_in_neither(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """Sec-Fetch-Site counts, whatever Origin holds."""
    browser.login()
    headers = {"sec-fetch-site": "same-site", "origin": browser.own}
    assert browser.call("POST", "/tokens", {}, **headers).status_code == 403


@pytest.mark.parametrize("how", ["origin", "sec-fetch-site"])
def test_a_person_makes_api_tokens(browser: Browser, sso: FakeOpenIDProvider, how: str) -> None:
    """A page of this registry may do what the person may. docker can log in with an API token made there."""
    browser.login()
    headers = {"origin": browser.own} if how == "origin" else {"sec-fetch-site": "same-origin"}
    made = browser.call("POST", "/tokens", {"note": "laptop"}, **headers)
    assert made.status_code == 201
    assert httpx2.get(f"{browser.own}/token", auth=("alice", made.json()["secret"])).status_code == 200
    assert browser.call("POST", "/tokens", {"account": ADMIN}, **headers).status_code == 404
    # Their password still takes the old one.
    assert browser.call("PUT", "/users/alice/password", {"new": "another long one"}, **headers).status_code == 403


def test_logout(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """The logout button ends the session, and the person can log in again."""
    browser.login()
    page = browser.get("/logout")
    assert page.status_code == 200
    assert '<form method="post" action="/logout">' in page.text
    assert page.headers["referrer-policy"] == "same-origin"
    foreign = browser.client.post(f"{browser.own}/logout", headers={"origin": "https://evil.example"})
    assert foreign.status_code == 403
    for answer in (page, foreign, browser.client.put(f"{browser.own}/logout")):
        assert "form-action 'self'" in answer.headers["content-security-policy"] or answer is not page
        for name in ("content-security-policy", "x-frame-options", "x-content-type-options", "cache-control"):
            assert len(answer.headers.get_list(name)) == 1, name
    assert browser.call("GET", "/me").status_code == 200
    out = browser.client.post(f"{browser.own}/logout", headers={"origin": browser.own})
    assert out.status_code == 200
    assert browser.session is None
    assert browser.call("GET", "/me").status_code == 401
    assert browser.login().status_code == 303


def test_no_secret_is_in_the_log(browser: Browser, sso: FakeOpenIDProvider) -> None:
    """No code, state, token or secret is in the log or the audit log, after logins that succeeded and logins that
    failed."""
    answers = [browser.to_provider().headers["location"]]
    assert browser.get(answers[0]).status_code == 303
    sso.altered = lambda claims: {**claims, "aud": "other"}
    answers.append(browser.to_provider().headers["location"])
    assert browser.get(answers[1]).status_code == 403
    assert failed(browser.site, "InvalidAudienceError")
    session = browser.session
    assert session
    text = browser.site.server.log_text() + browser.site.command("audit", "--limit", "1000", "--json")
    for answer in answers:
        query = parse_qs(urlsplit(answer).query)
        for secret in (query["code"][0], query["state"][0]):
            assert secret not in text
    for secret in (SECRET, session, *sso.tokens[-2:], sso.forms[-1]["code_verifier"]):
        assert secret not in text
