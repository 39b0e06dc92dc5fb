"""A fake OpenID provider on loopback. It refuses requests that violate the protocol, and has faults that tests can
set."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote_plus, urlencode, urlsplit

from .token_issuer import IssuerKey

CLIENT, SECRET = "entrepot", "s3cr3t of/entrepot+"
DAY = 86400  # seconds


@dataclass
class CodeGrant:
    """The request for which an authorization code was issued."""

    challenge: str
    redirect_uri: str
    nonce: str


@functools.cache
def _provider_key() -> IssuerKey:
    """Returns the signing key. All providers in a test process share it, because making an RSA key takes long."""
    return IssuerKey("sso-1", "RS256")


@dataclass
class FakeOpenIDProvider:
    """A provider that logs every browser in as `person`, without asking for a password.

    `secret`: the client's secret; None: the client is public and has no secret. `takes_secret_in_form`: the client must
    send its secret in the form (`client_secret_post`) and not in the header Authorization. `sends_issuer`: the value of
    the parameter `iss` in the redirect back to the client; None: the redirect does not have this parameter.

    `change_claims`: a function that changes the claims of an ID token; `signed`: a function that signs the claims.
    `error`: the error with which the browser is redirected back. `metadata_changes`: replacements for parts of the
    metadata. `statuses`: the status of the responses for a path. While the event `open` is clear, requests for the
    paths in `delayed_paths` wait. `login_requests`, `forms`, `paths` and `tokens` record the login requests, the token
    requests, the requested paths and the issued ID tokens."""

    secret: str | None = SECRET
    takes_secret_in_form: bool = False
    url: str = ""
    key: IssuerKey = field(default_factory=_provider_key)
    person: dict[str, Any] = field(default_factory=lambda: {"preferred_username": "alice"})
    change_claims: Callable[[dict[str, Any]], dict[str, Any]] = dict
    signed: Callable[[dict[str, Any]], str] | None = None
    error: str = ""
    sends_issuer: str | None = None
    metadata_changes: dict[str, Any] = field(default_factory=dict)
    statuses: dict[str, int] = field(default_factory=dict)
    delayed_paths: set[str] = field(default_factory=set)
    open: threading.Event = field(default_factory=threading.Event)
    login_requests: list[dict[str, str]] = field(default_factory=list)
    forms: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    grants: dict[str, CodeGrant] = field(default_factory=dict)

    def clear_faults(self) -> None:
        """Removes the faults that an earlier test has set."""
        self.person, self.change_claims, self.signed = {"preferred_username": "alice"}, dict, None
        self.error, self.sends_issuer = "", None
        self.metadata_changes, self.statuses, self.delayed_paths = {}, {}, set()

    def description(self) -> dict[str, Any]:
        """Returns the metadata of the provider (OpenID Connect Discovery)."""
        document: dict[str, Any] = {
            "issuer": self.url,
            "authorization_endpoint": f"{self.url}/authorize",
            "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/keys",
            "response_types_supported": ["code"],
            "id_token_signing_alg_values_supported": ["RS256"],
        }
        if self.takes_secret_in_form:
            document["token_endpoint_auth_methods_supported"] = ["client_secret_post"]
        return {**document, **self.metadata_changes}

    def claims(self, nonce: str) -> dict[str, Any]:
        now = int(time.time())
        base = {"iss": self.url, "aud": CLIENT, "sub": "0815", "iat": now, "exp": now + 300, "nonce": nonce}
        return self.change_claims({**base, **self.person})

    def authorize(self, query: dict[str, str]) -> str:
        """Returns the URL to which the browser is redirected. Raises AssertionError for an invalid request."""
        assert query["response_type"] == "code"
        assert query["client_id"] == CLIENT
        assert "openid" in query["scope"].split(" ")
        assert query["code_challenge_method"] == "S256"
        assert urlsplit(query["redirect_uri"]).path == "/login/callback"
        self.login_requests.append(query)
        answer = {"state": query["state"]}
        if self.sends_issuer is not None:
            answer["iss"] = self.sends_issuer
        if self.error:
            answer["error"] = self.error
        else:
            answer["code"] = secrets.token_urlsafe(16)
            grant = CodeGrant(query["code_challenge"], query["redirect_uri"], query["nonce"])
            self.grants[answer["code"]] = grant
        return f"{query['redirect_uri']}?{urlencode(answer)}"

    def exchange(self, form: dict[str, str], authorization: str) -> tuple[int, dict[str, Any]]:
        """Returns the status and the body of the response to a token request. A code gets an ID token only once, and
        only if the client has sent the right secret and verifier."""
        self.forms.append(form)
        if not self._is_client_authentic(form, authorization):
            return 401, {"error": "invalid_client"}
        grant = self.grants.pop(form.get("code", ""), None)
        verifier_hash = hashlib.sha256(form.get("code_verifier", "").encode()).digest()
        challenge = base64.urlsafe_b64encode(verifier_hash).rstrip(b"=").decode()
        if (
            grant is None
            or form.get("grant_type") != "authorization_code"
            or (grant.challenge, grant.redirect_uri) != (challenge, form.get("redirect_uri"))
        ):
            return 400, {"error": "invalid_grant"}
        sign = self.signed or self.key.sign
        self.tokens.append(sign(self.claims(grant.nonce)))
        return 200, {"token_type": "Bearer", "access_token": "x", "id_token": self.tokens[-1]}

    def _is_client_authentic(self, form: dict[str, str], authorization: str) -> bool:
        if self.secret is None or self.takes_secret_in_form:
            return form.get("client_id") == CLIENT and form.get("client_secret") == self.secret and not authorization
        scheme, _, text = authorization.partition(" ")
        user, _, password = base64.b64decode(text).decode().partition(":")
        return scheme == "Basic" and (unquote_plus(user), unquote_plus(password)) == (CLIENT, self.secret)


class _Handler(BaseHTTPRequestHandler):
    provider: FakeOpenIDProvider

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        if not self._begin(parts.path):
            return
        if parts.path == "/authorize":
            query = {name: value for name, [value] in parse_qs(parts.query, strict_parsing=True).items()}
            self.send_response(302)
            self.send_header("location", self.provider.authorize(query))
            self.send_header("content-length", "0")
            self.end_headers()
        elif parts.path == "/keys":
            self._json(200, {"keys": [self.provider.key.jwk()]})
        elif parts.path == "/.well-known/openid-configuration":
            self._json(200, self.provider.description())
        else:
            self._json(404, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        if self._begin(self.path):
            form = {name: value for name, [value] in parse_qs(body, strict_parsing=True).items()}
            self._json(*self.provider.exchange(form, self.headers.get("authorization", "")))

    def log_message(self, format: str, *args: object) -> None:
        return

    def _begin(self, path: str) -> bool:
        """Records the path, and waits if the path is delayed. If the path has a status in `statuses`, answers with it
        and returns False; otherwise returns True."""
        self.provider.paths.append(path)
        if path in self.provider.delayed_paths:
            self.provider.open.wait()
        status = self.provider.statuses.get(path)
        if status is not None:
            self._json(status, {})
        return status is None

    def _json(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


@contextlib.contextmanager
def openid_provider(**settings: Any) -> Iterator[FakeOpenIDProvider]:
    """Runs a provider until the block ends. `settings`: fields of `FakeOpenIDProvider`."""
    provider = FakeOpenIDProvider(**settings)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"provider": provider}))
    provider.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield provider
    finally:
        provider.open.set()
        server.shutdown()
        thread.join()
        server.server_close()
