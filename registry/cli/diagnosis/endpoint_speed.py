"""Measures how fast an endpoint of an upstream responds and sends blobs (`measure_endpoint`), and says which endpoint
is the best and what to write in the settings (`advice`). An *upstream* is a mirrored registry. The *endpoints* of an
upstream are the URLs at which it can be reached."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from registry.cli.diagnosis.endpoint_client import open_endpoint_client
from registry.cli.diagnosis.finding import in_thread
from registry.config import Upstream
from registry.mirror.warm.targets import platform_name
from registry.upstream.client import HttpUpstreamClient
from registry.upstream.transport import OutboundProxies, TrustStore
from storage.content import Manifest, Span
from storage.errors import RegistryError
from storage.names import Reference, RepositoryName, Tag

MAX_BLOB_BYTES: Final = 8 << 20
"""Largest number of bytes that are fetched from each endpoint to measure the speed of blobs."""
MEASURE_SECONDS: Final = 30.0
"""Time limit for measuring one endpoint."""
_CONNECT_SECONDS: Final = 10.0
"""Separate time limit for each of three steps: to connect, the TLS handshake, and the wait for the first byte of the
response to GET `/v2/`."""
DEFAULT_IMAGES: Final = {
    "docker.io": "library/alpine:latest",
    "registry.k8s.io": "pause:3.10",
    "quay.io": "prometheus/busybox:latest",
    "gcr.io": "distroless/static:latest",
    "ghcr.io": "distroless/static:latest",
}
"""Small public images that are fetched to measure the speed: one image for each of these upstreams."""
_SIMILAR_FRACTION: Final = 0.9
"""The first endpoint in the settings stays the first if it has at least this fraction of the best endpoint's speed."""


@dataclass(slots=True)
class EndpointSpeed:
    """The results of measuring one endpoint. A time is None if it was not measured.

    - `connect_seconds`: the time to connect. Not measured through a proxy.
    - `tls_seconds`: the time of the TLS handshake. Not measured through a proxy.
    - `first_byte_seconds`: the time from GET `/v2/` to the first byte of the response. Through a proxy, the time of the
      whole request, including the connection.
    - `manifest_seconds`: the time to fetch the manifest of an image. If the manifest is an index, this includes the
      time to fetch one of the manifests that the index lists.
    - `blob_bytes`: how many bytes of a blob arrived in `blob_seconds`.
    - `proxy`: the URL of the proxy; None: no proxy was used.
    - `error`: why the endpoint does not work; None: it works.
    - `notes`: sentences for the user, such as why something was not measured."""

    url: str
    connect_seconds: float | None = None
    tls_seconds: float | None = None
    first_byte_seconds: float | None = None
    manifest_seconds: float | None = None
    blob_bytes: int = 0
    blob_seconds: float | None = None
    proxy: str | None = None
    error: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def bytes_per_second(self) -> float | None:
        """How many bytes of a blob arrived per second; None if this was not measured."""
        return self.blob_bytes / self.blob_seconds if self.blob_seconds else None


class _CountingSink:
    """Implements `registry.mirror.upstream_client.BlobSink`: counts the bytes of a blob, and discards them."""

    def __init__(self) -> None:
        self.byte_count = 0
        self.start_time: float | None = None

    def begin(self, endpoint: str, start: int, stop: int, size: int) -> None:
        self.start_time = time.monotonic()

    def take(self, offset: int, data: memoryview) -> None:
        self.byte_count += len(data)


async def measure_endpoint(
    upstream: Upstream, url: str, image: tuple[RepositoryName, Tag] | None, seconds: float = MEASURE_SECONDS
) -> EndpointSpeed:
    """Measures one endpoint. Does not raise RegistryError or OSError: `EndpointSpeed.error` says why it failed.

    - `image`: a repository (with its name at the upstream) and a tag. The manifest of this image and a part of its
      largest layer are fetched. If `image` is None, only the connection is measured.
    - `seconds`: the time limit. If the download of the layer reaches the limit, the speed is computed from the bytes
      that have arrived."""
    speed, limit = EndpointSpeed(url), asyncio.timeout(seconds)
    try:
        speed.proxy = OutboundProxies().proxy_for(url)
        async with limit:
            if speed.proxy is None:
                await in_thread(lambda: _measure_connection(upstream, url, speed))
            async with open_endpoint_client(upstream, url) as (client, _):
                if speed.proxy is not None:
                    start = time.monotonic()
                    await client.ping()
                    speed.first_byte_seconds = time.monotonic() - start
                if image is not None:
                    await _measure_content(client, *image, speed)
    except TimeoutError:
        if not speed.blob_bytes:
            speed.error = f"no answer within {seconds if limit.expired() else _CONNECT_SECONDS:g} s"
    except ssl.SSLCertVerificationError as error:
        speed.error = f"its certificate is not trusted: {error.verify_message}"
    except RegistryError as error:
        speed.error = error.message
    except OSError as error:
        speed.error = error.strerror or str(error)
    return speed


def _measure_connection(upstream: Upstream, url: str, speed: EndpointSpeed) -> None:
    """Measures the time to connect, the time of the TLS handshake, and the time from GET `/v2/` to the first byte of
    the response. Blocks."""
    parts = urlsplit(url)
    host, is_tls = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if is_tls else 80)
    context = TrustStore(upstream.ca_file).context() if is_tls else None  # before `start`, because it reads files
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][4]
    start = time.monotonic()
    connection = socket.create_connection((str(address[0]), port), _CONNECT_SECONDS)
    try:
        speed.connect_seconds = time.monotonic() - start
        if context is not None:
            start = time.monotonic()
            connection = context.wrap_socket(connection, server_hostname=host)
            speed.tls_seconds = time.monotonic() - start
        start = time.monotonic()
        connection.sendall(f"GET /v2/ HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
        if not connection.recv(1):
            raise OSError("the connection was closed without an answer")
        speed.first_byte_seconds = time.monotonic() - start
    finally:
        connection.close()


async def _measure_content(client: HttpUpstreamClient, repo: RepositoryName, tag: Tag, speed: EndpointSpeed) -> None:
    """Measures the time to fetch the manifest of an image, and the speed at which a part of its largest layer
    arrives."""
    start = time.monotonic()
    manifest = await _image_manifest(client, repo, tag)
    speed.manifest_seconds = time.monotonic() - start
    # The upstream does not have foreign layers: clients fetch them from other servers.
    layers = [layer for layer in manifest.layers if layer.digest not in manifest.foreign]
    if not layers:
        speed.notes.append(f"{repo}:{tag} has no layers, so the speed of blobs is not measured")
        return
    largest_layer = max(layers, key=lambda layer: layer.size)
    sink = _CountingSink()
    try:
        span = Span(0, min(largest_layer.size, MAX_BLOB_BYTES))
        await client.fetch_blob(repo, largest_layer.digest, span, sink, expected_size=largest_layer.size)
    finally:
        # In `finally`, because the bytes that arrive before the time limit are enough to compute the speed.
        if sink.start_time is not None and sink.byte_count:
            # At least a microsecond, because `bytes_per_second` would be None for a time of 0.
            speed.blob_bytes, speed.blob_seconds = sink.byte_count, max(time.monotonic() - sink.start_time, 1e-6)


async def _image_manifest(client: HttpUpstreamClient, repo: RepositoryName, tag: Reference) -> Manifest:
    """Returns the manifest of an image. If the tag points at an index, returns the manifest for linux/amd64 that the
    index lists, or, without such a manifest, the first manifest that it lists."""
    manifest = await client.get_manifest(repo, tag)
    if not manifest.manifests:
        return manifest
    entries = sorted(manifest.manifests, key=lambda entry: platform_name(entry) != "linux/amd64")
    return await client.get_manifest(repo, entries[0].digest)


def rank(speeds: Sequence[EndpointSpeed]) -> list[EndpointSpeed]:
    """Returns the measured endpoints, the best first. Sorts by the speed of blobs. Sorts endpoints with the same speed
    by the time to connect and respond. Endpoints that failed come last."""

    def sort_key(speed: EndpointSpeed) -> tuple[bool, float, float]:
        latency = (speed.connect_seconds or 0.0) + (speed.tls_seconds or 0.0) + (speed.first_byte_seconds or 0.0)
        return speed.error is not None, -(speed.bytes_per_second or 0.0), latency

    return sorted(speeds, key=sort_key)


def advice(upstream: Upstream, speeds: Sequence[EndpointSpeed]) -> tuple[str, str]:
    """Returns a sentence that says what to do, and the lines to write in the settings. The lines are an empty text if
    there is nothing to write."""
    ranked = rank(speeds)
    working = [speed for speed in ranked if speed.error is None]
    if not working:
        return f"no endpoint of {upstream.name} works; to find out why, run `entrepot doctor`", ""
    best = working[0]
    if len(speeds) == 1:
        return f"{best.url} is the only endpoint of {upstream.name}; the setting `endpoints` can name more", ""
    configured_first = next(speed for speed in speeds if speed.url == upstream.endpoints[0])
    # The first endpoint in the settings stays the first if it is nearly as good as the best one.
    keeps_first = _is_nearly_as_good(configured_first, best)
    failed = [speed.url for speed in ranked if speed.error is not None]
    if keeps_first and not failed:
        return f"{configured_first.url} is already the first endpoint, and no other endpoint is clearly faster", ""
    others = [speed for speed in working if speed is not configured_first]
    new_order = [configured_first, *others] if keeps_first else working
    urls = "".join(f'  "{speed.url}",\n' for speed in new_order)
    summary = f"{new_order[0].url} is the fastest"
    if failed:
        summary += f"; {', '.join(failed)} {'does' if len(failed) == 1 else 'do'} not work"
    lines = f'[[upstream]]\nname = "{upstream.name}"\nendpoints = [\n{urls}]\n'
    return f'{summary}: write this in the [[upstream]] "{upstream.name}", and run `entrepot reload`', lines


def _is_nearly_as_good(speed: EndpointSpeed, best: EndpointSpeed) -> bool:
    """Returns whether `speed` is nearly as good as `best`. Compares the speeds of blobs, or, if one of them was not
    measured, the times to the first byte."""
    if speed is best:
        return True
    if speed.error is not None:
        return False
    if best.bytes_per_second and speed.bytes_per_second:
        return speed.bytes_per_second >= _SIMILAR_FRACTION * best.bytes_per_second
    return (speed.first_byte_seconds or 0.0) <= (best.first_byte_seconds or 0.0) / _SIMILAR_FRACTION
