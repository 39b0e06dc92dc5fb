"""Tests with the login requests of newer clients (crane, BuildKit, containerd 2, oras), and with curl itself."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from http.client import HTTPConnection
from urllib.parse import quote, urlencode, urlsplit

import pytest

from tests.fakes.clients.member_site import WRONG, ClientLogin, SiteWithAccounts
from tests.fakes.clients.programs import PATH, ForeignProgram
from tests.fakes.raw_http import RawAnswer, RawConnection
from tests.fakes.raw_pushes import OCI_MANIFEST, RawPushes, digest_of, image

CONNECTIONS = 24
"""The number of simultaneous connections. With so many, both workers of the server get some."""
CHALLENGE_PARAMETER = re.compile(r'(\w+)="([^"]*)"')

Connect = Callable[[], RawConnection]
Headers = Mapping[str, str] | Iterable[tuple[str, str]]


@pytest.fixture
def connect(site: SiteWithAccounts) -> Iterator[Connect]:
    """Yields a function that opens a connection to the registry with accounts."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(RawConnection(("127.0.0.1", site.server.port)))


class AuthorizedConnection(RawConnection):
    """A connection whose requests all have the same Authorization header."""

    def __init__(self, port: int, authorization: str) -> None:
        super().__init__(("127.0.0.1", port))
        self.authorization = authorization

    def ask(
        self, method: str, target: str, headers: Headers = (), body: bytes = b"", *, version: str = "1.1"
    ) -> RawAnswer:
        pairs = headers.items() if isinstance(headers, Mapping) else headers
        return super().ask(method, target, [("Authorization", self.authorization), *pairs], body, version=version)


def challenge(answer: RawAnswer) -> dict[str, str]:
    """Returns the parameters of the Bearer challenge in a 401."""
    assert answer.status == 401
    header = answer["www-authenticate"]
    assert header.startswith("Bearer ")
    return dict(CHALLENGE_PARAMETER.findall(header))


def bearer(answer: RawAnswer) -> dict[str, str]:
    """Returns the Authorization header with the token of a response."""
    assert answer.status == 200, answer.body
    token = answer.json()
    assert token["token"] == token["access_token"]
    assert token["expires_in"] >= 60
    return {"Authorization": f"Bearer {token['token']}"}


def get_token(wire: RawConnection, parameters: dict[str, str], login: ClientLogin | None, *scopes: str) -> RawAnswer:
    """Requests a token as crane and oras do: with a GET of the realm, Basic authentication, and one query parameter for
    each scope. `parameters`: those of the challenge."""
    query = urlencode([("service", parameters["service"]), *(("scope", scope) for scope in scopes)])
    headers = {"Authorization": login.basic} if login else {}
    return wire.ask("GET", f"{urlsplit(parameters['realm']).path}?{query}", headers)


def post_token(wire: RawConnection, **fields: str) -> RawAnswer:
    """Requests a token as BuildKit and containerd do: with a POST of a form, which has all scopes in one field."""
    head = {"Content-Type": "application/x-www-form-urlencoded", "User-Agent": "buildkit/v0.26"}
    return wire.ask("POST", "/token", head, urlencode({"service": "entrepot", **fields}).encode())


def fill(site: SiteWithAccounts, repo: str) -> bytes:
    """Pushes a manifest with its blob under the tag `v1`."""
    with AuthorizedConnection(site.server.port, site.add_user({repo: "pull,push"}).basic) as wire:
        steps = RawPushes(wire, repo)
        steps.blob(b"{}")
        steps.manifest(image(b"{}"), "v1")
    return image(b"{}")


def test_crane_pull(site: SiteWithAccounts, connect: Connect, repo: str) -> None:
    """crane sends GET /v2/, requests a token, and pulls. The realm in the challenge has the host of the request, and
    all requests can use one connection."""
    body = fill(site, repo)
    login, wire = site.add_user({repo: "pull"}), connect()
    parameters = challenge(wire.ask("GET", "/v2/", {"Host": site.address}))
    assert parameters == {"realm": f"http://{site.address}/token", "service": "entrepot"}
    token = bearer(get_token(wire, parameters, login, f"repository:{repo}:pull"))
    assert wire.ask("GET", f"/v2/{repo}/manifests/v1", {**token, "Accept": OCI_MANIFEST}).body == body
    assert wire.ask("GET", f"/v2/{repo}/blobs/{digest_of(b'{}')}", token).body == b"{}"
    assert wire.ask("GET", "/v2/", token).status == 200


def test_crane_pull_of_public_content(site: SiteWithAccounts, connect: Connect, repo: str) -> None:
    """Without a login, crane pulls public content with an anonymous token."""
    body = fill(site, repo)
    site.allow_everyone(repo)
    wire = connect()
    token = bearer(get_token(wire, challenge(wire.ask("GET", "/v2/")), None, f"repository:{repo}:pull"))
    assert wire.ask("GET", f"/v2/{repo}/manifests/v1", token).body == body
    refused = wire.ask("POST", f"/v2/{repo}/blobs/uploads/", token)
    assert challenge(refused)["scope"] == f"repository:{repo}:pull,push"


def test_crane_requests_a_wider_scope_after_a_challenge(site: SiteWithAccounts, connect: Connect, repo: str) -> None:
    """With a token for pulls only, a push is refused, and the challenge names the scope that the push needs. With a
    token for this scope, the push succeeds."""
    login, wire = site.add_user({repo: "pull,push"}), connect()
    parameters = challenge(wire.ask("GET", "/v2/"))
    token = bearer(get_token(wire, parameters, login, f"repository:{repo}:pull"))
    wider = challenge(wire.ask("POST", f"/v2/{repo}/blobs/uploads/", token))
    assert (wider["error"], wider["scope"]) == ("insufficient_scope", f"repository:{repo}:pull,push")
    token = bearer(get_token(wire, parameters, login, wider["scope"]))
    started = wire.ask("POST", f"/v2/{repo}/blobs/uploads/", token)
    assert started.status == 202
    data = os.urandom(1000)
    closed = wire.ask("PUT", f"{started['location']}?digest={digest_of(data)}", token, data)
    assert closed.status == 201


def test_crane_copy_mounts_with_a_scope_for_the_source(site: SiteWithAccounts, connect: Connect, repo: str) -> None:
    """If the token's scope includes the source repository, the registry mounts the blob. Otherwise it starts an upload
    session."""
    fill(site, f"{repo}/one")
    login = site.add_user({f"{repo}/one": "pull", f"{repo}/two": "pull,push"})
    wire, digest = connect(), digest_of(b"{}")
    parameters = challenge(wire.ask("GET", "/v2/"))
    target = f"/v2/{repo}/two/blobs/uploads/?from={quote(f'{repo}/one', safe='')}&mount={quote(digest, safe='')}"
    required = challenge(wire.ask("POST", target))
    assert required["scope"] == f"repository:{repo}/two:pull,push repository:{repo}/one:pull"
    target_only = bearer(get_token(wire, parameters, login, f"repository:{repo}/two:pull,push"))
    assert wire.ask("POST", target, target_only).status == 202
    both = bearer(get_token(wire, parameters, login, *required["scope"].split()))
    assert wire.ask("POST", target, both).status == 201


def test_buildkit_requests_one_token_for_several_repositories(
    site: SiteWithAccounts, connect: Connect, repo: str
) -> None:
    """BuildKit gets one token for several repositories with one POST. Actions that the account may not do are left out,
    and the response lists the granted scopes."""
    for path in ("base", "cache", "secret"):
        fill(site, f"{repo}/{path}")
    login, wire = site.add_user({f"{repo}/base": "pull", f"{repo}/cache": "pull,push"}), connect()
    scope = f"repository:{repo}/base:pull,push repository:{repo}/cache:pull,push repository:{repo}/secret:pull"
    fields = {"grant_type": "password", "client_id": "buildkit-client", "scope": scope}
    answer = post_token(wire, **fields, username=login.name, password=login.secret)
    assert answer.json()["scope"] == f"repository:{repo}/base:pull repository:{repo}/cache:pull,push"
    assert "refresh_token" not in answer.json()
    token = bearer(answer)
    found = {path: wire.ask("HEAD", f"/v2/{repo}/{path}/manifests/v1", token).status for path in ("base", "cache")}
    assert found == {"base": 200, "cache": 200}
    assert wire.ask("GET", f"/v2/{repo}/secret/manifests/v1", token).status == 404


def test_refresh_token_is_exchanged_for_tokens(site: SiteWithAccounts, connect: Connect, repo: str) -> None:
    """A request with `access_type=offline` gets a refresh token. The client can exchange it for tokens of any scope,
    but cannot use it as a password or as a bearer token."""
    body = fill(site, repo)
    login, wire = site.add_user({repo: "pull"}), connect()
    first = post_token(
        wire,
        grant_type="password",
        client_id="oras",
        access_type="offline",
        username=login.name,
        password=login.secret,
    )
    refresh = first.json()["refresh_token"]
    fields = {"grant_type": "refresh_token", "client_id": "oras", "refresh_token": refresh}
    token = bearer(post_token(wire, **fields, scope=f"repository:{repo}:pull"))
    assert wire.ask("GET", f"/v2/{repo}/manifests/v1", token).body == body
    as_password = {"Authorization": ClientLogin(login.name, refresh).basic}
    assert wire.ask("GET", "/v2/", as_password).status == 401
    assert wire.ask("GET", "/v2/", {"Authorization": f"Bearer {refresh}"}).status == 401


def test_wrong_logins_get_errors_in_both_formats(site: SiteWithAccounts, connect: Connect) -> None:
    """A token request with a wrong login gets an error in the registry's format. The response to a POST has the error
    in OAuth's format as well, so that both kinds of clients understand it."""
    wire, parameters = connect(), {"realm": "/token", "service": "entrepot"}
    login = site.add_user()
    for bad in (ClientLogin(login.name, WRONG), ClientLogin(site.name("nobody"), WRONG)):
        got = get_token(wire, parameters, bad)
        assert (got.status, got.codes) == (401, ["UNAUTHORIZED"])
        form = {"grant_type": "password", "client_id": "containerd-client"}
        posted = post_token(wire, **form, username=bad.name, password=bad.secret)
        assert (posted.status, posted.codes, posted.json()["error"]) == (401, ["UNAUTHORIZED"], "invalid_grant")


def test_revoked_credentials_are_refused_on_every_worker(site: SiteWithAccounts, connect: Connect, repo: str) -> None:
    """After an API token is revoked, both workers refuse it from the next request on, also on open connections, and
    they refuse bearer tokens that were issued for it. The same holds for a password after its account is disabled."""
    fill(site, repo)
    robot, login = site.add_robot({repo: "pull"}), site.add_user({repo: "pull"})
    wires = [connect() for _ in range(CONNECTIONS)]
    parameters = challenge(wires[0].ask("GET", "/v2/"))
    scope = f"repository:{repo}:pull"
    for owner, path, change in (
        # The second part of an API token is its id.
        (robot, f"/tokens/{robot.secret.split('_')[1]}", ("DELETE", None)),
        (login, f"/users/{login.name}", ("PATCH", {"enabled": False})),
    ):
        credentials = [bearer(get_token(wires[0], parameters, owner, scope)), {"Authorization": owner.basic}]

        def statuses(credentials: list[dict[str, str]]) -> set[int]:
            target = f"/v2/{repo}/manifests/v1"
            return {wire.ask("HEAD", target, each).status for wire in wires for each in credentials}

        assert statuses(credentials) == {200}
        site.call_ok(change[0], path, change[1])
        assert statuses(credentials) == {401}
        assert {get_token(wire, parameters, owner, scope).status for wire in wires} == {401}


def test_guessing_address_is_refused_even_with_the_right_password(site: SiteWithAccounts, repo: str) -> None:
    """After too many wrong passwords, a client address is refused even with the right password, at the registry and at
    `/token`, on every worker. The owner of the account can log in from another address meanwhile."""
    fill(site, repo)
    login = site.add_user({repo: "pull"})

    def statuses(source: str, secret: str, path: str) -> set[int]:
        found, headers = set(), {"Authorization": ClientLogin(login.name, secret).basic}
        with ExitStack() as stack:
            for _ in range(CONNECTIONS):
                connection = HTTPConnection(site.address, timeout=30, source_address=(source, 0))
                stack.callback(connection.close)
                connection.request("GET", path, headers=headers)
                found.add(connection.getresponse().status)
        return found

    for number in range(10):
        assert statuses("127.0.7.7", f"guess {number}", "/v2/") <= {401, 429}
    for path in ("/v2/", f"/v2/{repo}/manifests/v1", "/token"):
        assert statuses("127.0.0.1", login.secret, path) == {200}
        assert statuses("127.0.7.7", login.secret, path) == {429}
        assert statuses("127.0.7.7", "another guess", path) == {429}


def test_curl(site: SiteWithAccounts, repo: str) -> None:
    """curl sends a password or an API token to the registry itself, without a request to the token endpoint."""
    login, robot = site.add_user({f"{repo}/**": "pull,push"}), site.add_robot({f"{repo}/**": "pull"})
    curl = ForeignProgram(("curl", "--silent", "--show-error", "--fail-with-body"), {"PATH": PATH})
    root = f"http://{site.address}/v2/{repo}/app"
    as_person, as_robot = ("--user", f"{login.name}:{login.secret}"), ("--user", f"{robot.name}:{robot.secret}")
    assert curl(*as_person, f"http://{site.address}/v2/").out == "{}"
    started = curl(*as_person, "--request", "POST", "--include", f"{root}/blobs/uploads/").out
    location = re.search(r"(?im)^location: (\S+)", started)
    assert location is not None
    data = f"pushed with curl to {repo}"
    digest = digest_of(data.encode())
    target = f"http://{site.address}{location[1]}?digest={digest}"
    binary = "Content-Type: application/octet-stream"
    curl(*as_person, "--request", "PUT", "--header", binary, "--data-binary", data, target)
    for each in (as_person, as_robot):
        assert curl(*each, f"{root}/blobs/{digest}").out == data
    refused = curl.attempt(*as_robot, "--request", "POST", f"{root}/blobs/uploads/")
    assert json.loads(refused.out)["errors"][0]["message"] == f"{robot.name} may not push to {repo}/app"
    wrong = ("--user", f"{login.name}:{WRONG}")
    assert json.loads(curl.attempt(*wrong, f"{root}/blobs/{digest}").out)["errors"][0]["code"] == "UNAUTHORIZED"
    assert curl.attempt(f"{root}/blobs/{digest}").code != 0
    encoded = base64.b64encode(f"{robot.name}:{robot.secret}".encode()).decode()
    assert curl("--header", f"Authorization: Basic {encoded}", f"{root}/blobs/{digest}").out == data
