"""Clients that pull an image as docker does, run as a program: `python -m bench.loaders.image_pull ORDER`.

ORDER is a PullOrder as JSON. Each client requests the digest of the tag (HEAD), gets the manifest by this digest, and
then gets the config and the layers, a few in parallel. Each parallel download has a keep-alive connection of its own.
All clients start at the same time. They are threads, which run in parallel because receiving and hashing release the
GIL.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bench.errors import TrialFailed
from bench.loaders.http_client import BLOCK_SIZE, HttpClient, check_content
from bench.random_content import MIB, digest_of
from bench.system.programs import run_to_end

BARRIER_TIMEOUT = 60.0  # seconds
PULL_TIMEOUT = 900.0  # seconds
PARALLEL_BLOBS = 3
"""Number of blobs that a client fetches in parallel: docker's default."""


class PullOrder(NamedTuple):
    """The image to pull, the registry, and the number of clients."""

    port: int
    repo: str
    tag: str
    clients: int = 1
    parallel: int = PARALLEL_BLOBS
    verified: int | None = None
    """Number of clients that compute digests; None: all. Every client checks sizes."""


class BlobTimes(NamedTuple):
    """The times of one blob's download by one client, in seconds since the request."""

    size: int
    headers: float
    """When the status line and the headers had arrived."""
    first: float
    """When the first byte of the body had arrived."""
    whole: float
    """When the whole body had arrived."""


class PullResult(NamedTuple):
    """The measurements of all clients of one order."""

    seconds: float
    """Seconds from the common start to the last byte of the last client."""
    size: int
    """Number of bytes that all clients together received."""
    blobs: list[BlobTimes]

    def largest(self) -> BlobTimes:
        return max(self.blobs, key=lambda blob: blob.size)


def pull_image(order: PullOrder) -> PullResult:
    """Runs the clients in a separate program. Raises TrialFailed unless each client got the right bytes."""
    out = run_to_end([sys.executable, "-m", "bench.loaders.image_pull", json.dumps(order)], PULL_TIMEOUT)
    seconds, size, blobs = json.loads(out)
    return PullResult(seconds, size, [BlobTimes(*blob) for blob in blobs])


def pull_in_process(order: PullOrder) -> PullResult:
    """Runs the clients in threads of this process. When a client fails, raises TrialFailed, OSError or
    HTTPException."""
    ready = threading.Barrier(order.clients)
    with ThreadPoolExecutor(order.clients) as threads:
        done = [threads.submit(_pull_as_client, order, number, ready) for number in range(order.clients)]
        spans = [each.result() for each in done]
    seconds = max(ended for _, ended, _, _ in spans) - min(begun for begun, _, _, _ in spans)
    return PullResult(seconds, sum(size for _, _, size, _ in spans), [blob for *_, blobs in spans for blob in blobs])


def _pull_as_client(
    order: PullOrder, number: int, ready: threading.Barrier
) -> tuple[float, float, int, list[BlobTimes]]:
    """Returns the start and the end of the pull, the number of received bytes, and the times of each blob."""
    verify = order.verified is None or number < order.verified
    ready.wait(BARRIER_TIMEOUT)
    begun = time.perf_counter()
    with HttpClient(order.port) as client:
        digest = client.get_manifest(order.repo, order.tag, method="HEAD").headers.get("docker-content-digest", "")
        body = client.get_manifest(order.repo, digest).body
    if digest_of(body) != digest:
        raise TrialFailed(f"manifest {digest} of {order.repo} came as {digest_of(body)}")
    image = json.loads(body)
    local = threading.local()

    def fetch(blob: dict[str, int | str]) -> BlobTimes:
        if not hasattr(local, "client"):
            local.client, local.buffer = HttpClient(order.port), memoryview(bytearray(BLOCK_SIZE))
        return _fetch_blob(local.client, order.repo, str(blob["digest"]), int(blob["size"]), local.buffer, verify)

    with ThreadPoolExecutor(order.parallel) as threads:
        blobs = list(threads.map(fetch, [image["config"], *image["layers"]]))
    return begun, time.perf_counter(), len(body) + sum(blob.size for blob in blobs), blobs


def _fetch_blob(client: HttpClient, repo: str, digest: str, size: int, buffer: memoryview, verify: bool) -> BlobTimes:
    """Reads a blob and returns the times. Checks its size and, with `verify`, its digest. `buffer`: takes each piece of
    the body; the pieces are not kept. Raises TrialFailed."""
    begun = time.perf_counter()
    response = client.open_blob(repo, digest)
    headers = time.perf_counter() - begun
    piece, first = response.read(1), time.perf_counter() - begun
    running, received = hashlib.sha256(piece), len(piece)
    while count := response.readinto(buffer):
        received += count
        if verify:
            running.update(buffer[:count])
    whole = time.perf_counter() - begun
    # Without `verify`, no digest was computed, so the blob's own digest takes its place.
    check_content(digest, size, received, running.hexdigest() if verify else digest.removeprefix("sha256:"))
    return BlobTimes(size, headers, first, whole)


def main(order: str) -> int:
    threading.stack_size(MIB)
    try:
        print(json.dumps(pull_in_process(PullOrder(*json.loads(order)))))
    except (TrialFailed, OSError, http.client.HTTPException, threading.BrokenBarrierError) as error:
        print(repr(error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
