"""Tests of how the upstream client interprets an error status: the content does not exist, the login is refused, or the
upstream fails. A refusal is *unconfirmed* if it may not come from the registry. The mirror then keeps its cached
content."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from registry.mirror.upstream_client import (
    UnconfirmedBlobUnknown,
    UnconfirmedManifestUnknown,
    UnconfirmedNameUnknown,
)
from storage.errors import Denied, ManifestUnknown, RegistryError, TooManyRequests, UpstreamUnavailable
from storage.names import Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import ABSENT, REPO, TAG, always, answer, fetch, scripted_server, upstream_source
from tests.system.upstream.conftest import good_repo


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, UpstreamUnavailable),
        (401, ManifestUnknown),
        (403, ManifestUnknown),
        (404, ManifestUnknown),
        (410, ManifestUnknown),
        (429, TooManyRequests),
        (500, UpstreamUnavailable),
        (502, UpstreamUnavailable),
        (503, UpstreamUnavailable),
        (504, UpstreamUnavailable),
    ],
)
async def test_error_of_each_status(registry: StoredRegistry, status: int, error: type[RegistryError]) -> None:
    """Without a login, each status raises the expected error, for GET and HEAD requests of manifests and for blobs. A
    429 is tested only for GET: `test_rate_limits.py` tests which requests the client sends after a 429."""
    async with scripted_server(lambda head: answer(status)) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(error) as raised:
            await source.get_manifest(REPO, TAG)
        assert isinstance(raised.value, ManifestUnknown) or type(raised.value) is error
        if status != 429:
            with pytest.raises(error):
                await source.resolve_manifest(REPO, TAG)
            with pytest.raises(RegistryError) as raised:
                await fetch(source, "sha256:" + "0" * 64)
            assert raised.value.code == ("BLOB_UNKNOWN" if error is ManifestUnknown else "UNAVAILABLE")


DENIED_BODY = '{"errors": [{"code": "DENIED", "message": "requested access to the resource is denied"}]}'
UNAUTHORIZED_BODY = DENIED_BODY.replace("DENIED", "UNAUTHORIZED")
HTML_PAGE = "<html>not for you</html>"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("status", "body", "is_confirmed"),
    [
        (404, DENIED_BODY, True),
        (410, DENIED_BODY, True),
        (401, DENIED_BODY, False),
        (403, DENIED_BODY, True),
        (403, DENIED_BODY.replace("DENIED", "UNAUTHORIZED"), False),
        (404, "404 page not found\n", False),
        (404, "", False),
        (404, '{"message": "no Route matched with those values"}', False),
        (404, '{"errors": [{"code": "E1020"}]}', False),
        (404, DENIED_BODY + " " * (64 << 10), False),
        (403, HTML_PAGE, False),
        (401, HTML_PAGE, False),
    ],
)
async def test_refusal_without_a_registry_error_is_unconfirmed(
    registry: StoredRegistry, status: int, body: str, is_confirmed: bool, method: str
) -> None:
    """A refusal with an error code of the distribution spec is confirmed, because it comes from the registry. Another
    body can come from a firewall or proxy, so the refusal is unconfirmed. A 401 and the code UNAUTHORIZED are
    unconfirmed too, because they concern the login and not the manifest. After a refused HEAD, which has no body, the
    client sends a GET."""

    def reply(head: str) -> bytes:
        return answer(status, b"" if head.startswith("HEAD") else body, content_length=str(len(body)))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(ManifestUnknown) as raised:
            await (source.get_manifest if method == "GET" else source.resolve_manifest)(REPO, TAG)
        assert type(raised.value) is (ManifestUnknown if is_confirmed else UnconfirmedManifestUnknown)
        assert server.count == (1 if method == "GET" else 2)


async def test_refusal_of_a_new_token_is_confirmed(registry: StoredRegistry, upstream: Hub, tmp_path: Path) -> None:
    """The token service issues a new token without access to a private repository. The registry refuses this token with
    `insufficient_scope`. This refusal is confirmed, even for HEAD, whose response has no body."""
    upstream.set(auth="bearer", private=[REPO], username="ann", password="x")
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(ManifestUnknown) as raised:
            await source.resolve_manifest(REPO, TAG)
        assert type(raised.value) is ManifestUnknown
    assert upstream.count("manifest", "GET") == 0


@pytest.mark.parametrize("body", [DENIED_BODY, HTML_PAGE, ""])
async def test_refusal_of_the_token_service_is_unconfirmed(registry: StoredRegistry, body: str) -> None:
    """If the token service refuses anonymous clients, this says nothing about the manifest, so the refusal is
    unconfirmed."""

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            return answer(403, body)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        for request in (source.get_manifest, source.resolve_manifest):
            with pytest.raises(UnconfirmedManifestUnknown):
                await request(REPO, TAG)


@pytest.mark.parametrize("token_status", [403, 429])
@pytest.mark.parametrize("status", [400, 403, 404, 410])
async def test_refusal_of_a_request_without_a_token_is_unconfirmed(
    registry: StoredRegistry, image: ImageTree, status: int, token_status: int
) -> None:
    """A registry requires a token, but its token service fails or refuses. If the registry then refuses the request
    without a token, and its response has no challenge, the refusal is unconfirmed: with a token, the registry might
    have the content. This holds for manifests, blobs and lists."""

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            return answer(200, '{"token": "t"}') if "good" in head.split()[1] else answer(token_status)
        if "authorization: bearer t" in head.lower():
            return answer(200, image.body, content_type=image.media_type)
        if "good" in head.split()[1]:
            return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')
        body = DENIED_BODY.replace("DENIED", "NAME_UNKNOWN")
        return answer(status, b"" if head.startswith("HEAD") else body, content_length=str(len(body)))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        requests: list[Callable[[], Awaitable[object]]] = [
            lambda: source.get_manifest(REPO, TAG),
            lambda: source.resolve_manifest(REPO, TAG),
            lambda: source.resolve_blob(REPO, ABSENT),
            lambda: fetch(source, ABSENT),
            lambda: source.tags(REPO, None, 5),
            lambda: source.referrers(REPO, ABSENT, None, None, 5),
        ]
        # This request gets a token. After it, the client knows the token service of the registry, and requests tokens
        # for other repositories there. After several failures in a row, the client stops that, and sends requests
        # without a token at once. So the first of `requests` fail to get a token, and the last ones do not try.
        assert await source.get_manifest(good_repo(), TAG)
        for request in requests:
            with pytest.raises((UnconfirmedManifestUnknown, UnconfirmedBlobUnknown, UnconfirmedNameUnknown)):
                await request()


async def test_referrers_without_a_token_are_unconfirmed(registry: StoredRegistry, image: ImageTree) -> None:
    """The first request for referrers is sent without a token, because the token service fails. The registry answers
    404. This does not show that the registry has no referrers API, so the client does not request the fallback tag, and
    the refusal is unconfirmed. The second request has a token and also gets 404. Then the client requests the fallback
    tag, which does not exist, and the list of referrers is empty."""

    def reply(head: str) -> bytes:
        path = head.split()[1]
        if "/token" in path:
            tokens.append(path)
            # The first token is for the good repository. The second request for a token comes from the first request
            # for referrers.
            return answer(500 if "good" not in path and len(tokens) == 2 else 200, '{"token": "t"}')
        if "good" in path:
            has_token = "authorization" in head.lower()
            return (
                answer(200, image.body, content_type=image.media_type)
                if has_token
                else answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')
            )
        return answer(404, DENIED_BODY.replace("DENIED", "NAME_UNKNOWN"))

    tokens: list[str] = []
    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert await source.get_manifest(good_repo(), TAG)
        with pytest.raises(UnconfirmedNameUnknown):
            await source.referrers(REPO, ABSENT, None, None, 5)
        assert not (await source.referrers(REPO, ABSENT, None, None, 5)).items


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("error", "body", "is_confirmed"),
    [
        ("insufficient_scope", DENIED_BODY, True),
        ("insufficient_scope", UNAUTHORIZED_BODY, True),
        ("insufficient_scope", "", True),
        ("", DENIED_BODY, True),
        ("", UNAUTHORIZED_BODY, False),
        ("", UNAUTHORIZED_BODY.replace("]", ', {"code": "DENIED"}]'), True),
        ("", "", False),
        ("invalid_token", DENIED_BODY, False),
        ("invalid_token", UNAUTHORIZED_BODY, False),
    ],
)
async def test_refusal_of_an_accepted_token_is_confirmed(
    registry: StoredRegistry, status: int, error: str, body: str, is_confirmed: bool
) -> None:
    """If the registry accepts the token but finds its permissions insufficient, the refusal is confirmed. If the
    registry does not accept the token, or answers UNAUTHORIZED without a reason, the refusal is unconfirmed: a registry
    that has lost its keys or has a wrong clock answers this to every token."""

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            return answer(200, '{"token": "t"}')
        challenge = f'Bearer realm="{server.url}/token"' + (f',error="{error}"' if "bearer t" in head.lower() else "")
        sent_body = b"" if head.startswith("HEAD") else body
        sent_status = status if "bearer t" in head.lower() else 401
        return answer(sent_status, sent_body, www_authenticate=challenge, content_length=str(len(body)))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        for request in (source.get_manifest, source.resolve_manifest):
            with pytest.raises(ManifestUnknown) as raised:
                await request(REPO, TAG)
            assert type(raised.value) is (ManifestUnknown if is_confirmed else UnconfirmedManifestUnknown)


async def test_get_overrules_a_head_without_the_manifest(registry: StoredRegistry, image: ImageTree) -> None:
    """If HEAD gets 404 and GET gets the manifest, the manifest exists."""

    def reply(head: str) -> bytes:
        return answer(404) if head.startswith("HEAD") else answer(200, image.body, content_type=image.media_type)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.resolve_manifest(REPO, TAG)).digest == image.digest


async def test_next_endpoint_is_used_after_an_unconfirmed_refusal(
    registry: StoredRegistry, upstream: Hub, image: ImageTree
) -> None:
    """The first endpoint decides whether a tag exists. But an unconfirmed refusal decides nothing, so the client uses
    the next endpoint. If the next endpoint answers "not found", the result is still unconfirmed."""
    async with (
        scripted_server(lambda head: answer(404, HTML_PAGE)) as first,
        upstream_source(registry, first.url, upstream.url) as source,
    ):
        assert (await source.resolve_manifest(REPO, TAG)).digest == image.digest
        with pytest.raises(UnconfirmedManifestUnknown):
            await source.resolve_manifest(REPO, Tag("absent"))


async def test_refusals_with_a_login(registry: StoredRegistry, tmp_path: Path) -> None:
    """If the client has a login, 401 and 403 raise Denied, because the login is refused. 404 still raises
    ManifestUnknown."""
    file = tmp_path / "password"
    file.write_text("x")
    for status, error in ((401, Denied), (403, Denied), (404, ManifestUnknown)):
        async with (
            scripted_server(always(answer(status))) as server,
            upstream_source(registry, server.url, username="ann", password_file=file) as source,
        ):
            with pytest.raises(error):
                await source.get_manifest(REPO, TAG)


async def test_invalid_name_is_unknown(registry: StoredRegistry) -> None:
    """If a registry answers 400 with the code NAME_INVALID, it has no such repository, so the manifest is unknown."""
    body = '{"errors": [{"code": "NAME_INVALID"}]}'
    async with (
        scripted_server(lambda head: answer(400, body)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(ManifestUnknown):
            await source.get_manifest(REPO, TAG)


async def test_refusal_of_a_redirect_target_is_unavailable(registry: StoredRegistry) -> None:
    """If the target of a redirect refuses the request, for example because the URL has expired, the client raises
    UpstreamUnavailable, so that the request can be retried. The blob is not reported as unknown."""
    async with (
        scripted_server(lambda head: answer(403)) as cdn,
        scripted_server(lambda head: answer(307, location=f"{cdn.url}/x")) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="refuses the request"):
            await fetch(source, "sha256:" + "0" * 64)
