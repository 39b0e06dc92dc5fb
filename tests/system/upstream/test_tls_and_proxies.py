"""Tests of the upstream client with TLS and a private certificate authority, with HTTP proxies, and with real
registries as upstreams."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import ssl
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from storage.content import Span
from storage.errors import UpstreamUnavailable
from storage.names import Digest
from storage.store.stored_registry import StoredRegistry
from tests.fakes.certificate_authority import CertificateAuthority, CertificateBundle, certificates
from tests.fakes.hub.hub import Hub
from tests.fakes.real_upstreams import docker_registry, entrepot, slow_link
from tests.fakes.upstream_content import ImageTree, UpstreamContent
from tests.fakes.upstream_source import REPO, TAG, CollectingSink, fetch, upstream_source


@pytest.fixture(scope="session")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> CertificateBundle:
    return certificates(tmp_path_factory.mktemp("tls"))


async def fetch_everything(registry: StoredRegistry, image: ImageTree, url: str, **settings: Any) -> None:
    """Makes every kind of request to the upstream, and checks the results."""
    layer = image.layers[1]
    async with upstream_source(registry, url, **settings) as source:
        assert (await source.get_manifest(REPO, TAG)).body == image.body
        assert (await source.resolve_manifest(REPO, Digest(image.digest))).size == len(image.body)
        assert (await source.resolve_blob(REPO, Digest(layer.digest))).size == layer.size
        assert bytes((await fetch(source, layer.digest)).body) == layer.read()
        assert bytes((await fetch(source, layer.digest, Span(5, 2_000_000))).body) == layer.read(5, 2_000_000)
        assert (await source.tags(REPO, None, 10)).items == ["1", "latest"]
        assert (await source.referrers(REPO, Digest(image.digest), None, None, 10)).items == []


async def test_docker_registry(
    registry: StoredRegistry, content: UpstreamContent, image: ImageTree, tmp_path: Path
) -> None:
    """Debian's docker-registry, which has no referrers API, works as an upstream."""
    with docker_registry(tmp_path, content) as upstream:
        await fetch_everything(registry, image, upstream.url)


async def test_entrepot_as_upstream(
    registry: StoredRegistry, content: UpstreamContent, image: ImageTree, tmp_path: Path
) -> None:
    """Another Entrepot server works as an upstream."""
    with entrepot(tmp_path, content) as url:
        await fetch_everything(registry, image, url)


async def test_private_authority_in_ca_file(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, trusted: CertificateBundle, tmp_path: Path
) -> None:
    """With the setting `ca_file`, requests for manifests and downloads of blobs both trust the certificates in this
    file."""
    with slow_link(tmp_path, upstream.url, certificates=trusted) as link:
        for host in ("127.0.0.1", "localhost"):
            await fetch_everything(registry, image, link.url.replace("127.0.0.1", host), ca_file=trusted.authority)


async def test_untrusted_certificate_is_refused(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, trusted: CertificateBundle, tmp_path: Path
) -> None:
    """Without `ca_file`, the client sends no request to a server with an untrusted certificate."""
    with slow_link(tmp_path, upstream.url, certificates=trusted) as link:
        async with upstream_source(registry, link.url) as source:
            with pytest.raises(UpstreamUnavailable):
                await source.get_manifest(REPO, TAG)
            with pytest.raises(UpstreamUnavailable):
                await fetch(source, image.layers[0].digest)
    assert upstream.count() == 0


async def test_unreadable_ca_file(registry: StoredRegistry, upstream: Hub, tmp_path: Path) -> None:
    """If `ca_file` is missing or invalid, each request raises an error that names the setting, and nothing is sent."""
    invalid_file = tmp_path / "bad.pem"
    invalid_file.write_text("no certificate")
    for file in (invalid_file, tmp_path / "absent.pem"):
        async with upstream_source(registry, upstream.url, ca_file=file) as source:
            with pytest.raises(UpstreamUnavailable, match="ca_file"):
                await source.get_manifest(REPO, TAG)
            with pytest.raises(UpstreamUnavailable, match="ca_file"):
                await fetch(source, "sha256:" + "0" * 64)
    assert upstream.count() == 0


async def test_cancelled_download_over_tls(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, trusted: CertificateBundle, tmp_path: Path
) -> None:
    """A stalled download over TLS can be cancelled at once. The sink, which receives the bytes, is not called
    afterwards."""
    upstream.fault(stall_after=100_000)
    sink = CollectingSink()
    with slow_link(tmp_path, upstream.url, certificates=trusted) as link:
        async with upstream_source(registry, link.url, ca_file=trusted.authority) as source:
            task = asyncio.create_task(source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink))
            await upstream.until_async(lambda: sink.next_offset > 0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            bytes_at_cancellation = sink.next_offset
            upstream.release()
            assert bytes((await fetch(source, image.layers[0].digest)).body) == image.layers[0].read()
            assert sink.next_offset == bytes_at_cancellation


async def test_close_does_not_wait_for_a_thread_that_reads_certificates(
    registry: StoredRegistry, image: ImageTree, tmp_path: Path
) -> None:
    """Closing the client does not wait for a thread that reads `ca_file` and blocks, for example because of a slow
    disk. The test uses a named pipe as `ca_file`."""
    os.mkfifo(tmp_path / "ca.pem")
    async with upstream_source(registry, "https://127.0.0.1:9", ca_file=tmp_path / "ca.pem") as source:
        task = asyncio.create_task(fetch(source, image.layers[0].digest))
        # This call returns when the thread of the client has opened the other end of the pipe.
        writer = await asyncio.to_thread(os.open, tmp_path / "ca.pem", os.O_WRONLY)
        closed = threading.Event()
        in_time = asyncio.get_running_loop().run_in_executor(None, _end_of_file, writer, closed)
        await source.aclose()
        closed.set()
        assert await in_time, "closing the source waited for the thread"
        with pytest.raises(UpstreamUnavailable):
            await task


def _end_of_file(writer: int, may_close: threading.Event) -> bool:
    """Closes the pipe once `may_close` is set. Returns False if that did not happen within 10 s."""
    try:
        return may_close.wait(10)
    finally:
        os.close(writer)


class HttpProxy:
    """A proxy for HTTP, and with CONNECT for TLS. It forwards the requests for every host to `target`. `asked`: the
    method and target of each request. `login`: the `user:password` that it requires, if any."""

    def __init__(self, target: str, login: str = "") -> None:
        self.asked: list[str] = []
        self._target = urlsplit(target)
        self._login = base64.b64encode(login.encode()).decode()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            await self._handle_request(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _handle_request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split(maxsplit=2)
        self.asked.append(f"{method} {target}")
        if self._login and f"proxy-authorization: basic {self._login}".lower() not in head.lower():
            writer.write(b"HTTP/1.1 407 Login\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            return
        far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        with contextlib.closing(far_writer):
            await self._forward(reader, writer, far_reader, far_writer, head)

    async def _forward(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        far_reader: asyncio.StreamReader,
        far_writer: asyncio.StreamWriter,
        head: str,
    ) -> None:
        method, target, _ = head.split(maxsplit=2)
        if method == "CONNECT":
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        else:
            parts = urlsplit(target)
            path = f"{parts.path}?{parts.query}" if parts.query else parts.path
            kept_headers = [
                line for line in head.split("\r\n")[1:-2] if not line.lower().startswith(("proxy-", "connection"))
            ]
            lines = [f"{method} {path} HTTP/1.1", *kept_headers, "Connection: close", "", ""]
            far_writer.write("\r\n".join(lines).encode())
        await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def http_proxy(
    target: str, login: str = "", certificates: CertificateBundle | None = None
) -> AsyncIterator[tuple[HttpProxy, str]]:
    """Runs a proxy, with certificates as an https proxy. Yields the proxy and its `host:port`."""
    proxy_server, context = HttpProxy(target, login), None
    if certificates is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificates.server, certificates.key)
    server = await asyncio.start_server(proxy_server.serve, "127.0.0.1", 0, ssl=context)
    try:
        yield proxy_server, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await proxy_server.stop()
        await server.wait_closed()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Removes the proxy variables from the environment. Returns the MonkeyPatch with which a test sets its own."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


async def test_http_proxy(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, environment: pytest.MonkeyPatch
) -> None:
    """All requests go through the proxy, with the login for the proxy. The name of the upstream can be resolved by the
    proxy only."""
    async with http_proxy(upstream.url, "guest:let me") as (proxy, address):
        environment.setenv("HTTP_PROXY", f"http://guest:let%20me@{address}")
        await fetch_everything(registry, image, "http://registry.test:8080")
    assert any(request_line.startswith("HEAD http://registry.test:8080/v2/") for request_line in proxy.asked)
    assert proxy.asked.count(f"GET http://registry.test:8080/v2/{REPO}/blobs/{image.layers[1].digest}") == 2
    assert all("proxy-authorization" not in request.headers for request in upstream.requests())


async def test_refusal_of_the_proxy_is_unavailable(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, environment: pytest.MonkeyPatch
) -> None:
    """If the proxy refuses the login, requests raise UpstreamUnavailable. The message does not contain the password."""
    async with http_proxy(upstream.url, "guest:other") as (_, address):
        environment.setenv("ALL_PROXY", f"http://guest:sesame@{address}")
        for url in ("http://registry.test", "https://registry.test"):
            async with upstream_source(registry, url) as source:
                with pytest.raises(UpstreamUnavailable) as small:
                    await source.get_manifest(REPO, TAG)
                with pytest.raises(UpstreamUnavailable) as large:
                    await fetch(source, image.layers[0].digest)
                assert "sesame" not in f"{small.value} {large.value}"


async def test_https_upstream_through_a_proxy(
    registry: StoredRegistry,
    upstream: Hub,
    image: ImageTree,
    trusted: CertificateBundle,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The proxy forwards the encrypted connection (CONNECT). The client checks the certificate of the upstream, here
    one for another name, and sends no request."""
    with slow_link(tmp_path, upstream.url, certificates=trusted) as link:
        async with http_proxy(link.url, "guest:pw") as (proxy, address):
            environment.setenv("HTTPS_PROXY", f"http://guest:pw@{address}")
            async with upstream_source(registry, "https://registry.test", ca_file=trusted.authority) as source:
                with pytest.raises(UpstreamUnavailable, match=r"registry\.test"):
                    await fetch(source, image.layers[0].digest)
                with pytest.raises(UpstreamUnavailable, match=r"registry\.test"):
                    await source.get_manifest(REPO, TAG)
    assert set(proxy.asked) == {"CONNECT registry.test:443"}
    assert upstream.count() == 0


async def test_cancelled_download_over_tls_inside_tls(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stalled download from an https upstream through an https proxy can be cancelled at once."""
    authority = CertificateAuthority(tmp_path)
    pair = authority.sign("both", also="192.0.2.1")
    certificate_bundle = CertificateBundle(authority.certificate, pair.certificate, pair.key)
    upstream.fault(stall_after=100_000)
    sink = CollectingSink()
    with slow_link(tmp_path, upstream.url, certificates=certificate_bundle) as link:
        async with http_proxy(link.url, certificates=certificate_bundle) as (proxy, address):
            environment.setenv("HTTPS_PROXY", f"https://{address}")
            async with upstream_source(registry, "https://192.0.2.1", ca_file=certificate_bundle.authority) as source:
                task = asyncio.create_task(source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink))
                await upstream.until_async(lambda: sink.next_offset > 0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                bytes_at_cancellation = sink.next_offset
                upstream.release()
                assert bytes((await fetch(source, image.layers[0].digest)).body) == image.layers[0].read()
                assert sink.next_offset == bytes_at_cancellation
    assert set(proxy.asked) == {"CONNECT 192.0.2.1:443"}
