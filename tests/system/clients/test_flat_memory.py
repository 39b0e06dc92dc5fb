"""The server's memory does not grow with the size of the blobs that pass through it."""

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

SIZE = 1024 * MIB
LIMIT = 32 * MIB
REPO = "team/large"


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RegistryServer]:
    """A server whose workers have all served pushes and pulls, so that memory for first requests is already in use."""
    with running_server(tmp_path, own_interpreter=True) as running:
        wire = RegistryClient(running.address)
        made = image("warm", layer({"warm": noise("warm", 4 * MIB)}))
        for number in range(8):
            wire.push(f"team/warm-{number}", "latest", made)
            for digest in made.blobs:
                wire.blob(f"team/warm-{number}", digest)
        yield running
    # Gigabytes that nobody needs any more; pytest would keep them for three more sessions.
    shutil.rmtree(running.data)


class HashingBody:
    """A long body that is hashed while it is being sent."""

    def __init__(self, seed: str, size: int) -> None:
        self._pieces = noise_stream(seed, size)
        self._running = hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._running.update(piece)
            yield piece

    @property
    def digest(self) -> str:
        return "sha256:" + self._running.hexdigest()


def send(address: str, method: str, path: str, body: Iterator[bytes] | None, headers: dict[str, str]) -> str:
    """Sends a request with a streamed body (chunked, unless Content-Length is given). Returns the status and the
    Location."""
    with closing(http.client.HTTPConnection(address, timeout=120)) as connection:
        connection.request(method, path, body, headers, encode_chunked="Content-Length" not in headers)
        with connection.getresponse() as reply:
            text = reply.read()
            assert reply.status in (201, 202), (reply.status, text)
            return reply.headers["Location"]


def pull(address: str, digest: str, size: int) -> None:
    """Reads a blob to its end in pieces, and checks its digest."""
    running, left = hashlib.sha256(), size
    with closing(http.client.HTTPConnection(address, timeout=120)) as connection:
        connection.request("GET", f"/v2/{REPO}/blobs/{digest}")
        with connection.getresponse() as reply:
            assert (reply.status, reply.headers["Content-Length"]) == (200, str(size))
            while piece := reply.read(PIECE):
                running.update(piece)
                left -= len(piece)
    assert (left, "sha256:" + running.hexdigest()) == (0, digest)


def with_digest(location: str, digest: str) -> str:
    return f"{location}{'&' if '?' in location else '?'}digest={digest}"


@pytest.mark.timeout(300)
def test_a_gib_in_one_chunked_patch(own: RegistryServer) -> None:
    """A GiB is pushed as docker does (one chunked PATCH, and a PUT without a body) and pulled again. The memory grows
    by less than 32 MiB."""
    body = HashingBody("patch", SIZE)
    with MemoryPeak(own.pids) as push:
        start = send(own.address, "POST", f"/v2/{REPO}/blobs/uploads/", None, {"Content-Length": "0"})
        location = send(own.address, "PATCH", start, iter(body), {"Transfer-Encoding": "chunked"})
        before = time.monotonic()
        send(own.address, "PUT", with_digest(location, body.digest), None, {"Content-Length": "0"})
        closing_put = time.monotonic() - before
    with MemoryPeak(own.pids) as back:
        pull(own.address, body.digest, SIZE)
    assert push.samples > 20
    assert push.growth < LIMIT, f"{push.growth / MIB:.1f} MiB while pushing"
    assert back.growth < LIMIT, f"{back.growth / MIB:.1f} MiB while pulling"
    print(f"push {push.growth / MIB:.1f} MiB, pull {back.growth / MIB:.1f} MiB, closing PUT {closing_put:.2f} s")


@pytest.mark.timeout(300)
def test_a_large_layer_in_one_put(own: RegistryServer) -> None:
    """256 MiB are pushed as containerd does (one PUT with the body). The memory grows by less than 32 MiB."""
    digest = HashingBody("put", SIZE // 4)
    for _ in digest:
        pass
    with MemoryPeak(own.pids) as push:
        start = send(own.address, "POST", f"/v2/{REPO}/blobs/uploads/", None, {"Content-Length": "0"})
        headers = {"Content-Length": str(SIZE // 4)}
        send(own.address, "PUT", with_digest(start, digest.digest), noise_stream("put", SIZE // 4), headers)
    with MemoryPeak(own.pids) as back:
        pull(own.address, digest.digest, SIZE // 4)
    assert push.growth < LIMIT, f"{push.growth / MIB:.1f} MiB while pushing"
    assert back.growth < LIMIT, f"{back.growth / MIB:.1f} MiB while pulling"
