"""Manifests from upstreams: the exact bytes, verified, by tag and by digest."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from registry.config import Upstream
from registry.memory_budget import MemoryBudget, ShareScope
from registry.single_flight import SingleFlight
from registry.upstream.api_client import ApiClient
from registry.upstream.client import HttpUpstreamClient
from registry.upstream.destinations import AddressPolicy
from registry.upstream.request_limits import MIB
from registry.upstream.transport import OutboundProxies, TrustStore
from registry.upstream.upstream_responses import DocumentParser
from storage.content import OCI_MANIFEST, Manifest
from storage.errors import ManifestUnknown, UpstreamTimeout, UpstreamUnavailable
from storage.names import Digest, Reference, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.hub.hub import Hub, hub
from tests.fakes.upstream_content import ImageTree, UpstreamBlob, UpstreamContent, manifest_of, ubuntu
from tests.fakes.upstream_source import REPO, TAG, always, answer, scripted_server, upstream_source


@pytest.mark.parametrize("by", ["tag", "digest"])
async def test_a_manifest(registry: StoredRegistry, upstream: Hub, image: ImageTree, by: str) -> None:
    """A manifest arrives as it was pushed, with one GET; its descriptor takes one HEAD."""
    reference: Reference = TAG if by == "tag" else Digest(image.digest)
    async with upstream_source(registry, upstream.url) as source:
        found = await source.get_manifest(REPO, reference)
        assert (found.body, found.media_type, found.digest) == (image.body, image.media_type, image.digest)
        told = await source.resolve_manifest(REPO, reference)
        assert (told.media_type, told.digest, told.size) == (image.media_type, image.digest, len(image.body))
    assert [seen.method for seen in upstream.requests()] == ["GET", "HEAD"]


async def test_every_kind_of_manifest_is_accepted(registry: StoredRegistry, upstream: Hub) -> None:
    """`Accept` lists docker's and OCI's manifests and indexes, and not schema 1."""
    content = UpstreamContent()
    real = content.add(REPO, ubuntu(), "18.04")
    upstream.put(content)
    upstream.set(negotiates=True)
    async with upstream_source(registry, upstream.url) as source:
        assert (await source.get_manifest(REPO, Tag("18.04"))).digest == real.digest
        for digest in real.manifests:
            assert (await source.get_manifest(REPO, Digest(digest))).digest == digest
        await source.get_manifest(REPO, TAG)
    assert all("v1+prettyjws" not in seen.headers["accept"] for seen in upstream.requests())


@pytest.mark.parametrize("switches", [{"digests": False}, {"heads": False}, {"lengths": False}])
async def test_an_answer_to_head_that_says_too_little(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, switches: dict[str, Any]
) -> None:
    """If HEAD lacks a header, the manifest is fetched for its descriptor."""
    upstream.set(**switches)
    async with upstream_source(registry, upstream.url) as source:
        told = await source.resolve_manifest(REPO, TAG)
    assert (told.media_type, told.digest, told.size) == (image.media_type, image.digest, len(image.body))


@pytest.mark.parametrize("by", ["tag", "digest"])
async def test_wrong_bytes(registry: StoredRegistry, upstream: Hub, image: ImageTree, by: str) -> None:
    """A manifest that does not match the requested digest, or the one the response names, is refused."""
    upstream.fault(on="manifest", corrupt=7)
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(UpstreamUnavailable, match="another digest"):
            await source.get_manifest(REPO, TAG if by == "tag" else Digest(image.digest))


async def test_wrong_bytes_at_one_endpoint(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path
) -> None:
    """After wrong bytes, the next endpoint is asked."""
    content = UpstreamContent()
    content.add(REPO, image, "1")
    upstream.fault(on="manifest", corrupt=7)
    with hub(tmp_path, content) as second:
        async with upstream_source(registry, upstream.url, second.url) as source:
            assert (await source.get_manifest(REPO, TAG)).body == image.body
        assert second.count("manifest") == 1


async def test_a_large_manifest(registry: StoredRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest of some MiB is parsed and hashed off the event loop."""
    parsed: list[threading.Thread] = []
    parse = Manifest.parse

    def seen(*args: Any) -> Manifest:
        parsed.append(threading.current_thread())
        return parse(*args)

    monkeypatch.setattr(Manifest, "parse", seen)
    for size in (1000, 1 << 20):
        made = manifest_of(UpstreamBlob(b"{}", "application/vnd.oci.empty.v1+json"), annotations={"text": "x" * size})
        given = answer(200, made.body, content_type=made.media_type, docker_content_digest=made.digest)
        async with scripted_server(always(given)) as server, upstream_source(registry, server.url) as source:
            assert (await source.get_manifest(REPO, TAG)).digest == made.digest
    assert [thread is threading.main_thread() for thread in parsed] == [True, False]


async def test_unknown_manifests(registry: StoredRegistry, upstream: Hub) -> None:
    """404 means that there is no such manifest."""
    async with upstream_source(registry, upstream.url) as source:
        for reference in (Tag("absent"), Digest("sha256:" + "0" * 64)):
            with pytest.raises(ManifestUnknown):
                await source.get_manifest(REPO, reference)
            with pytest.raises(ManifestUnknown):
                await source.resolve_manifest(REPO, reference)


async def test_a_tag_has_one_authority(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path
) -> None:
    """The first endpoint decides about a tag; a digest may be found at any endpoint."""
    with hub(tmp_path, UpstreamContent()) as first:
        async with upstream_source(registry, first.url, upstream.url) as source:
            with pytest.raises(ManifestUnknown):
                await source.get_manifest(REPO, TAG)
            assert upstream.count() == 0
            assert (await source.get_manifest(REPO, Digest(image.digest))).body == image.body
            first.fault(on="manifest", status=503, method="")
            assert (await source.resolve_manifest(REPO, TAG)).digest == image.digest


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (answer(200, "<html>hotel wifi</html>", content_type="text/html"), "not valid"),
        (answer(200, '{"schemaVersion": 1}', content_type="application/json"), "not valid"),
        (answer(200, b"\x1f\x8b", content_encoding="gzip"), "compresses"),
        (answer(200, b"x" * (8 << 20) + b"x"), "more than"),
        (b"HTTP/1.1 200\r\ncontent-length: 9\r\nconnection: close\r\n\r\n{}", "cannot be reached"),
        (b"nonsense\r\nconnection: close\r\n\r\n", "cannot be reached"),
        (answer(302), "without saying where"),
        (answer(302, location="ftp://127.0.0.1/x"), "no http address"),
        (answer(302, location="http://[/x"), "no http address"),
        (answer(418), "answers 418"),
    ],
)
async def test_answers_that_make_no_sense(registry: StoredRegistry, given: bytes, says: str) -> None:
    """Invalid responses are upstream failures."""
    async with scripted_server(lambda head: given) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(UpstreamUnavailable, match=says):
            await source.get_manifest(REPO, TAG)


async def test_a_type_that_is_none(registry: StoredRegistry, image: ImageTree) -> None:
    """A plain file server sends application/json or no type; the manifest's own media type counts then."""
    for kind in ({"content_type": "application/json"}, {"content_type": f"{image.media_type}; charset=utf-8"}, {}):
        given = answer(200, image.body, **kind)
        async with scripted_server(always(given)) as server, upstream_source(registry, server.url) as source:
            assert (await source.get_manifest(REPO, TAG)).media_type == image.media_type


async def test_a_digest_of_another_algorithm(registry: StoredRegistry, image: ImageTree) -> None:
    """The digest in the response is verified and returned, whatever its algorithm."""
    named = "sha512:" + hashlib.sha512(image.body).hexdigest()
    fields = {"content_type": OCI_MANIFEST, "docker_content_digest": named}

    def reply(head: str) -> bytes:
        return answer(
            200, b"" if head.startswith("HEAD") else image.body, content_length=str(len(image.body)), **fields
        )

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.get_manifest(REPO, TAG)).digest == named
        assert (await source.resolve_manifest(REPO, TAG)).digest == named
        fields["docker_content_digest"] = "sha512:" + "0" * 128
        with pytest.raises(UpstreamUnavailable, match="another digest"):
            await source.get_manifest(REPO, TAG)


async def test_head_that_names_another_digest(registry: StoredRegistry, upstream: Hub) -> None:
    """A response about another digest than the requested one is a failure."""
    named = {"docker_content_digest": "sha256:" + "1" * 64, "content_type": OCI_MANIFEST, "content_length": "5"}
    async with (
        scripted_server(lambda head: answer(200, **named)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="another manifest"):
            await source.resolve_manifest(REPO, Digest("sha256:" + "2" * 64))


async def test_redirected_manifests(registry: StoredRegistry, image: ImageTree) -> None:
    """Five redirects are followed, relative ones too; a sixth is an error."""
    hops = 5

    def reply(head: str) -> bytes:
        target = head.split()[1]
        hop = int(target.removeprefix("/hop/")) if target.startswith("/hop/") else 0
        if hop < hops:
            return answer((301, 302, 303, 307, 308)[hop % 5], "moved", location=f"/hop/{hop + 1}")
        return answer(200, image.body, content_type=image.media_type)

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.get_manifest(REPO, TAG)).body == image.body
        hops = 6
        with pytest.raises(UpstreamUnavailable, match="more than 5"):
            await source.get_manifest(REPO, TAG)


async def test_an_upstream_that_is_silent(registry: StoredRegistry, upstream: Hub) -> None:
    """A silent upstream is a timeout, and the next request can succeed."""
    upstream.fault(on="manifest", stall=True)
    async with upstream_source(registry, upstream.url, idle_timeout=2) as source:
        with pytest.raises(UpstreamTimeout):
            await source.get_manifest(REPO, TAG)
        await source.get_manifest(REPO, TAG)


async def test_no_cookies(registry: StoredRegistry) -> None:
    """Cookies are not sent back."""
    body = json.dumps({"name": REPO, "tags": ["1"]})
    async with (
        scripted_server(lambda head: answer(200, body, set_cookie="a=b; Path=/")) as server,
        upstream_source(registry, server.url) as source,
    ):
        for _ in range(2):
            await source.tags(REPO, None, 1)
    assert "cookie:" not in "".join(server.heads).lower()


TOO_LARGE = {
    "values": b'{"schemaVersion":2,"x":[' + b"[]," * 100_000 + b"[]]}",
    "refers to 10001 blobs": json.dumps(
        {
            "schemaVersion": 2,
            "config": {"mediaType": "a/b", "digest": f"sha256:{'0' * 64}", "size": 1},
            "layers": [{"mediaType": "a/b", "digest": f"sha256:{n:064x}", "size": 1} for n in range(10_001)],
        }
    ).encode(),
    "characters": json.dumps(
        {
            "schemaVersion": 2,
            "artifactType": "a" * 256,
            "config": {"mediaType": "a/b", "digest": f"sha256:{'0' * 64}", "size": 1},
        }
    ).encode(),
    "names 'z' twice": b'{"schemaVersion":2,' + b",".join(b'"%d":1' % n for n in range(40_000)) + b',"z":1,"z":2}',
}


@pytest.mark.parametrize("why", TOO_LARGE)
async def test_a_manifest_beyond_the_bounds(registry: StoredRegistry, why: str) -> None:
    """A manifest that exceeds a limit is refused, and the message names the limit; others of that upstream still
    work."""
    good = json.dumps(
        {"schemaVersion": 2, "config": {"mediaType": "a/b", "digest": f"sha256:{'0' * 64}", "size": 1}}
    ).encode()

    def reply(head: str) -> bytes:
        body = good if "/manifests/good" in head else TOO_LARGE[why]
        return answer(200, body, content_type=OCI_MANIFEST)

    async with scripted_server(reply) as script, upstream_source(registry, script.url) as source:
        for _ in range(5):
            with pytest.raises(UpstreamUnavailable, match=f"a manifest that is not valid: .*{why}"):
                await source.get_manifest(REPO, Tag("bad"))
        assert (await source.get_manifest(REPO, Tag("good"))).body == good


async def test_a_reading_that_nobody_waits_for_keeps_its_turn() -> None:
    """A cancelled parse goes on in its thread, and the next document waits for it. The cancelled caller does not
    wait."""
    parser, begun, go, other = DocumentParser(), threading.Event(), threading.Event(), threading.Event()

    def read() -> None:
        begun.set()
        go.wait()

    first = asyncio.create_task(parser.run(MIB, read))
    await asyncio.to_thread(begun.wait)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(parser.run(MIB, other.set))
    try:
        assert not await asyncio.to_thread(other.wait, 0.2)
    finally:
        go.set()
        await second
    assert other.is_set()


async def test_memory_of_work_that_outlives_its_block() -> None:
    """A shared task that outlives the block that started it does not hold memory in that block's scope."""
    memory = MemoryBudget(MIB, "answers")
    go, flights = asyncio.Event(), SingleFlight[None]()

    async def work(scope: ShareScope) -> None:
        await go.wait()
        share = memory.share()
        await share.grow(1000)
        scope.hold(share)

    async def begin() -> None:
        with ShareScope() as scope:
            await flights.run("it", lambda: work(scope))

    first = asyncio.create_task(begin())
    await asyncio.sleep(0)
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    go.set()
    await flights.run("it", lambda: work(ShareScope()))
    assert memory.used == 0


async def test_memory_of_a_token(registry: StoredRegistry) -> None:
    """A large response of a token service counts against memory only until it is parsed."""
    ask, go = asyncio.Event(), asyncio.Event()

    async def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            ask.set()
            await go.wait()
            return answer(200, json.dumps({"token": "t", "more": "x" * (200 << 10)}))
        if "authorization: bearer t" in head.lower():
            return answer(404, '{"errors": [{"code": "MANIFEST_UNKNOWN"}]}')
        return answer(401, www_authenticate=f'Bearer realm="{server.url}/token"')

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert isinstance(source, HttpUpstreamClient)

        async def get() -> None:
            with ShareScope() as scope:
                with pytest.raises(ManifestUnknown):
                    await source.get_manifest(REPO, Tag("1"), scope)
                assert source._api._memory.used == 0, "of the token, which is read"

        one = asyncio.create_task(get())
        await ask.wait()
        go.set()
        await one
        assert source._api._memory.used == 0


async def test_large_answers_wait_for_memory() -> None:
    """Large responses wait for memory, and each holds its share until its block ends."""
    body = b"x" * (100 << 10)
    memory = MemoryBudget(300 << 10, "answers")
    settings = Upstream.model_validate({"name": "far.test"})
    exchange = ApiClient(
        settings, OutboundProxies(), TrustStore(settings.ca_file), AddressPolicy(settings.name), memory
    )

    async def ask(url: str) -> int:
        with ShareScope() as scope:
            found = await exchange.send("GET", url, {}, max_bytes=MIB, memory=scope)
            assert memory.used == 2 * len(body)
        return len(found.body)

    async with scripted_server(always(answer(200, body))) as script:
        assert await asyncio.gather(*(ask(script.url) for _ in range(4))) == [len(body)] * 4
        await exchange.aclose()
    assert memory.used == 0


async def test_an_answer_that_breaks_off_holds_nothing() -> None:
    """A broken response holds no memory while its block goes on."""
    body = b"x" * (100 << 10)
    memory = MemoryBudget(300 << 10, "answers")
    settings = Upstream.model_validate({"name": "far.test"})
    exchange = ApiClient(
        settings, OutboundProxies(), TrustStore(settings.ca_file), AddressPolicy(settings.name), memory
    )
    async with scripted_server(always(answer(200, body)[:-1])) as script:
        with ShareScope() as scope:
            with pytest.raises(UpstreamUnavailable):
                await exchange.send("GET", script.url, {}, max_bytes=MIB, memory=scope)
            assert memory.used == 0
    await exchange.aclose()
