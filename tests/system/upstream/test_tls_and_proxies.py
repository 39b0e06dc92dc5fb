"""TLS with a private authority, proxies, and real registries as upstreams."""

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


async def everything(registry: StoredRegistry, image: ImageTree, url: str, **settings: Any) -> None:
    """Fetches the manifest and the blobs, whole and in parts."""
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
    """Debian's docker-registry works as an upstream. It has no referrers API."""
    with docker_registry(tmp_path, content) as upstream:
        await everything(registry, image, upstream.url)


async def test_this_project(
    registry: StoredRegistry, content: UpstreamContent, image: ImageTree, tmp_path: Path
) -> None:
    """Entrepot works as an upstream of Entrepot."""
    with entrepot(tmp_path, content) as url:
        await everything(registry, image, url)


async def test_an_authority_of_one_s_own(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, trusted: CertificateBundle, tmp_path: Path
) -> None:
    """With `ca_file`, both clients trust its certificates and reuse connections."""
    with slow_link(tmp_path, upstream.url, certificates=trusted) as link:
        for host in ("127.0.0.1", "localhost"):
            await everything(registry, image, link.url.replace("127.0.0.1", host), ca_file=trusted.authority)


async def test_certificates_nobody_vouches_for(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, trusted: CertificateBundle, tmp_path: Path
) -> None:
    """Without `ca_file`, no request is sent to an untrusted server."""
    with slow_link(tmp_path, upstream.url, certificates=trusted) as link:
        async with upstream_source(registry, link.url) as source:
            with pytest.raises(UpstreamUnavailable):
                await source.get_manifest(REPO, TAG)
            with pytest.raises(UpstreamUnavailable):
                await fetch(source, image.layers[0].digest)
    assert upstream.count() == 0


async def test_a_ca_file_that_cannot_be_read(registry: StoredRegistry, upstream: Hub, tmp_path: Path) -> None:
    """An unreadable `ca_file` is reported when it is needed, and no request is sent without it."""
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    for file in (bad, tmp_path / "absent.pem"):
        async with upstream_source(registry, upstream.url, ca_file=file) as source:
            with pytest.raises(UpstreamUnavailable, match="ca_file"):
                await source.get_manifest(REPO, TAG)
            with pytest.raises(UpstreamUnavailable, match="ca_file"):
                await fetch(source, "sha256:" + "0" * 64)
    assert upstream.count() == 0


async def test_cancelled_under_tls(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, trusted: CertificateBundle, tmp_path: Path
) -> None:
    """Cancelling a stalled body under TLS is as fast as without TLS."""
    upstream.fault(stall_after=100_000)
    sink = CollectingSink()
    with slow_link(tmp_path, upstream.url, certificates=trusted) as link:
        async with upstream_source(registry, link.url, ca_file=trusted.authority) as source:
            task = asyncio.create_task(source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink))
            await upstream.until_async(lambda: sink.at > 0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            taken = sink.at
            upstream.release()
            assert bytes((await fetch(source, image.layers[0].digest)).body) == image.layers[0].read()
            assert sink.at == taken


async def test_closed_while_a_thread_reads_certificates(
    registry: StoredRegistry, image: ImageTree, tmp_path: Path
) -> None:
    """Closing waits for no thread and blocks nothing else, also if the disk with the certificates does not answer."""
    os.mkfifo(tmp_path / "ca.pem")
    async with upstream_source(registry, "https://127.0.0.1:9", ca_file=tmp_path / "ca.pem") as source:
        task = asyncio.create_task(fetch(source, image.layers[0].digest))
        writer = await asyncio.to_thread(os.open, tmp_path / "ca.pem", os.O_WRONLY)  # once the other end is open
        closed = threading.Event()
        in_time = asyncio.get_running_loop().run_in_executor(None, _end_of_file, writer, closed)
        await source.aclose()
        closed.set()
        assert await in_time, "closing the source waited for the thread"
        with pytest.raises(UpstreamUnavailable):
            await task


def _end_of_file(writer: int, wanted: threading.Event) -> bool:
    """Ends the data of the named pipe once it is opened. Returns False if it was not opened in time."""
    try:
        return wanted.wait(10)
    finally:
        os.close(writer)


class HttpProxy:
    """A proxy for HTTP and, with CONNECT, for TLS. Every name leads to `target`."""

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
            await self._one(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            return
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split(maxsplit=2)
        self.asked.append(f"{method} {target}")
        if self._login and f"proxy-authorization: basic {self._login}".lower() not in head.lower():
            writer.write(b"HTTP/1.1 407 Login\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            return
        far_reader, far_writer = await asyncio.open_connection(self._target.hostname, self._target.port)
        with contextlib.closing(far_writer):
            await self._between(reader, writer, far_reader, far_writer, head)

    async def _between(
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
            kept = [line for line in head.split("\r\n")[1:-2] if not line.lower().startswith(("proxy-", "connection"))]
            lines = [f"{method} {path} HTTP/1.1", *kept, "Connection: close", "", ""]
            far_writer.write("\r\n".join(lines).encode())
        await asyncio.gather(_pass_on(reader, far_writer), _pass_on(far_reader, writer))

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def http_proxy(
    target: str, login: str = "", certificates: CertificateBundle | None = None
) -> AsyncIterator[tuple[HttpProxy, str]]:
    """Runs a proxy; with certificates, an https proxy."""
    made, context = HttpProxy(target, login), None
    if certificates is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificates.server, certificates.key)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0, ssl=context)
    try:
        yield made, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await made.stop()
        await server.wait_closed()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Removes proxies from the environment."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


async def test_a_proxy(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, environment: pytest.MonkeyPatch
) -> None:
    """Small requests and blobs go through the proxy, with its login, to a name that only the proxy can resolve."""
    async with http_proxy(upstream.url, "guest:let me") as (between, address):
        environment.setenv("HTTP_PROXY", f"http://guest:let%20me@{address}")
        await everything(registry, image, "http://registry.test:8080")
    assert any(each.startswith("HEAD http://registry.test:8080/v2/") for each in between.asked)
    assert between.asked.count(f"GET http://registry.test:8080/v2/{REPO}/blobs/{image.layers[1].digest}") == 2
    assert all("proxy-authorization" not in seen.headers for seen in upstream.requests())


async def test_a_proxy_that_refuses(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, environment: pytest.MonkeyPatch
) -> None:
    """A refusal of the proxy is an upstream failure. The message has no password."""
    async with http_proxy(upstream.url, "guest:other") as (_, address):
        environment.setenv("ALL_PROXY", f"http://guest:sesame@{address}")
        for url in ("http://registry.test", "https://registry.test"):
            async with upstream_source(registry, url) as source:
                with pytest.raises(UpstreamUnavailable) as small:
                    await source.get_manifest(REPO, TAG)
                with pytest.raises(UpstreamUnavailable) as large:
                    await fetch(source, image.layers[0].digest)
                assert "sesame" not in f"{small.value} {large.value}"


async def test_a_proxy_before_tls(
    registry: StoredRegistry,
    upstream: Hub,
    image: ImageTree,
    trusted: CertificateBundle,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The proxy forwards the encrypted connection (CONNECT), and the upstream's certificate is checked."""
    with slow_link(tmp_path, upstream.url, certificates=trusted) as link:
        async with http_proxy(link.url, "guest:pw") as (between, address):
            environment.setenv("HTTPS_PROXY", f"http://guest:pw@{address}")
            async with upstream_source(registry, "https://registry.test", ca_file=trusted.authority) as source:
                with pytest.raises(UpstreamUnavailable, match=r"registry\.test"):
                    await fetch(source, image.layers[0].digest)
                with pytest.raises(UpstreamUnavailable, match=r"registry\.test"):
                    await source.get_manifest(REPO, TAG)
    assert set(between.asked) == {"CONNECT registry.test:443"}
    assert upstream.count() == 0


async def test_cancelled_under_tls_inside_tls(
    registry: StoredRegistry, upstream: Hub, image: ImageTree, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stalled body through an https proxy from an https upstream can be cancelled as well."""
    authority = CertificateAuthority(tmp_path)
    pair = authority.sign("both", also="192.0.2.1")
    both = CertificateBundle(authority.certificate, pair.certificate, pair.key)
    upstream.fault(stall_after=100_000)
    sink = CollectingSink()
    with slow_link(tmp_path, upstream.url, certificates=both) as link:
        async with http_proxy(link.url, certificates=both) as (between, address):
            environment.setenv("HTTPS_PROXY", f"https://{address}")
            async with upstream_source(registry, "https://192.0.2.1", ca_file=both.authority) as source:
                task = asyncio.create_task(source.fetch_blob(REPO, Digest(image.layers[1].digest), Span(0), sink))
                await upstream.until_async(lambda: sink.at > 0)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                taken = sink.at
                upstream.release()
                assert bytes((await fetch(source, image.layers[0].digest)).body) == image.layers[0].read()
                assert sink.at == taken
    assert set(between.asked) == {"CONNECT 192.0.2.1:443"}
