"""Tests that the memory of the server does not grow with the size of the blobs that clients push and pull."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.fakes.client_images import MIB, image, layer, noise
from tests.fakes.clients.registry_client import PIECE, RegistryClient, noise_stream
from tests.fakes.process_resources import MemoryPeak
from tests.fakes.server_process import RegistryServer, running_server

pytestmark = pytest.mark.real_disk

SIZE = 512 * MIB
"""The size of the pushed blob in bytes."""
MAX_GROWTH = 32 * MIB
"""The memory of the server may grow by less than this number of bytes."""
REPO = "team/large"


@pytest.fixture
def warm_server(tmp_path: Path) -> Iterator[RegistryServer]:
    """Runs a server that has served pushes and pulls, and so has already allocated the memory that the first requests
    need."""
    # Without its own interpreter, the server would be a fork, and would share memory with other processes of the tests.
    with running_server(tmp_path, own_interpreter=True) as running:
        wire = RegistryClient(running.address)
        test_image = image("warm", layer({"warm": noise("warm", 4 * MIB)}))
        for number in range(8):
            wire.push(f"team/warm-{number}", "latest", test_image)
            for digest in test_image.blobs:
                wire.blob(f"team/warm-{number}", digest)
        yield running
    # pytest would keep these gigabytes until three more sessions have run.
    shutil.rmtree(running.data)


class HashingBody:
    """A large request body whose SHA-256 digest is computed while it is sent."""

    def __init__(self, seed: str, size: int) -> None:
        self._pieces = noise_stream(seed, size)
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._hash.update(piece)
            yield piece

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()


def send(address: str, method: str, path: str, body: Iterator[bytes] | None, headers: dict[str, str]) -> str:
    """Sends a request with a streamed body, which is chunked unless the headers have a Content-Length. Checks that the
    status is 201 or 202, and returns the Location."""
    with closing(http.client.HTTPConnection(address, timeout=120)) as connection:
        connection.request(method, path, body, headers, encode_chunked="Content-Length" not in headers)
        with connection.getresponse() as reply:
            text = reply.read()
            assert reply.status in (201, 202), (reply.status, text)
            return reply.headers["Location"]


def pull(address: str, digest: str, size: int) -> None:
    """Reads a blob to its end in pieces, and checks its digest."""
    hasher, bytes_left = hashlib.sha256(), size
    with closing(http.client.HTTPConnection(address, timeout=120)) as connection:
        connection.request("GET", f"/v2/{REPO}/blobs/{digest}")
        with connection.getresponse() as reply:
            assert (reply.status, reply.headers["Content-Length"]) == (200, str(size))
            while piece := reply.read(PIECE):
                hasher.update(piece)
                bytes_left -= len(piece)
    assert (bytes_left, "sha256:" + hasher.hexdigest()) == (0, digest)


def with_digest(location: str, digest: str) -> str:
    return f"{location}{'&' if '?' in location else '?'}digest={digest}"


@pytest.mark.timeout(300)
def test_a_large_blob_in_one_chunked_patch(warm_server: RegistryServer) -> None:
    """A blob of 512 MiB is pushed as docker does it, with one chunked PATCH and a PUT without a body, and pulled again.
    The server's memory grows by less than 32 MiB."""
    body = HashingBody("patch", SIZE)
    with MemoryPeak(warm_server.pids) as push_peak:
        start = send(warm_server.address, "POST", f"/v2/{REPO}/blobs/uploads/", None, {"Content-Length": "0"})
        location = send(warm_server.address, "PATCH", start, iter(body), {"Transfer-Encoding": "chunked"})
        put_started = time.monotonic()
        send(warm_server.address, "PUT", with_digest(location, body.digest), None, {"Content-Length": "0"})
        put_seconds = time.monotonic() - put_started
    with MemoryPeak(warm_server.pids) as pull_peak:
        pull(warm_server.address, body.digest, SIZE)
    assert push_peak.samples > 20  # enough readings to see a peak
    assert push_peak.growth < MAX_GROWTH, f"{push_peak.growth / MIB:.1f} MiB while pushing"
    assert pull_peak.growth < MAX_GROWTH, f"{pull_peak.growth / MIB:.1f} MiB while pulling"
    print(
        f"push {push_peak.growth / MIB:.1f} MiB, pull {pull_peak.growth / MIB:.1f} MiB, closing PUT {put_seconds:.2f} s"
    )


@pytest.mark.timeout(300)
def test_a_large_layer_in_one_put(warm_server: RegistryServer) -> None:
    """A blob of 128 MiB is pushed as containerd does it, with one PUT, and pulled again. The server's memory grows by
    less than 32 MiB."""
    hashed = HashingBody("put", SIZE // 4)
    for _ in hashed:  # computes the digest
        pass
    with MemoryPeak(warm_server.pids) as push_peak:
        start = send(warm_server.address, "POST", f"/v2/{REPO}/blobs/uploads/", None, {"Content-Length": "0"})
        headers = {"Content-Length": str(SIZE // 4)}
        send(warm_server.address, "PUT", with_digest(start, hashed.digest), noise_stream("put", SIZE // 4), headers)
    with MemoryPeak(warm_server.pids) as pull_peak:
        pull(warm_server.address, hashed.digest, SIZE // 4)
    assert push_peak.growth < MAX_GROWTH, f"{push_peak.growth / MIB:.1f} MiB while pushing"
    assert pull_peak.growth < MAX_GROWTH, f"{pull_peak.growth / MIB:.1f} MiB while pulling"
