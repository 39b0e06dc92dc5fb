"""Tests of the login of the upstream client at an upstream: where the password comes from, how it is sent, and that it
is never sent to another host."""

from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from registry.mirror.upstream_client import UnconfirmedNameUnknown
from registry.upstream.authorizer import PING_VALID_SECONDS
from registry.upstream.client import HttpUpstreamClient
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
    always,
    answer,
    fetch,
    logged_in,
    scripted_server,
    upstream_source,
)


@pytest.mark.parametrize("auth", ["bearer", "basic"])
async def test_a_login(registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path, auth: str) -> None:
    """With a login, private content can be pulled from an upstream with Bearer or with Basic authentication."""
    upstream.set(auth=auth, private=[REPO], **LOGIN)
    async with upstream_source(registry, upstream.url, **logged_in(tmp_path)) as source:
        assert (await source.get_manifest(REPO, TAG)).body == image.body
        assert bytes((await fetch(source, image.layers[0].digest)).body) == image.layers[0].read()


@pytest.mark.parametrize("auth", ["bearer", "basic"])
async def test_refused_login_raises_denied(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path, auth: str
) -> None:
    """If the upstream refuses the login, every kind of request raises Denied. The message does not contain the
    password."""
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
async def test_private_content_without_a_login_is_unknown(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, auth: str
) -> None:
    """Without a login, private content looks like missing content, so requests for it raise "unknown" errors."""
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
        else:  # the refusal may come from a firewall, so it does not tell whether there are referrers
            with pytest.raises(UnconfirmedNameUnknown):
                await source.referrers(REPO, Digest(image.digest), None, None, 10)


async def test_login_is_used_although_the_upstream_answers_404(registry: StoredRegistry, tmp_path: Path) -> None:
    """An upstream may answer 404 instead of 401 for private content, so it does not ask for a login. A client with a
    password therefore requests `/v2/` first to find out how to log in."""
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
async def test_basic_login_is_tried_if_v2_has_no_challenge(
    registry: StoredRegistry, tmp_path: Path, status: int
) -> None:
    """`/v2/` may be refused without a challenge, for example by a proxy that forwards repositories only, while private
    content gets 404. The client then tries Basic authentication after the 404. For later requests it sends the password
    at once."""
    expected = "Basic " + base64.b64encode(b"ann:correct horse").decode()

    def reply(head: str) -> bytes:
        if head.startswith("GET /v2/ "):
            return answer(status)
        is_logged_in = f"authorization: {expected}".lower() in head.lower()
        return answer(200, json.dumps({"name": REPO, "tags": ["1"]})) if is_logged_in else answer(404)

    async with scripted_server(reply) as server, upstream_source(registry, server.url, **logged_in(tmp_path)) as source:
        for _ in range(2):
            assert (await source.tags(REPO, None, 10)).items == ["1"]
        assert ["authorization" in head.lower() for head in server.heads] == [False, False, True, True]


async def test_challenge_after_an_unrequested_basic_login(registry: StoredRegistry, tmp_path: Path) -> None:
    """If the upstream answers Basic authentication with a Bearer challenge, the client gets a token from the realm in
    the challenge. It refuses a realm on another host."""

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


async def test_password_is_not_sent_to_a_public_endpoint(registry: StoredRegistry, tmp_path: Path) -> None:
    """If `/v2/` answers 200 without a login, the endpoint does not get the password. After a while the client requests
    `/v2/` again, and logs in if a login is now required."""
    clock = UpstreamClock()
    requires_login = False

    def reply(head: str) -> bytes:
        if "authorization: basic" in head.lower():
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        if head.startswith("GET /v2/ "):
            return answer(401, www_authenticate='Basic realm="x"') if requires_login else answer(200, "{}")
        return answer(404)

    async with (
        scripted_server(reply) as server,
        upstream_source(registry, server.url, clock=clock, **logged_in(tmp_path)) as source,
    ):
        with pytest.raises(NameUnknown):
            await source.tags(REPO, None, 10)
        assert "authorization" not in "".join(server.heads).lower()
        requires_login = True
        clock.now += PING_VALID_SECONDS - 1
        with pytest.raises(NameUnknown):
            await source.tags(REPO, None, 10)
        clock.now += 1
        assert (await source.tags(REPO, None, 10)).items == ["1"]


async def test_429_of_v2_is_reported(registry: StoredRegistry, tmp_path: Path) -> None:
    """A 429 of `/v2/` raises TooManyRequests, and the client sends no request until its Retry-After has passed. It does
    not send the request without a login instead, because it could then get a wrong 404."""
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


async def test_changed_password_file_is_read_again(registry: StoredRegistry, upstream: Hub, tmp_path: Path) -> None:
    """After a refused login, a changed password file is used without a restart."""
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
    """The password is read from the environment variable that `password_env` names. If the variable is missing, the
    request fails and the log names the variable."""
    upstream.set(auth="bearer", private=[REPO], **LOGIN)
    async with upstream_source(registry, upstream.url, username="ann", password_env="FAR_PASSWORD") as source:
        with pytest.raises(UpstreamUnavailable, match="login"):
            await source.get_manifest(REPO, TAG)
        assert "FAR_PASSWORD is not set" in caplog.text
        monkeypatch.setenv("FAR_PASSWORD", LOGIN["password"])
        await source.get_manifest(REPO, TAG)


@pytest.mark.parametrize("entry", ["auth", "fields"])
async def test_login_from_a_docker_config(registry: StoredRegistry, upstream: Hub, tmp_path: Path, entry: str) -> None:
    """The client uses the login that `docker login` has stored under the upstream's name."""
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
    """If the docker config has no login for the name of the upstream, requests are anonymous, and the log mentions this
    once. If the config leaves passwords to a credential helper (`credsStore`), which is not supported, the log says
    that as well."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"auths": {}, "credsStore": "desktop"}))
    async with upstream_source(registry, upstream.url, docker_config=file) as source:
        for _ in range(2):
            await source.get_manifest(REPO, TAG)
    assert caplog.text.count("credential helper") == 1


async def test_redirect_targets_get_no_login(registry: StoredRegistry, tmp_path: Path) -> None:
    """The login is not sent to the target of a redirect on another port. If this target redirects back to the endpoint,
    the login is not sent there either."""
    redirected_heads: list[str] = []

    def redirect_back(head: str) -> bytes:
        redirected_heads.append(head)
        return answer(307, location=f"{endpoint.url}/v2/back")

    def reply(head: str) -> bytes:
        target = head.split()[1]
        if target == "/v2/":
            return answer(401, www_authenticate='Basic realm="x"')
        if target == "/v2/back":
            redirected_heads.append(head)
            return answer(200, json.dumps({"name": REPO, "tags": ["1"]}))
        assert "authorization: basic" in head.lower()
        return answer(302, location=f"{redirect_target.url}/away")

    async with (
        scripted_server(redirect_back) as redirect_target,
        scripted_server(reply) as endpoint,
        upstream_source(registry, endpoint.url, **logged_in(tmp_path)) as source,
    ):
        assert (await source.tags(REPO, None, 10)).items == ["1"]
    assert len(redirected_heads) == 2
    assert "authorization" not in "".join(redirected_heads).lower()


async def test_links_to_next_pages_cannot_lead_to_another_server(registry: StoredRegistry, tmp_path: Path) -> None:
    """A link to the next page of tags, referrers or repositories cannot send the request, which has the login, to
    another host or port. The list raises an error instead."""

    def reply(head: str) -> bytes:
        if "authorization" not in head.lower():
            return answer(401, www_authenticate='Basic realm="x"')
        page: dict[str, object] = {"tags": ["1"], "repositories": [REPO], "manifests": []}
        # The client takes only the path of a link. Here the path is `@HOST:PORT/stolen`: put behind the origin of the
        # endpoint, it would turn that origin into a user name and a password for HOST:PORT.
        link = f'<x:@{other.url.removeprefix("http://")}/stolen>; rel="next"'
        return answer(200, json.dumps({"schemaVersion": 2, "name": REPO, **page}), link=link)

    async with (
        scripted_server(always(answer(200, json.dumps({"tags": []})))) as other,
        scripted_server(reply) as endpoint,
        upstream_source(registry, endpoint.url, **logged_in(tmp_path)) as source,
    ):
        assert isinstance(source, HttpUpstreamClient)
        for request in (
            source.tags(REPO, None, 10),
            source.referrers(REPO, Digest(f"sha256:{'a' * 64}"), None, None, 10),
            source.catalog_page(None),
        ):
            with pytest.raises(UpstreamUnavailable, match="Link"):
                await request
        assert other.count == 0


async def test_a_next_page_on_another_origin_is_not_requested(registry: StoredRegistry, tmp_path: Path) -> None:
    """The request for the next page of a list has the login of the endpoint. So if the URL of that page has another
    origin, for example because another endpoint has sent the previous page, the client raises an error and sends no
    request."""

    def reply(head: str) -> bytes:
        if "authorization" not in head.lower():
            return answer(401, www_authenticate='Basic realm="x"')
        return answer(200, json.dumps({"repositories": [REPO]}), link='</v2/_catalog?last=a>; rel="next"')

    async with (
        scripted_server(reply) as endpoint,
        scripted_server(reply) as other,
        upstream_source(registry, endpoint.url, **logged_in(tmp_path)) as source,
    ):
        assert isinstance(source, HttpUpstreamClient)
        page = await source.catalog_page(None)
        assert page.next_url == f"{endpoint.url}/v2/_catalog?last=a"
        with pytest.raises(UpstreamUnavailable, match="another origin"):
            await source.catalog_page(replace(page, next_url=f"{other.url}/v2/_catalog"))
        assert other.count == 0


async def test_no_password_or_token_is_logged(
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


def test_http_libraries_do_not_log_urls() -> None:
    """The HTTP libraries do not log requests, even at the log level `debug`. httpx2 would log the URLs of redirects,
    which can grant access to blobs."""
    program = (
        "import logging, sys; from registry.log_output import log_to_stderr; log_to_stderr('debug');"
        "names = ('httpx2', 'httpcore2.http11', 'urllib3.connectionpool');"
        "sys.exit(any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in names))"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
