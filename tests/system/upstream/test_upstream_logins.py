"""Logins at upstreams: where the password comes from, how it is sent, and that it is never sent to the wrong place."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from registry.mirror.upstream_client import UnconfirmedNameUnknown
from registry.upstream.authorizer import PING_VALID_SECONDS
from storage.errors import BlobUnknown, Denied, ManifestUnknown, NameUnknown, TooManyRequests, UpstreamUnavailable
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub
from tests.fakes.server_process import ROOT
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import (
    LOGIN,
    REPO,
    TAG,
    UpstreamClock,
    answer,
    fetch,
    logged_in,
    scripted_server,
    upstream_source,
)


@pytest.mark.parametrize("auth", ["bearer", "basic"])
async def test_a_login(registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path, auth: str) -> None:
    """With a login private content can be pulled, by Bearer and by Basic."""
    upstream.set(auth=auth, private=[REPO], **LOGIN)
    async with upstream_source(registry, upstream.url, **logged_in(tmp_path)) as source:
        assert (await source.get_manifest(REPO, TAG)).body == image.body
        assert bytes((await fetch(source, image.layers[0].digest)).body) == image.layers[0].read()


@pytest.mark.parametrize("auth", ["bearer", "basic"])
async def test_a_login_that_is_refused(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path, auth: str
) -> None:
    """A refused login raises DENIED for every kind of request. The message has no password."""
    upstream.set(auth=auth, **LOGIN)
    async with upstream_source(registry, upstream.url, **logged_in(tmp_path, "wrong")) as source:
        for request in (
            source.get_manifest(REPO, TAG),
            source.resolve_manifest(REPO, TAG),
            source.tags(REPO, None, 10),
            source.resolve_blob(REPO, Digest(image.layers[0].digest)),
            fetch(source, image.layers[0].digest),
        ):
            with pytest.raises(Denied, match="login") as raised:
                await request
            assert "wrong" not in str(raised.value)


@pytest.mark.parametrize("auth", ["bearer", "basic"])
async def test_anonymous_and_refused(registry: StoredRegistry, upstream: Hub, image: ImageTree, auth: str) -> None:
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
            await source.resolve_blob(REPO, Digest(image.layers[0].digest))
        with pytest.raises(BlobUnknown):
            await fetch(source, image.layers[0].digest)
        if auth == "bearer":
            assert (await source.referrers(REPO, Digest(image.digest), None, None, 10)).items == []
        else:  # nobody could log in, so nobody said that there are no referrers
            with pytest.raises(UnconfirmedNameUnknown):
                await source.referrers(REPO, Digest(image.digest), None, None, 10)


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
    registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No log line contains the password or a token."""
    caplog.set_level(logging.DEBUG, "registry")
    upstream.set(auth="bearer", redirects=True, **LOGIN)
    async with upstream_source(registry, upstream.url, **logged_in(tmp_path)) as source:
        await source.get_manifest(REPO, TAG)
        await fetch(source, image.layers[0].digest)
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
