"""Clients that pull an image as docker does, run as a program: `python -m bench.loaders.image_pull ORDER`.

Each asks for the tag's digest (HEAD), gets the manifest by it, then config and layers, a few at a time, each on a
connection of its own that is kept. The clients begin together; each is a few threads, which work side by side, since
receiving and hashing leave Python's lock alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.errors import TrialFailed
from bench.loaders.http_client import BLOCK_SIZE, HOST
from bench.random_content import MANIFEST_ACCEPT, MIB, digest_of
from bench.system.process_tree import clean_environment, stop_program
from bench.system.servers import REPOSITORY_ROOT

IDLE_TIMEOUT = 60.0
"""Seconds without a byte after which a pull has failed."""
PULL_TIMEOUT = 900.0
PARALLEL_BLOBS = 3
"""Blobs a client fetches at a time: docker's default."""


@dataclass(frozen=True)
class PullOrder:
    """What is to be pulled."""

    port: int
    repo: str
    tag: str
    clients: int = 1
    at_once: int = PARALLEL_BLOBS
    verified: int | None = None
    """How many of the clients compute digests; None: all. Sizes are always checked."""


@dataclass(frozen=True)
class BlobTimes:
    """One blob at one client. Times are seconds from the request on."""

    size: int
    headers: float
    """Until status line and headers were there."""
    first: float
    """Until the first byte of the body was."""
    whole: float


@dataclass(frozen=True)
class PullResult:
    """What all clients of an order saw."""

    seconds: float
    """From the moment they begin to the last byte of the last."""
    size: int
    """Bytes of all clients together."""
    blobs: list[BlobTimes]

    def largest(self) -> BlobTimes:
        return max(self.blobs, key=lambda blob: blob.size)


def pull_image(order: PullOrder) -> PullResult:
    """Runs the clients to their end. Raises TrialFailed unless each of them got all, and the right bytes."""
    with running_pull(order) as process:
        return finish_pull(process)


@contextlib.contextmanager
def running_pull(order: PullOrder) -> Iterator[subprocess.Popen[bytes]]:
    """Runs the clients until the block ends."""
    command = [sys.executable, "-m", "bench.loaders.image_pull", json.dumps(asdict(order))]
    env = clean_environment(Path(tempfile.gettempdir()), PYTHONPATH=str(REPOSITORY_ROOT))
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, env=env, stdin=nothing, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            yield process
        finally:
            stop_program(process)


def finish_pull(process: subprocess.Popen[bytes]) -> PullResult:
    """Waits for what `running_pull` began. Raises TrialFailed as `pull_image` does."""
    try:
        out, complaint = process.communicate(timeout=PULL_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"a pull did not end within {PULL_TIMEOUT:.0f} s") from None
    if process.returncode != 0:
        raise TrialFailed(f"a pull failed: {complaint.decode(errors='replace').strip()[-300:]}")
    seen = json.loads(out)
    return PullResult(seen["seconds"], seen["size"], [BlobTimes(**blob) for blob in seen["blobs"]])


def pull_in_process(order: PullOrder) -> PullResult:
    """The pull itself. Raises TrialFailed at the first client that fails."""
    ready = threading.Barrier(order.clients)
    with ThreadPoolExecutor(order.clients) as threads:
        done = [threads.submit(_client, order, number, ready) for number in range(order.clients)]
        spans = [one.result() for one in done]
    seconds = max(ended for _, ended, _, _ in spans) - min(begun for begun, _, _, _ in spans)
    return PullResult(seconds, sum(size for _, _, size, _ in spans), [blob for *_, blobs in spans for blob in blobs])


def _client(order: PullOrder, number: int, ready: threading.Barrier) -> tuple[float, float, int, list[BlobTimes]]:
    """When it began and ended, bytes of all, and each blob."""
    verify = order.verified is None or number < order.verified
    ready.wait(IDLE_TIMEOUT)
    begun = time.perf_counter()
    with contextlib.closing(_connect(order)) as connection:
        body = _manifest(connection, order)
    image = json.loads(body)
    wanted = [(one["digest"], one["size"]) for one in [image["config"], *image["layers"]]]
    kept = threading.local()

    def fetch(digest: str, size: int) -> BlobTimes:
        if not hasattr(kept, "connection"):
            kept.connection, kept.buffer = _connect(order), memoryview(bytearray(BLOCK_SIZE))
        return _blob(kept.connection, order.repo, digest, size, kept.buffer, verify)

    with ThreadPoolExecutor(order.at_once) as threads:
        blobs = list(threads.map(lambda one: fetch(*one), wanted))
    return begun, time.perf_counter(), len(body) + sum(blob.size for blob in blobs), blobs


def _connect(order: PullOrder) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(HOST, order.port, timeout=IDLE_TIMEOUT, blocksize=BLOCK_SIZE)


def _manifest(connection: http.client.HTTPConnection, order: PullOrder) -> bytes:
    """HEAD of the tag, GET of the digest."""
    path = f"/v2/{order.repo}/manifests/"
    response = _ask(connection, "HEAD", path + order.tag)
    response.read()
    digest = response.headers.get("Docker-Content-Digest", "")
    body = _ask(connection, "GET", path + digest).read()
    if digest_of(body) != digest:
        raise TrialFailed(f"manifest {digest} of {order.repo} came as {digest_of(body)}")
    return body


def _blob(
    connection: http.client.HTTPConnection, repo: str, digest: str, size: int, buffer: memoryview, verify: bool
) -> BlobTimes:
    begun = time.perf_counter()
    response = _ask(connection, "GET", f"/v2/{repo}/blobs/{digest}")
    headers = time.perf_counter() - begun
    piece, first = response.read(1), time.perf_counter() - begun
    running, received = hashlib.sha256(piece), len(piece)
    while count := response.readinto(buffer):
        received += count
        if verify:
            running.update(buffer[:count])
    whole = time.perf_counter() - begun
    if received != size or (verify and f"sha256:{running.hexdigest()}" != digest):
        raise TrialFailed(f"blob {digest} of {size} bytes came as {received} bytes of sha256:{running.hexdigest()}")
    return BlobTimes(size, headers, first, whole)


def _ask(connection: http.client.HTTPConnection, method: str, path: str) -> http.client.HTTPResponse:
    connection.request(method, path, headers={"Accept": MANIFEST_ACCEPT if "/manifests/" in path else "*/*"})
    response = connection.getresponse()
    if response.status != 200:
        raise TrialFailed(f"{method} {path} gave {response.status}: {response.read(200)!r}")
    return response


def main(arguments: list[str]) -> int:
    (order,) = arguments
    threading.stack_size(MIB)
    try:
        pulled = pull_in_process(PullOrder(**json.loads(order)))
    except (TrialFailed, OSError, http.client.HTTPException, threading.BrokenBarrierError) as error:
        print(repr(error), file=sys.stderr)
        return 1
    print(json.dumps(asdict(pulled)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
