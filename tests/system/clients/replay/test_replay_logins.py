"""Logins as newer clients make them, and as curl makes them: crane (ggcr), BuildKit, containerd 2, oras."""

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

from tests.fakes.clients.member_site import WRONG, ClientLogin, MemberSite
from tests.fakes.clients.programs import PATH, ForeignProgram
from tests.fakes.raw_http import RawAnswer, RawConnection
from tests.fakes.raw_pushes import OCI_MANIFEST, RawPushes, digest_of, image

CONNECTIONS = 24
"""So many at once come to both workers."""
CHALLENGE = re.compile(r'(\w+)="([^"]*)"')

Open = Callable[[], RawConnection]
Headers = Mapping[str, str] | Iterable[tuple[str, str]]


@pytest.fixture
def opened(club: MemberSite) -> Iterator[Open]:
    """Opens connections to the registry with accounts."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(RawConnection(("127.0.0.1", club.server.port)))


class Signed(RawConnection):
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
    shown = answer["www-authenticate"]
    assert shown.startswith("Bearer ")
    return dict(CHALLENGE.findall(shown))


def bearer(answer: RawAnswer) -> dict[str, str]:
    assert answer.status == 200, answer.body
    token = answer.json()
    assert token["token"] == token["access_token"]
    assert token["expires_in"] >= 60
    return {"Authorization": f"Bearer {token['token']}"}


def get_token(wire: RawConnection, shown: dict[str, str], login: ClientLogin | None, *scopes: str) -> RawAnswer:
    """Requests a token as ggcr and oras do: a GET of the realm with Basic authentication, and a parameter for each
    scope."""
    query = urlencode([("service", shown["service"]), *(("scope", scope) for scope in scopes)])
    headers = {"Authorization": login.basic} if login else {}
    return wire.ask("GET", f"{urlsplit(shown['realm']).path}?{query}", headers)


def post_token(wire: RawConnection, **fields: str) -> RawAnswer:
    """Requests a token as BuildKit and containerd do: a form with all scopes in one field."""
    head = {"Content-Type": "application/x-www-form-urlencoded", "User-Agent": "buildkit/v0.26"}
    return wire.ask("POST", "/token", head, urlencode({"service": "entrepot", **fields}).encode())


def fill(club: MemberSite, repo: str) -> bytes:
    """Pushes a manifest with its blob under the tag `v1`."""
    with Signed(club.server.port, club.person({repo: "pull,push"}).basic) as wire:
        steps = RawPushes(wire, repo)
        steps.blob(b"{}")
        steps.manifest(image(b"{}"), "v1")
    return image(b"{}")


def test_crane_pull(club: MemberSite, opened: Open, repo: str) -> None:
    """crane sends a ping, requests a token, and pulls. The realm is at the host to which the client connected, and one
    connection is enough for all requests."""
    body = fill(club, repo)
    login, wire = club.person({repo: "pull"}), opened()
    shown = challenge(wire.ask("GET", "/v2/", {"Host": club.address}))
    assert shown == {"realm": f"http://{club.address}/token", "service": "entrepot"}
    token = bearer(get_token(wire, shown, login, f"repository:{repo}:pull"))
    assert wire.ask("GET", f"/v2/{repo}/manifests/v1", {**token, "Accept": OCI_MANIFEST}).body == body
    assert wire.ask("GET", f"/v2/{repo}/blobs/{digest_of(b'{}')}", token).body == b"{}"
    assert wire.ask("GET", "/v2/", token).status == 200


def test_crane_pull_of_what_is_for_everybody(club: MemberSite, opened: Open, repo: str) -> None:
    """Without a login, crane pulls public content with an anonymous token."""
    body = fill(club, repo)
    club.allow_everyone(repo)
    wire = opened()
    token = bearer(get_token(wire, challenge(wire.ask("GET", "/v2/")), None, f"repository:{repo}:pull"))
    assert wire.ask("GET", f"/v2/{repo}/manifests/v1", token).body == body
    refused = wire.ask("POST", f"/v2/{repo}/blobs/uploads/", token)
    assert challenge(refused)["scope"] == f"repository:{repo}:pull,push"


def test_crane_asks_for_more_when_it_is_told_to(club: MemberSite, opened: Open, repo: str) -> None:
    """With a token for pulls only, a push is refused with the scope that it needs. With a token of this scope, the push
    succeeds."""
    login, wire = club.person({repo: "pull,push"}), opened()
    shown = challenge(wire.ask("GET", "/v2/"))
    token = bearer(get_token(wire, shown, login, f"repository:{repo}:pull"))
    more = challenge(wire.ask("POST", f"/v2/{repo}/blobs/uploads/", token))
    assert (more["error"], more["scope"]) == ("insufficient_scope", f"repository:{repo}:pull,push")
    token = bearer(get_token(wire, shown, login, more["scope"]))
    started = wire.ask("POST", f"/v2/{repo}/blobs/uploads/", token)
    assert started.status == 202
    data = os.urandom(1000)
    closed = wire.ask("PUT", f"{started['location']}?digest={digest_of(data)}", token, data)
    assert closed.status == 201


def test_crane_copy_mounts_with_a_scope_for_the_source(club: MemberSite, opened: Open, repo: str) -> None:
    """If the token's scope includes the source, the blob is mounted. Otherwise an upload session starts, as for any
    push."""
    fill(club, f"{repo}/one")
    login = club.person({f"{repo}/one": "pull", f"{repo}/two": "pull,push"})
    wire, digest = opened(), digest_of(b"{}")
    shown = challenge(wire.ask("GET", "/v2/"))
    target = f"/v2/{repo}/two/blobs/uploads/?from={quote(f'{repo}/one', safe='')}&mount={quote(digest, safe='')}"
    named = challenge(wire.ask("POST", target))
    assert named["scope"] == f"repository:{repo}/two:pull,push repository:{repo}/one:pull"
    alone = bearer(get_token(wire, shown, login, f"repository:{repo}/two:pull,push"))
    assert wire.ask("POST", target, alone).status == 202
    both = bearer(get_token(wire, shown, login, *named["scope"].split()))
    assert wire.ask("POST", target, both).status == 201


def test_buildkit_asks_for_several_repositories_at_once(club: MemberSite, opened: Open, repo: str) -> None:
    """One POST gets one token for several repositories. Actions that the account may not do are left out, and the
    response lists the granted scopes."""
    for path in ("base", "cache", "secret"):
        fill(club, f"{repo}/{path}")
    login, wire = club.person({f"{repo}/base": "pull", f"{repo}/cache": "pull,push"}), opened()
    scope = f"repository:{repo}/base:pull,push repository:{repo}/cache:pull,push repository:{repo}/secret:pull"
    fields = {"grant_type": "password", "client_id": "buildkit-client", "scope": scope}
    answer = post_token(wire, **fields, username=login.name, password=login.secret)
    assert answer.json()["scope"] == f"repository:{repo}/base:pull repository:{repo}/cache:pull,push"
    assert "refresh_token" not in answer.json()
    token = bearer(answer)
    found = {path: wire.ask("HEAD", f"/v2/{repo}/{path}/manifests/v1", token).status for path in ("base", "cache")}
    assert found == {"base": 200, "cache": 200}
    assert wire.ask("GET", f"/v2/{repo}/secret/manifests/v1", token).status == 404


def test_a_refresh_token_is_changed_for_tokens(club: MemberSite, opened: Open, repo: str) -> None:
    """`access_type=offline` gets a refresh token. It can be exchanged for tokens of any scope, and cannot be used as a
    password."""
    body = fill(club, repo)
    login, wire = club.person({repo: "pull"}), opened()
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


def test_bad_logins_are_told_in_both_ways(club: MemberSite, opened: Open) -> None:
    """A wrong login gets an error in the registry's format by GET, and by POST also in OAuth's format, so that both
    kinds of clients understand it."""
    wire, shown = opened(), {"realm": "/token", "service": "entrepot"}
    login = club.person()
    for bad in (ClientLogin(login.name, WRONG), ClientLogin(club.name("nobody"), WRONG)):
        got = get_token(wire, shown, bad)
        assert (got.status, got.codes) == (401, ["UNAUTHORIZED"])
        form = {"grant_type": "password", "client_id": "containerd-client"}
        posted = post_token(wire, **form, username=bad.name, password=bad.secret)
        assert (posted.status, posted.codes, posted.json()["error"]) == (401, ["UNAUTHORIZED"], "invalid_grant")


def test_what_is_revoked_is_refused_on_every_worker(club: MemberSite, opened: Open, repo: str) -> None:
    """On open connections to both workers, an API token, and tokens that were made with it, are accepted until the API
    token is revoked, and refused from the next request on. So is a password, until the account is disabled."""
    fill(club, repo)
    robot, login = club.machine({repo: "pull"}), club.person({repo: "pull"})
    wires = [opened() for _ in range(CONNECTIONS)]
    shown = challenge(wires[0].ask("GET", "/v2/"))
    scope = f"repository:{repo}:pull"
    for who, path, change in (
        (robot, f"/tokens/{robot.secret.split('_')[1]}", ("DELETE", None)),
        (login, f"/users/{login.name}", ("PATCH", {"enabled": False})),
    ):
        shows = [bearer(get_token(wires[0], shown, who, scope)), {"Authorization": who.basic}]

        def statuses(shows: list[dict[str, str]]) -> set[int]:
            target = f"/v2/{repo}/manifests/v1"
            return {wire.ask("HEAD", target, each).status for wire in wires for each in shows}

        assert statuses(shows) == {200}
        club.done(change[0], path, change[1])
        assert statuses(shows) == {401}
        assert {get_token(wire, shown, who, scope).status for wire in wires} == {401}


def test_no_guess_is_told_from_another(club: MemberSite, repo: str) -> None:
    """A client that has guessed too often is refused even with the right password, at the registry and at `/token`, on
    every worker. The owner at another address can log in meanwhile."""
    fill(club, repo)
    login = club.person({repo: "pull"})

    def statuses(source: str, secret: str, path: str) -> set[int]:
        found, shown = set(), {"Authorization": ClientLogin(login.name, secret).basic}
        with ExitStack() as stack:
            for _ in range(CONNECTIONS):
                one = HTTPConnection(club.address, timeout=30, source_address=(source, 0))
                stack.callback(one.close)
                one.request("GET", path, headers=shown)
                found.add(one.getresponse().status)
        return found

    for number in range(10):
        assert statuses("127.0.7.7", f"guess {number}", "/v2/") <= {401, 429}
    for path in ("/v2/", f"/v2/{repo}/manifests/v1", "/token"):
        assert statuses("127.0.0.1", login.secret, path) == {200}
        assert statuses("127.0.7.7", login.secret, path) == {429}
        assert statuses("127.0.7.7", "another guess", path) == {429}


def test_curl(club: MemberSite, repo: str) -> None:
    """curl logs in with a password or an API token at the registry itself, without the token endpoint."""
    login, robot = club.person({f"{repo}/**": "pull,push"}), club.machine({f"{repo}/**": "pull"})
    curl = ForeignProgram(("curl", "--silent", "--show-error", "--fail-with-body"), {"PATH": PATH})
    root = f"http://{club.address}/v2/{repo}/app"
    who, ci = ("--user", f"{login.name}:{login.secret}"), ("--user", f"{robot.name}:{robot.secret}")
    assert curl(*who, f"http://{club.address}/v2/").out == "{}"
    started = curl(*who, "--request", "POST", "--include", f"{root}/blobs/uploads/").out
    location = re.search(r"(?im)^location: (\S+)", started)
    assert location is not None
    data = f"pushed with curl to {repo}"
    digest = digest_of(data.encode())
    target = f"http://{club.address}{location[1]}?digest={digest}"
    curl(*who, "--request", "PUT", "--header", "Content-Type: application/octet-stream", "--data-binary", data, target)
    for each in (who, ci):
        assert curl(*each, f"{root}/blobs/{digest}").out == data
    refused = curl.attempt(*ci, "--request", "POST", f"{root}/blobs/uploads/")
    assert json.loads(refused.out)["errors"][0]["message"] == f"{robot.name} may not push to {repo}/app"
    wrong = ("--user", f"{login.name}:{WRONG}")
    assert json.loads(curl.attempt(*wrong, f"{root}/blobs/{digest}").out)["errors"][0]["code"] == "UNAUTHORIZED"
    assert curl.attempt(f"{root}/blobs/{digest}").code != 0
    encoded = base64.b64encode(f"{robot.name}:{robot.secret}".encode()).decode()
    assert curl("--header", f"Authorization: Basic {encoded}", f"{root}/blobs/{digest}").out == data
