"""Logins at upstreams: tokens are obtained once for all requests, renewed in time, and never sent to the wrong
place."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from registry.mirror.upstream_client import UnconfirmedNameUnknown
from registry.upstream.authorizer import PING_VALID_SECONDS
from storage.errors import (
    BlobUnknown,
    Denied,
    ManifestUnknown,
    NameUnknown,
    TooManyRequests,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.server_process import ROOT
from tests.fakes.upstream_content import ImageTree, UpstreamContent
from tests.fakes.upstream_source import (
    REPO,
    UpstreamClock,
    answer,
    fetch,
    opened_registry,
    scripted_server,
    upstream_source,
)

LOGIN = {"username": "ann", "password": "correct horse"}
TAG = Tag("1")


def logged_in(folder: Path, password: str = LOGIN["password"]) -> dict[str, Any]:
    """Returns settings with a password file."""
    file = folder / "password"
    file.write_text(f"{password}\n")
    return {"username": LOGIN["username"], "password_file": file}


async def test_one_token_for_all_who_ask(tmp_path: Path, upstream: Hub, held: ImageTree) -> None:
    """Twenty concurrent requests in two processes obtain one token, and later requests use it."""
    upstream.set(auth="bearer", latency=0.02)
    async with (
        opened_registry(tmp_path / "data") as one,
        opened_registry(tmp_path / "data") as two,
        upstream_source(one, upstream.url) as here,
        upstream_source(two, upstream.url) as there,
    ):
        await asyncio.gather(
            *(source.get_manifest(REPO, TAG) for source in (here, there) for _ in range(5)),
            *(fetch(source, held.layers[0].digest) for source in (here, there) for _ in range(5)),
        )
        assert upstream.count("token") == 1
        upstream.forget()
        await there.resolve_manifest(REPO, TAG)
        assert [seen.status for seen in upstream.requests()] == [200]


async def test_a_token_is_kept_over_a_restart(tmp_path: Path, upstream: Hub) -> None:
    """The next process starts with the token, without a 401."""
    upstream.set(auth="bearer")
    for _ in range(2):
        async with opened_registry(tmp_path / "data") as registry, upstream_source(registry, upstream.url) as source:
            await source.get_manifest(REPO, TAG)
    assert upstream.count("token") == 1
    assert [seen.status for seen in upstream.requests("manifest")] == [401, 200, 200]


async def test_a_token_is_renewed_before_it_expires(registry: StoredRegistry, upstream: Hub) -> None:
    """A token is renewed ten seconds early, so that none expires on its way."""
    upstream.set(auth="bearer", token_seconds=300)
    clock = UpstreamClock()
    async with upstream_source(registry, upstream.url, clock=clock) as source:
        await source.get_manifest(REPO, TAG)
        clock.now += 289
        await source.get_manifest(REPO, TAG)
        assert upstream.count("token") == 1
        clock.now += 2
        await source.get_manifest(REPO, TAG)
        assert upstream.count("token") == 2
    assert [seen.status for seen in upstream.requests("manifest")] == [401, 200, 200, 200]


async def test_a_token_that_is_refused_is_dropped(registry: StoredRegistry, upstream: Hub) -> None:
    """A refused token is replaced once, whatever its lifetime, and the request is sent again."""
    upstream.set(auth="bearer")
    async with upstream_source(registry, upstream.url) as source:
        await source.get_manifest(REPO, TAG)
        upstream.revoke()
        await asyncio.gather(*(source.get_manifest(REPO, TAG) for _ in range(5)))
    assert upstream.count("token") == 2


async def test_a_token_of_another_process_that_is_refused(tmp_path: Path, held: ImageTree) -> None:
    """A process whose token is refused finds a token that another process got since. When the registry refuses that
    one, too, the process gets a new one: the pull goes on."""
    accepted: set[str] = set()
    issued: list[str] = []

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            issued.append(f"t{len(issued) + 1}")
            accepted.clear()
            accepted.add(issued[-1])
            return answer(200, json.dumps({"token": issued[-1], "expires_in": 600}))
        if any(f"authorization: bearer {token}\r\n" in head.lower() for token in accepted):
            return answer(200, held.body, content_type=held.media_type)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token",service="here"')

    async with (
        opened_registry(tmp_path / "data") as registry,
        opened_registry(tmp_path / "data") as other,
        scripted_server(reply) as server,
        upstream_source(registry, server.url) as one,
        upstream_source(other, server.url) as two,
    ):
        await one.get_manifest(REPO, TAG)
        accepted.clear()
        await two.get_manifest(REPO, TAG)
        accepted.clear()
        assert (await one.get_manifest(REPO, TAG)).digest == held.digest
    assert issued == ["t1", "t2", "t3"]


async def test_a_registry_that_refuses_every_token(registry: StoredRegistry) -> None:
    """A new token that the registry refuses is not followed by another one."""
    issued: list[str] = []

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            issued.append(head)
            return answer(200, json.dumps({"token": f"t{len(issued)}"}))
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(ManifestUnknown):
            await source.get_manifest(REPO, TAG)
    assert len(issued) == 1


async def test_one_who_leaves_takes_no_token_from_others(registry: StoredRegistry, upstream: Hub) -> None:
    """Cancelling the request that started to obtain a token leaves the token to the waiting requests."""
    upstream.set(auth="bearer")
    upstream.fault(on="token", stall=True)
    async with upstream_source(registry, upstream.url) as source:
        first = asyncio.create_task(source.get_manifest(REPO, TAG))
        await upstream.arrival(1, "token")
        others = [asyncio.create_task(source.get_manifest(REPO, TAG)) for _ in range(3)]
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        upstream.release()
        await asyncio.gather(*others)
    assert upstream.count("token") == 1


async def test_nothing_is_contacted_before_it_is_needed(
    registry: StoredRegistry, upstream: Hub, tmp_path: Path
) -> None:
    """Creating a client contacts nobody and reads no file."""
    absent = tmp_path / "absent"
    async with upstream_source(registry, upstream.url, username="ann", password_file=absent, ca_file=absent) as source:
        assert (source.name, source.connections, source.is_nearly_exhausted()) == ("far.test", 8, False)
    assert upstream.opened == 0


@pytest.mark.parametrize("auth", ["bearer", "basic"])
async def test_a_login(registry: StoredRegistry, upstream: Hub, held: ImageTree, tmp_path: Path, auth: str) -> None:
    """With a login private content can be pulled, by Bearer and by Basic."""
    upstream.set(auth=auth, private=[REPO], **LOGIN)
    async with upstream_source(registry, upstream.url, **logged_in(tmp_path)) as source:
        assert (await source.get_manifest(REPO, TAG)).body == held.body
        assert bytes((await fetch(source, held.layers[0].digest)).body) == held.layers[0].read()


@pytest.mark.parametrize("auth", ["bearer", "basic"])
async def test_a_login_that_is_refused(
    registry: StoredRegistry, upstream: Hub, held: ImageTree, tmp_path: Path, auth: str
) -> None:
    """A refused login raises DENIED for every kind of request. The message has no password."""
    upstream.set(auth=auth, **LOGIN)
    async with upstream_source(registry, upstream.url, **logged_in(tmp_path, "wrong")) as source:
        for request in (
            source.get_manifest(REPO, TAG),
            source.resolve_manifest(REPO, TAG),
            source.tags(REPO, None, 10),
            source.resolve_blob(REPO, Digest(held.layers[0].digest)),
            fetch(source, held.layers[0].digest),
        ):
            with pytest.raises(Denied, match="login") as raised:
                await request
            assert "wrong" not in str(raised.value)


@pytest.mark.parametrize("auth", ["bearer", "basic"])
async def test_anonymous_and_refused(registry: StoredRegistry, upstream: Hub, held: ImageTree, auth: str) -> None:
    """Private content looks like missing content: it is unknown."""
    upstream.set(auth=auth, private=[REPO], **LOGIN)
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(ManifestUnknown):
            await source.get_manifest(REPO, TAG)
        with pytest.raises(ManifestUnknown):
            await source.resolve_manifest(REPO, TAG)
        with pytest.raises(NameUnknown):
            await source.tags(REPO, None, 10)
        with pytest.raises(BlobUnknown):
            await source.resolve_blob(REPO, Digest(held.layers[0].digest))
        with pytest.raises(BlobUnknown):
            await fetch(source, held.layers[0].digest)
        if auth == "bearer":
            assert (await source.referrers(REPO, Digest(held.digest), None, None, 10)).items == []
        else:  # nobody was let in, so nobody said that there are none
            with pytest.raises(UnconfirmedNameUnknown):
                await source.referrers(REPO, Digest(held.digest), None, None, 10)


async def test_a_token_service_that_refuses_the_anonymous(registry: StoredRegistry) -> None:
    """A token service may answer anonymous clients with 401 or 403 instead of a token without rights; the content is
    then unknown."""
    for status in (401, 403):

        def reply(head: str, status: int = status) -> bytes:
            if "/token" in head.split()[1]:
                return answer(status)
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token",service="x"')

        async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
            with pytest.raises(ManifestUnknown):
                await source.get_manifest(REPO, TAG)


async def test_a_login_may_see_what_others_are_told_is_not_there(registry: StoredRegistry, tmp_path: Path) -> None:
    """A registry with public content may answer 404, not 401, for private content: with a login, `/v2/` is asked first
    how to log in."""
    expected = "Basic " + base64.b64encode(b"ann:correct horse").decode()
    body = json.dumps({"name": REPO, "tags": ["1"]})

    def reply(head: str) -> bytes:
        if f"authorization: {expected}".lower() in head.lower():
            return answer(200, body)
        if head.startswith("GET /v2/ "):
            return answer(401, www_authenticate='Basic realm="x"')
        return answer(404)

    async with scripted_server(reply) as server, upstream_source(registry, server.url, **logged_in(tmp_path)) as source:
        assert (await source.tags(REPO, None, 10)).items == ["1"]
    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(NameUnknown):
            await source.tags(REPO, None, 10)


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_an_endpoint_that_does_not_say_how_to_log_in(
    registry: StoredRegistry, tmp_path: Path, status: int
) -> None:
    """`/v2/` may refuse without a challenge, as behind a proxy that forwards repositories only, and private content may
    be 404. Then Basic is tried after a refusal, and sent at once from then on."""
    expected = "Basic " + base64.b64encode(b"ann:correct horse").decode()

    def reply(head: str) -> bytes:
        if head.startswith("GET /v2/ "):
            return answer(status)
        known = f"authorization: {expected}".lower() in head.lower()
        return answer(200, json.dumps({"name": REPO, "tags": ["1"]})) if known else answer(404)

    async with scripted_server(reply) as server, upstream_source(registry, server.url, **logged_in(tmp_path)) as source:
        for _ in range(2):
            assert (await source.tags(REPO, None, 10)).items == ["1"]
        assert ["authorization" in head.lower() for head in server.heads] == [False, False, True, True]


async def test_a_login_nobody_asked_for(registry: StoredRegistry, tmp_path: Path) -> None:
    """A registry that answers Basic with a challenge gets what it asks for, by the rules for realms."""

    def reply(head: str) -> bytes:
        target, lower = head.split()[1], head.lower()
        if target.startswith("/token"):
            return answer(200, json.dumps({"token": "given"}))
        if "authorization: bearer given" in lower:
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        if "authorization: basic" in lower:
            return answer(401, www_authenticate=f'Bearer realm="{realm}"')
        return answer(404)

    async with scripted_server(reply) as server:
        realm = f"{server.url}/token"
        async with upstream_source(registry, server.url, **logged_in(tmp_path)) as source:
            assert (await source.tags(REPO, None, 10)).items == ["1"]
    async with scripted_server(reply) as server:
        realm = "http://127.0.0.2:1/token"
        async with upstream_source(registry, server.url, **logged_in(tmp_path)) as source:
            with pytest.raises(UpstreamUnavailable, match="token service"):
                await source.tags(REPO, None, 10)


async def test_an_endpoint_that_wants_no_login(registry: StoredRegistry, tmp_path: Path) -> None:
    """An endpoint whose `/v2/` answers everybody with 200 does not get the password, and is asked again after a
    while."""
    clock = UpstreamClock()
    shut = False

    def reply(head: str) -> bytes:
        if "authorization: basic" in head.lower():
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        if head.startswith("GET /v2/ "):
            return answer(401, www_authenticate='Basic realm="x"') if shut else answer(200, "{}")
        return answer(404)

    async with (
        scripted_server(reply) as server,
        upstream_source(registry, server.url, clock=clock, **logged_in(tmp_path)) as source,
    ):
        with pytest.raises(NameUnknown):
            await source.tags(REPO, None, 10)
        assert "authorization" not in "".join(server.heads).lower()
        shut = True
        clock.now += PING_VALID_SECONDS - 1
        with pytest.raises(NameUnknown):
            await source.tags(REPO, None, 10)
        clock.now += 1
        assert (await source.tags(REPO, None, 10)).items == ["1"]


async def test_a_limit_on_asking_how_to_log_in(registry: StoredRegistry, tmp_path: Path) -> None:
    """A 429 at `/v2/` is reported and waited out. No anonymous request is sent instead, which might see less."""
    clock = UpstreamClock()
    limited = True

    def reply(head: str) -> bytes:
        if "authorization: basic" in head.lower():
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        if head.startswith("GET /v2/ "):
            return answer(429, retry_after="9") if limited else answer(401, www_authenticate='Basic realm="x"')
        return answer(404)

    async with (
        scripted_server(reply) as server,
        upstream_source(registry, server.url, clock=clock, **logged_in(tmp_path)) as source,
    ):
        for _ in range(2):
            with pytest.raises(TooManyRequests):
                await source.tags(REPO, None, 10)
        assert server.count == 1
        limited = False
        clock.now += 10
        assert (await source.tags(REPO, None, 10)).items == ["1"]


async def test_passwords_that_change(registry: StoredRegistry, upstream: Hub, tmp_path: Path) -> None:
    """A changed password file is read again without a restart."""
    upstream.set(auth="basic", **LOGIN)
    settings = logged_in(tmp_path, "wrong")
    async with upstream_source(registry, upstream.url, **settings) as source:
        with pytest.raises(Denied):
            await source.get_manifest(REPO, TAG)
        settings["password_file"].write_text(LOGIN["password"])
        await source.get_manifest(REPO, TAG)


async def test_a_password_in_the_environment(
    registry: StoredRegistry, upstream: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The password is read from the variable; a missing variable is logged."""
    upstream.set(auth="bearer", private=[REPO], **LOGIN)
    async with upstream_source(registry, upstream.url, username="ann", password_env="FAR_PASSWORD") as source:
        with pytest.raises(UpstreamUnavailable, match="login"):
            await source.get_manifest(REPO, TAG)
        assert "FAR_PASSWORD is not set" in caplog.text
        monkeypatch.setenv("FAR_PASSWORD", LOGIN["password"])
        await source.get_manifest(REPO, TAG)


@pytest.mark.parametrize("entry", ["auth", "fields"])
async def test_a_docker_config(registry: StoredRegistry, upstream: Hub, tmp_path: Path, entry: str) -> None:
    """The login that `docker login` stored for the upstream's name is used."""
    upstream.set(auth="bearer", private=[REPO], **LOGIN)
    encoded = base64.b64encode(b"ann:correct horse").decode()
    login = {"auth": encoded} if entry == "auth" else LOGIN
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {"other.test": {"auth": "eDp5"}, "far.test": login}}))
    async with upstream_source(registry, upstream.url, docker_config=file) as source:
        await source.get_manifest(REPO, TAG)


async def test_a_docker_config_without_the_name(
    registry: StoredRegistry, upstream: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a login for the name, requests are anonymous, and the log says so once."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {}, "credsStore": "desktop"}))
    async with upstream_source(registry, upstream.url, docker_config=file) as source:
        for _ in range(2):
            await source.get_manifest(REPO, TAG)
    assert caplog.text.count("credential helper") == 1


async def test_an_identity_token(registry: StoredRegistry, tmp_path: Path) -> None:
    """An identity token is sent to the token service by POST, as a refresh token."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {"far.test": {"auth": "PHRva2VuPjo=", "identitytoken": "id-1"}}}))

    def reply(head: str) -> bytes:
        target = head.split()[1]
        if target == "/token":
            return answer(200, json.dumps({"access_token": "given"}), connection="close")
        if "authorization: bearer given" in head.lower():
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token",service="x y"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url, docker_config=file) as source:
        assert (await source.tags(REPO, None, 10)).items == ["1"]
    token_heads = [head for head in server.heads if "/token" in head.split()[1]]
    assert [head.split()[0] for head in token_heads] == ["POST"]
    assert "authorization" not in token_heads[0].lower()


async def test_a_token_service_that_knows_post_alone(registry: StoredRegistry, tmp_path: Path) -> None:
    """If GET is not allowed, the password is sent by POST."""

    def reply(head: str) -> bytes:
        method, target, _ = head.split(maxsplit=2)
        if target.startswith("/token"):
            said = answer(200, json.dumps({"access_token": "given"}), connection="close")
            return said if method == "POST" else answer(405)
        if "authorization: bearer given" in head.lower():
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url, **logged_in(tmp_path)) as source:
        assert (await source.tags(REPO, None, 10)).items == ["1"]


async def test_a_realm_elsewhere_is_not_asked(
    registry: StoredRegistry, upstream: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A foreign realm is not contacted, with or without the password. The log says how to allow it."""
    upstream.set(auth="bearer", realm=f"{upstream.auth_url}/token", **LOGIN)
    for login in ({}, logged_in(tmp_path)):
        async with upstream_source(registry, upstream.url, **login) as source:
            for _ in range(2):
                with pytest.raises(UpstreamUnavailable, match="token service"):
                    await source.get_manifest(REPO, TAG)
    assert upstream.count("token") == 0
    assert caplog.text.count("add it to the upstream's realms") == 2
    async with upstream_source(
        registry, upstream.url, realms=[f"{upstream.auth_url}/token"], **logged_in(tmp_path)
    ) as source:
        await source.get_manifest(REPO, TAG)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"status": 500}, UpstreamUnavailable),
        ({"status": 404}, UpstreamUnavailable),
        ({"status": 200}, UpstreamUnavailable),
        ({"hangup": True, "times": 2}, UpstreamUnavailable),
        ({"status": 429, "retry_after": "7"}, TooManyRequests),
        ({"stall": True}, UpstreamTimeout),
    ],
)
async def test_a_token_service_that_fails(
    registry: StoredRegistry, upstream: Hub, fault: dict[str, Any], error: type[Exception]
) -> None:
    """A failing token service is a failure of the upstream."""
    upstream.set(auth="bearer")
    upstream.fault(on="token", **fault)
    async with upstream_source(registry, upstream.url, idle_timeout=2) as source:
        with pytest.raises(error):
            await source.get_manifest(REPO, TAG)


async def test_tokens_that_are_none(registry: StoredRegistry) -> None:
    """Text that cannot be a header value, or no text, is not accepted as a token."""
    for body in ("{}", "[]", "nonsense", '{"token": 5}', '{"token": "a b"}', '{"token": "a\\r\\nHost: x"}'):

        def reply(head: str, body: str = body) -> bytes:
            if "/token" in head.split()[1]:
                return answer(200, body)
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

        async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
            with pytest.raises(UpstreamUnavailable, match="token"):
                await source.get_manifest(REPO, TAG)


async def test_the_scope_is_the_repository_s(registry: StoredRegistry, tmp_path: Path) -> None:
    """Each repository has its own token, for pull only."""
    content = UpstreamContent()
    other = RepositoryName("library/other")
    with hub(tmp_path, content, auth="bearer") as empty:
        async with upstream_source(registry, empty.url) as source:
            for repo in (REPO, other):
                with pytest.raises(ManifestUnknown):
                    await source.get_manifest(repo, TAG)
        scopes = sorted(seen.path.partition("scope=")[2] for seen in empty.requests("token"))
    assert scopes == ["repository%3Alibrary%2Fapp%3Apull", "repository%3Alibrary%2Fother%3Apull"]


async def test_a_redirect_keeps_authorization_at_home(registry: StoredRegistry, tmp_path: Path) -> None:
    """No redirect target gets the login: not another port, and not the endpoint after a redirect back."""
    seen: list[str] = []

    def away(head: str) -> bytes:
        seen.append(head)
        return answer(307, location=f"{home.url}/v2/back")

    def reply(head: str) -> bytes:
        target = head.split()[1]
        if target == "/v2/":
            return answer(401, www_authenticate='Basic realm="x"')
        if target == "/v2/back":
            seen.append(head)
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        assert "authorization: basic" in head.lower()
        return answer(302, location=f"{other.url}/away")

    async with (
        scripted_server(away) as other,
        scripted_server(reply) as home,
        upstream_source(registry, home.url, **logged_in(tmp_path)) as source,
    ):
        assert (await source.tags(REPO, None, 10)).items == ["1"]
    assert len(seen) == 2
    assert "authorization" not in "".join(seen).lower()


async def test_nothing_secret_is_logged(
    registry: StoredRegistry, upstream: Hub, held: ImageTree, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No log line contains the password or a token."""
    caplog.set_level(logging.DEBUG, "registry")
    upstream.set(auth="bearer", redirects=True, **LOGIN)
    async with upstream_source(registry, upstream.url, **logged_in(tmp_path)) as source:
        await source.get_manifest(REPO, TAG)
        await fetch(source, held.layers[0].digest)
        upstream.set(auth="basic")
        await source.get_manifest(REPO, TAG)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("registry")]
    assert not [line for line in lines if LOGIN["password"] in line or "Bearer " in line or "Basic " in line]


def test_the_libraries_log_no_addresses() -> None:
    """The URL of a redirect can grant access, and httpx2 would log it at level info."""
    program = (
        "import logging, sys; from registry.log_output import log_to_stderr; log_to_stderr('debug');"
        "names = ('httpx2', 'httpcore2.http11', 'urllib3.connectionpool');"
        "sys.exit(any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
