"""Tests of requests for manifests with the upstream client: by tag and by digest, verification, invalid responses, and
the memory that responses occupy."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import tracemalloc
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


@pytest.mark.parametrize("reference_kind", ["tag", "digest"])
async def test_a_manifest(registry: StoredRegistry, upstream: Hub, image: ImageTree, reference_kind: str) -> None:
    """A manifest is fetched with one GET and has exactly the bytes of the upstream. Its descriptor (media type, digest
    and size) is fetched with one HEAD."""
    reference: Reference = TAG if reference_kind == "tag" else Digest(image.digest)
    async with upstream_source(registry, upstream.url) as source:
        manifest = await source.get_manifest(REPO, reference)
        assert (manifest.body, manifest.media_type, manifest.digest) == (image.body, image.media_type, image.digest)
        descriptor = await source.resolve_manifest(REPO, reference)
        assert (descriptor.media_type, descriptor.digest, descriptor.size) == (
            image.media_type,
            image.digest,
            len(image.body),
        )
    assert [request.method for request in upstream.requests()] == ["GET", "HEAD"]


async def test_every_kind_of_manifest_is_accepted(registry: StoredRegistry, upstream: Hub) -> None:
    """The header `Accept` lists manifests and indexes of docker and OCI, but not docker's old schema 1."""
    content = UpstreamContent()
    index = content.add(REPO, ubuntu(), "18.04")
    upstream.put(content)
    upstream.set(negotiates=True)
    async with upstream_source(registry, upstream.url) as source:
        assert (await source.get_manifest(REPO, Tag("18.04"))).digest == index.digest
        for digest in index.manifests:
            assert (await source.get_manifest(REPO, Digest(digest))).digest == digest
        await source.get_manifest(REPO, TAG)
    assert all("v1+prettyjws" not in request.headers["accept"] for request in upstream.requests())


@pytest.mark.parametrize("switches", [{"digests": False}, {"heads": False}, {"lengths": False}])
async def test_descriptor_needs_a_get_if_head_lacks_a_header(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, switches: dict[str, Any]
) -> None:
    """If the response to HEAD lacks a header or fails, the client fetches the manifest to get its descriptor."""
    upstream.set(**switches)
    async with upstream_source(registry, upstream.url) as source:
        descriptor = await source.resolve_manifest(REPO, TAG)
    assert (descriptor.media_type, descriptor.digest, descriptor.size) == (
        image.media_type,
        image.digest,
        len(image.body),
    )


@pytest.mark.parametrize("reference_kind", ["tag", "digest"])
async def test_corrupt_manifest_is_refused(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, reference_kind: str
) -> None:
    """A manifest is refused if its bytes do not match the requested digest or the digest in the response header."""
    upstream.fault(on="manifest", corrupt=7)
    async with upstream_source(registry, upstream.url) as source:
        with pytest.raises(UpstreamUnavailable, match="does not have the expected digest"):
            await source.get_manifest(REPO, TAG if reference_kind == "tag" else Digest(image.digest))


async def test_next_endpoint_is_used_after_a_corrupt_manifest(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path
) -> None:
    """If one endpoint sends a corrupt manifest, the client fetches the manifest from the next endpoint."""
    content = UpstreamContent()
    content.add(REPO, image, "1")
    upstream.fault(on="manifest", corrupt=7)
    with hub(tmp_path, content) as second:
        async with upstream_source(registry, upstream.url, second.url) as source:
            assert (await source.get_manifest(REPO, TAG)).body == image.body
        assert second.count("manifest") == 1


async def test_large_manifest_is_parsed_in_a_thread(registry: StoredRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest of 1 MiB is parsed in a thread, so that the event loop is not blocked. A small manifest is parsed in
    the event loop."""
    parsing_threads: list[threading.Thread] = []
    parse = Manifest.parse

    def recording_parse(*args: Any) -> Manifest:
        parsing_threads.append(threading.current_thread())
        return parse(*args)

    monkeypatch.setattr(Manifest, "parse", recording_parse)
    for size in (1000, 1 << 20):
        large_image = manifest_of(
            UpstreamBlob(b"{}", "application/vnd.oci.empty.v1+json"), annotations={"text": "x" * size}
        )
        response = answer(
            200, large_image.body, content_type=large_image.media_type, docker_content_digest=large_image.digest
        )
        async with scripted_server(always(response)) as server, upstream_source(registry, server.url) as source:
            assert (await source.get_manifest(REPO, TAG)).digest == large_image.digest
    assert [thread is threading.main_thread() for thread in parsing_threads] == [True, False]


async def test_unknown_manifests(registry: StoredRegistry, upstream: Hub) -> None:
    """A 404 of the upstream raises ManifestUnknown."""
    async with upstream_source(registry, upstream.url) as source:
        for reference in (Tag("absent"), Digest("sha256:" + "0" * 64)):
            with pytest.raises(ManifestUnknown):
                await source.get_manifest(REPO, reference)
            with pytest.raises(ManifestUnknown):
                await source.resolve_manifest(REPO, reference)


async def test_first_endpoint_decides_about_tags(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, tmp_path: Path
) -> None:
    """If the first endpoint does not have a tag, the tag is unknown, and no other endpoint is used. A manifest
    requested by digest can come from any endpoint."""
    with hub(tmp_path, UpstreamContent()) as first:
        async with upstream_source(registry, first.url, upstream.url) as source:
            with pytest.raises(ManifestUnknown):
                await source.get_manifest(REPO, TAG)
            assert upstream.count() == 0
            assert (await source.get_manifest(REPO, Digest(image.digest))).body == image.body
            first.fault(on="manifest", status=503, method="")
            assert (await source.resolve_manifest(REPO, TAG)).digest == image.digest


@pytest.mark.parametrize(
    ("response", "message"),
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
async def test_invalid_responses_are_unavailable(registry: StoredRegistry, response: bytes, message: str) -> None:
    """Invalid responses raise UpstreamUnavailable with a message that describes the problem."""
    async with scripted_server(lambda head: response) as server, upstream_source(registry, server.url) as source:
        with pytest.raises(UpstreamUnavailable, match=message):
            await source.get_manifest(REPO, TAG)


async def test_media_type_of_the_manifest_is_used(registry: StoredRegistry, image: ImageTree) -> None:
    """If the Content-Type is missing or `application/json`, as from a plain file server, the client uses the media type
    that the manifest states."""
    for kind in ({"content_type": "application/json"}, {"content_type": f"{image.media_type}; charset=utf-8"}, {}):
        response = answer(200, image.body, **kind)
        async with scripted_server(always(response)) as server, upstream_source(registry, server.url) as source:
            assert (await source.get_manifest(REPO, TAG)).media_type == image.media_type


async def test_a_digest_of_another_algorithm(registry: StoredRegistry, image: ImageTree) -> None:
    """If the response header has a SHA-512 digest, this digest is verified and returned."""
    sha512_digest = "sha512:" + hashlib.sha512(image.body).hexdigest()
    fields = {"content_type": OCI_MANIFEST, "docker_content_digest": sha512_digest}

    def reply(head: str) -> bytes:
        return answer(
            200, b"" if head.startswith("HEAD") else image.body, content_length=str(len(image.body)), **fields
        )

    async with scripted_server(reply) as server, upstream_source(registry, server.url) as source:
        assert (await source.get_manifest(REPO, TAG)).digest == sha512_digest
        assert (await source.resolve_manifest(REPO, TAG)).digest == sha512_digest
        fields["docker_content_digest"] = "sha512:" + "0" * 128
        with pytest.raises(UpstreamUnavailable, match="does not have the expected digest"):
            await source.get_manifest(REPO, TAG)


async def test_head_with_another_digest_is_refused(registry: StoredRegistry, upstream: Hub) -> None:
    """If the response to HEAD names another digest than the requested one, the request raises UpstreamUnavailable."""
    headers = {"docker_content_digest": "sha256:" + "1" * 64, "content_type": OCI_MANIFEST, "content_length": "5"}
    async with (
        scripted_server(lambda head: answer(200, **headers)) as server,
        upstream_source(registry, server.url) as source,
    ):
        with pytest.raises(UpstreamUnavailable, match="another manifest"):
            await source.resolve_manifest(REPO, Digest("sha256:" + "2" * 64))


async def test_redirected_manifests(registry: StoredRegistry, image: ImageTree) -> None:
    """The client follows up to five redirects, including relative ones. A sixth redirect is an error."""
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


async def test_silent_upstream_is_a_timeout(registry: StoredRegistry, upstream: Hub) -> None:
    """If the upstream does not respond, the request raises UpstreamTimeout. The next request can succeed."""
    upstream.fault(on="manifest", stall=True)
    async with upstream_source(registry, upstream.url, idle_timeout=2) as source:
        with pytest.raises(UpstreamTimeout):
            await source.get_manifest(REPO, TAG)
        await source.get_manifest(REPO, TAG)


async def test_no_cookies(registry: StoredRegistry) -> None:
    """The client ignores cookies that an upstream sets."""
    body = json.dumps({"name": REPO, "tags": ["1"]})
    async with (
        scripted_server(lambda head: answer(200, body, set_cookie="a=b; Path=/")) as server,
        upstream_source(registry, server.url) as source,
    ):
        for _ in range(2):
            await source.tags(REPO, None, 1)
    assert "cookie:" not in "".join(server.heads).lower()


# Invalid manifests by a part of the error message that each gets.
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


@pytest.mark.parametrize("message", TOO_LARGE)
async def test_manifest_beyond_a_limit_is_refused(registry: StoredRegistry, message: str) -> None:
    """A manifest that exceeds a limit is refused, and the message names the limit. Other manifests of the same
    repository can still be fetched."""
    valid_body = json.dumps(
        {"schemaVersion": 2, "config": {"mediaType": "a/b", "digest": f"sha256:{'0' * 64}", "size": 1}}
    ).encode()

    def reply(head: str) -> bytes:
        body = valid_body if "/manifests/good" in head else TOO_LARGE[message]
        return answer(200, body, content_type=OCI_MANIFEST)

    async with scripted_server(reply) as script, upstream_source(registry, script.url) as source:
        for _ in range(5):
            with pytest.raises(UpstreamUnavailable, match=f"a manifest that is not valid: .*{message}"):
                await source.get_manifest(REPO, Tag("bad"))
        assert (await source.get_manifest(REPO, Tag("good"))).body == valid_body


async def test_next_document_waits_for_a_cancelled_parse() -> None:
    """Documents are parsed one after another in a thread. If the caller of a parse is cancelled, it returns at once,
    but its parse continues in the thread. The next document is parsed only after that."""
    parser, has_begun, may_end, second_has_run = (
        DocumentParser(),
        threading.Event(),
        threading.Event(),
        threading.Event(),
    )

    def parse_slowly() -> None:
        has_begun.set()
        may_end.wait()

    first = asyncio.create_task(parser.run(MIB, parse_slowly))
    await asyncio.to_thread(has_begun.wait)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(parser.run(MIB, second_has_run.set))
    try:
        assert not await asyncio.to_thread(second_has_run.wait, 0.2)
    finally:
        may_end.set()
        await second
    assert second_has_run.is_set()


async def test_shared_task_does_not_keep_memory_of_a_closed_scope() -> None:
    """A ShareScope releases its memory when its `with` block ends. If a task is shared and continues after that, it
    does not hold memory in the closed scope."""
    memory = MemoryBudget(MIB, "answers")
    may_continue, shared_tasks = asyncio.Event(), SingleFlight[None]()

    async def work(scope: ShareScope) -> None:
        await may_continue.wait()
        share = memory.new_share()
        await share.grow(1000)
        scope.hold(share)

    async def start_work() -> None:
        with ShareScope() as scope:
            await shared_tasks.run("it", lambda: work(scope))

    first = asyncio.create_task(start_work())
    await asyncio.sleep(0)
    first.cancel()
    with suppress(asyncio.CancelledError):
        await first
    may_continue.set()
    await shared_tasks.run("it", lambda: work(ShareScope()))
    assert memory.used == 0


async def test_memory_of_a_token(registry: StoredRegistry) -> None:
    """A large response of a token service counts against the memory budget only until the token is parsed."""
    token_requested, may_respond = asyncio.Event(), asyncio.Event()

    async def reply(head: str) -> bytes:
        if "/token" in head.split()[1]:
            token_requested.set()
            await may_respond.wait()
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
                assert source._api._memory.used == 0, "the response of the token service still counts"

        task = asyncio.create_task(get())
        await token_requested.wait()
        may_respond.set()
        await task
        assert source._api._memory.used == 0


async def test_large_responses_wait_for_memory() -> None:
    """Four large responses do not fit into the memory budget together, so some wait. Each response holds its share of
    the budget until the `with` block of its scope ends."""
    body = b"x" * (100 << 10)
    memory = MemoryBudget(300 << 10, "answers")
    settings = Upstream.model_validate({"name": "far.test"})
    client = ApiClient(settings, OutboundProxies(), TrustStore(settings.ca_file), AddressPolicy(settings.name), memory)

    async def request(url: str) -> int:
        with ShareScope() as scope:
            response = await client.send("GET", url, {}, max_bytes=MIB, memory=scope)
            assert memory.used == 2 * len(body)  # a response counts twice, because to parse it takes as much again
        return len(response.body)

    async with scripted_server(always(answer(200, body))) as script:
        assert await asyncio.gather(*(request(script.url) for _ in range(4))) == [len(body)] * 4
        await client.aclose()
    assert memory.used == 0


async def test_large_body_is_not_copied() -> None:
    """A large body of an upstream's response is in memory only once while it is received. Otherwise the last copy would
    occupy the event loop for 5 to 40 ms."""
    piece, count = bytes(64 << 10), 128
    settings = Upstream.model_validate({"name": "far.test"})
    client = ApiClient(settings, OutboundProxies(), TrustStore(settings.ca_file), AddressPolicy(settings.name))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (count * len(piece)))
        for _ in range(count):
            writer.write(piece)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server:
        await client.send("GET", url, {}, max_bytes=8 * MIB)
        tracemalloc.start()
        try:
            response = await client.send("GET", url, {}, max_bytes=8 * MIB)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        await client.aclose()
    assert len(response.body) == count * len(piece)
    assert peak < 1.5 * len(response.body)


async def test_broken_response_holds_no_memory() -> None:
    """A response that breaks off holds no memory, even before the `with` block of its scope ends."""
    body = b"x" * (100 << 10)
    memory = MemoryBudget(300 << 10, "answers")
    settings = Upstream.model_validate({"name": "far.test"})
    client = ApiClient(settings, OutboundProxies(), TrustStore(settings.ca_file), AddressPolicy(settings.name), memory)
    async with scripted_server(always(answer(200, body)[:-1])) as script:
        with ShareScope() as scope:
            with pytest.raises(UpstreamUnavailable):
                await client.send("GET", script.url, {}, max_bytes=MIB, memory=scope)
            assert memory.used == 0
    await client.aclose()
