"""What an upstream's error status means: the content does not exist, the login is refused, or the upstream fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from registry.mirror.upstream_client import UnconfirmedManifestUnknown
from storage.errors import Denied, ManifestUnknown, RegistryError, TooManyRequests, UpstreamUnavailable
from storage.names import Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub
from tests.fakes.upstream_content import ImageTree
from tests.fakes.upstream_source import REPO, TAG, always, answer, fetch, scripted_server, upstream_source


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
async def test_what_a_status_means(registry: StoredRegistry, status: int, error: type[RegistryError]) -> None:
    """Each status leads to its error, for manifests by GET and HEAD and for blobs, without a login."""
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


CODE = '{"errors": [{"code": "DENIED", "message": "requested access to the resource is denied"}]}'
UNAUTHORIZED = CODE.replace("DENIED", "UNAUTHORIZED")
PAGE = "<html>not for you</html>"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("status", "body", "sure"),
    [
        (404, CODE, True),
        (410, CODE, True),
        (401, CODE, False),
        (403, CODE, True),
        (403, CODE.replace("DENIED", "UNAUTHORIZED"), False),
        (404, "404 page not found\n", False),
        (404, "", False),
        (404, '{"message": "no Route matched with those values"}', False),
        (404, '{"errors": [{"code": "E1020"}]}', False),
        (404, CODE + " " * (64 << 10), False),
        (403, PAGE, False),
        (401, PAGE, False),
    ],
)
async def test_whose_refusal_it_is(registry: StoredRegistry, status: int, body: str, sure: bool, method: str) -> None:
    """A refusal with a registry's error code comes from the registry. A firewall, or a proxy before a restarting
    registry, refuses in other words: that is unconfirmed. So is the registry's refusal of our login, which says nothing
    about the manifest. A response to HEAD has no body, so a GET follows."""

    def reply(head: str) -> bytes:
        return answer(status, b"" if head.startswith("HEAD") else body, content_length=str(len(body)))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(ManifestUnknown) as raised:
            await (source.get_manifest if method == "GET" else source.resolve_manifest)(REPO, TAG)
        assert type(raised.value) is (ManifestUnknown if sure else UnconfirmedManifestUnknown)
        assert server.count == (1 if method == "GET" else 2)


async def test_a_refusal_after_a_token_was_got(registry: StoredRegistry, upstream: Hub, tmp_path: Path) -> None:
    """A server that asks for a token and refuses the one it issued is the registry, also for HEAD, without a body."""
    upstream.set(auth="bearer", private=[REPO], username="ann", password="x")
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(ManifestUnknown) as raised:
            await source.resolve_manifest(REPO, TAG)
        assert type(raised.value) is ManifestUnknown
    assert upstream.count("manifest", "GET") == 0


@pytest.mark.parametrize("body", [CODE, PAGE, ""])
async def test_a_token_service_s_refusal_is_doubtful(registry: StoredRegistry, body: str) -> None:
    """A token service that refuses anonymous clients says nothing about the manifest: the refusal is unconfirmed."""

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            return answer(403, body)
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        for request in (source.get_manifest, source.resolve_manifest):
            with pytest.raises(UnconfirmedManifestUnknown):
                await request(REPO, TAG)


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize(
    ("error", "body", "sure"),
    [
        ("insufficient_scope", CODE, True),
        ("insufficient_scope", UNAUTHORIZED, True),
        ("insufficient_scope", "", True),
        ("", CODE, True),
        ("", UNAUTHORIZED, False),
        ("", UNAUTHORIZED.replace("]", ', {"code": "DENIED"}]'), True),
        ("", "", False),
        ("invalid_token", CODE, False),
        ("invalid_token", UNAUTHORIZED, False),
    ],
)
async def test_a_token_that_is_not_enough(
    registry: StoredRegistry, status: int, error: str, body: str, sure: bool
) -> None:
    """The registry accepts the token and finds it insufficient: there is nothing for anonymous clients. A token that it
    does not accept is a failed login, and so is UNAUTHORIZED without a reason: registries that lost their keys, or
    whose clock is wrong, answer that for every token."""

    def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            return answer(200, '{"token": "t"}')
        challenge = f'Bearer realm="{server.url}/token"' + (f',error="{error}"' if "bearer t" in head.lower() else "")
        said = b"" if head.startswith("HEAD") else body
        refused = status if "bearer t" in head.lower() else 401
        return answer(refused, said, www_authenticate=challenge, content_length=str(len(body)))

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        for request in (source.get_manifest, source.resolve_manifest):
            with pytest.raises(ManifestUnknown) as raised:
                await request(REPO, TAG)
            assert type(raised.value) is (ManifestUnknown if sure else UnconfirmedManifestUnknown)


async def test_a_head_that_is_wrong(registry: StoredRegistry, image: ImageTree) -> None:
    """If HEAD says "not found" and GET returns a manifest, the manifest exists."""

    def reply(head: str) -> bytes:
        return answer(404) if head.startswith("HEAD") else answer(200, image.body, content_type=image.media_type)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.resolve_manifest(REPO, TAG)).digest == image.digest


async def test_a_doubtful_answer_is_none(registry: StoredRegistry, upstream: Hub, image: ImageTree) -> None:
    """After an unconfirmed response the next endpoint is asked, also for a tag, but a "not found" of that endpoint is
    not final."""
    async with (
        scripted_server(lambda head: answer(404, PAGE)) as first,
        upstream_source(registry, first.url, upstream.url) as source,
    ):
        assert (await source.resolve_manifest(REPO, TAG)).digest == image.digest
        with pytest.raises(UnconfirmedManifestUnknown):
            await source.resolve_manifest(REPO, Tag("absent"))


async def test_refusals_with_a_login(registry: StoredRegistry, tmp_path: Path) -> None:
    """With a login, refusals are refusals of the login; "not found" stays "not found"."""
    file = tmp_path / "password"
    file.write_text("x")
    for status, error in ((401, Denied), (403, Denied), (404, ManifestUnknown)):
        async with (
            scripted_server(always(answer(status))) as server,
            upstream_source(registry, server.url, username="ann", password_file=file) as source,
        ):
            with pytest.raises(error):
                await source.get_manifest(REPO, TAG)


async def test_codes_in_a_400(registry: StoredRegistry) -> None:
    """A registry that answers 400 for a name it would never store has no such repository."""
    body = '{"errors": [{"code": "NAME_INVALID"}]}'
    async with (
        scripted_server(lambda head: answer(400, body)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(ManifestUnknown):
            await source.get_manifest(REPO, TAG)


async def test_a_redirect_s_target_that_refuses_us(registry: StoredRegistry) -> None:
    """A redirect target that refuses an expired URL says nothing about access to the blob: it is a failure, and the
    request can be retried."""
    async with (
        scripted_server(lambda head: answer(403)) as cdn,
        scripted_server(lambda head: answer(307, location=f"{cdn.url}/x")) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="refuses us"):
            await fetch(source, "sha256:" + "0" * 64)
