"""Tests with the requests of containerd 2.3 and newer, and of Docker 29 with its containerd image store."""

from __future__ import annotations

import os

import pytest

from tests.fakes.process_resources import eventually, open_files
from tests.fakes.raw_http import message
from tests.fakes.raw_pushes import OCI_INDEX, OCI_MANIFEST, OCTETS, RawPushes, describe, digest_of, encode, image
from tests.fakes.server_process import RegistryServer
from tests.system.clients.replay.conftest import Connect

AGENT = {"User-Agent": "containerd/v2.3.0"}
DOCKER_AGENT = {
    "User-Agent": "docker/29.0.0 go/go1.25 git-commit/abc kernel/6.1 os/linux arch/amd64 containerd-client/2.2.0"
}
ENCODINGS = "zstd;q=1.0, gzip;q=0.8, deflate;q=0.5"
ACCEPT = f"application/vnd.docker.distribution.manifest.v2+json, {OCI_MANIFEST}, {OCI_INDEX}, */*"


def push_blob(connect: Connect, repo: str, data: bytes, query: str = "") -> None:
    """Pushes a blob that the registry does not have: sends a HEAD, a POST, and one PUT with the whole body. Adds
    `query` to the query of each request."""
    digest = digest_of(data)
    wire = connect()
    head = wire.ask("HEAD", f"/v2/{repo}/blobs/{digest}{query and '?' + query}", AGENT)
    assert head.status == 404
    started = wire.ask("POST", f"/v2/{repo}/blobs/uploads/{query and '?' + query}", AGENT)
    assert started.status == 202
    target = f"{started['location']}?{query and query + '&'}digest={digest.replace(':', '%3A')}"
    stored = wire.ask("PUT", target, {**AGENT, "Content-Type": OCTETS}, data)
    assert stored.status == 201
    assert stored["docker-content-digest"] == digest


@pytest.mark.parametrize("query", ["", "ns=docker.io"])
def test_push(connect: Connect, repo: str, query: str) -> None:
    """containerd pushes each blob with one PUT, then the manifest by digest, then the index by tag. The parameter `ns`,
    which tells a mirror the name of the upstream registry, has no effect."""
    config, layer = os.urandom(600), os.urandom(5 << 20)
    for data in (config, layer):
        push_blob(connect, repo, data, query)
    body = image(config, layer)
    index = encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [describe(body, OCI_MANIFEST)]})
    suffix = query and "?" + query
    for reference, content, kind in ((digest_of(body), body, OCI_MANIFEST), ("latest", index, OCI_INDEX)):
        path = f"/v2/{repo}/manifests/{reference}{suffix}"
        wire = connect()
        assert wire.ask("HEAD", path, {**AGENT, "Accept": f"{kind}, */*"}).status == 404
        assert wire.ask("PUT", path, {**AGENT, "Content-Type": kind}, content).status == 201
        assert wire.ask("HEAD", path, AGENT)["docker-content-digest"] == digest_of(content)


def test_head_finds_an_existing_blob(connect: Connect, steps: RawPushes) -> None:
    """A HEAD of an existing blob gets 200 with its size and digest, so the client does not send the blob."""
    data = os.urandom(100)
    path = steps.blob(data)
    head = connect().ask("HEAD", path, AGENT)
    assert (head.status, head["content-length"], head["docker-content-digest"]) == (200, "100", digest_of(data))


@pytest.mark.parametrize("agent", [AGENT, DOCKER_AGENT])
def test_pull_with_ns(connect: Connect, steps: RawPushes, agent: dict[str, str]) -> None:
    """Clients that use the registry as a mirror send `?ns=docker.io` in each request. The registry serves its content
    as without this parameter."""
    config, layer = os.urandom(300), os.urandom(1 << 20)
    for data in (config, layer):
        steps.blob(data)
    body = image(config, layer)
    steps.manifest(body, "latest")
    wire = connect()
    accept = {**agent, "Accept": ACCEPT}
    head = wire.ask("HEAD", f"{steps.root}/manifests/latest?ns=docker.io", accept)
    assert head.status == 200
    assert head["content-type"] == OCI_MANIFEST
    reply = wire.ask("GET", f"{steps.root}/manifests/{head['docker-content-digest']}?ns=docker.io", accept)
    assert reply.body == body
    for data in (config, layer):
        headers = {**agent, "Accept": f"{OCTETS}, */*", "Accept-Encoding": ENCODINGS}
        reply = wire.ask("GET", f"{steps.root}/blobs/{digest_of(data)}?ns=docker.io", headers)
        assert reply.body == data


@pytest.mark.parametrize("encodings", [ENCODINGS, "zstd, gzip, deflate", "gzip", "*", "identity;q=0, *;q=1", "br"])
def test_content_is_never_encoded(connect: Connect, steps: RawPushes, encodings: str) -> None:
    """Whatever Accept-Encoding says, blobs and manifests are sent unchanged: without Content-Encoding, and with the
    same length."""
    data = b"compressible " * 10_000
    blob = steps.blob(data)
    config = steps.blob(b"{}")
    manifest = steps.manifest(image(b"{}", data), "x")
    for path in (blob, config, manifest):
        expected = steps.get(path)
        reply = connect().ask("GET", path, {**AGENT, "Accept-Encoding": encodings})
        assert reply.status == 200
        assert "content-encoding" not in reply
        assert reply["content-length"] == expected["content-length"]
        assert reply.body == expected.body


def test_headers_come_before_the_body(connect: Connect, steps: RawPushes) -> None:
    """The server sends the headers of a large blob before the client reads any byte of the body. containerd needs this:
    it waits at most 30 seconds for the headers."""
    data = os.urandom(16 << 20)
    path = steps.blob(data)
    wire = connect(receive_buffer=4096)
    wire.send(message("GET", path, AGENT))
    head = wire.head()
    assert head.status == 200
    assert head["content-length"] == str(len(data))
    assert wire.read(len(data)) == data


def test_parallel_ranged_fetch(connect: Connect, steps: RawPushes, server: RegistryServer) -> None:
    """The client sends `Range: bytes=offset-` on 24 connections, and closes each connection after it has read 1 MiB.
    The parts together are the whole blob. After that, the server has closed the files and connections, and still
    serves."""
    data = os.urandom(24 << 20)
    path = steps.blob(data)
    size, part = len(data), 1 << 20  # bytes

    def fetch() -> list[bytes]:
        wires = [connect(receive_buffer=65536) for _ in range(0, size, part)]
        for number, wire in enumerate(wires):
            wire.send(message("GET", path, {**AGENT, "Range": f"bytes={number * part}-", "Accept-Encoding": ENCODINGS}))
        parts = []
        for number, wire in enumerate(wires):
            head = wire.head()
            assert head.status == 206
            assert head["content-range"] == f"bytes {number * part}-{size - 1}/{size}"
            assert head["content-length"] == str(size - number * part)
            parts.append(wire.read(part))
            wire.close()
        return parts

    assert b"".join(fetch()) == data
    workers = server.worker_pids()
    assert eventually(lambda: sum(open_files(workers).values()) < 200)
    # The first fetch may open files that stay open. The further fetches must not leave more files open.
    open_files_before = sum(open_files(workers).values())
    for _ in range(3):
        assert b"".join(fetch()) == data
    assert eventually(lambda: sum(open_files(workers).values()) <= open_files_before)
    assert server.worker_pids() == workers
    assert steps.get(path).body == data
    assert "Traceback" not in server.log_text()


def test_several_ranges_on_one_connection(connect: Connect, steps: RawPushes) -> None:
    """After the client has read a range completely, it can send the next request on the same connection."""
    data = os.urandom(100_000)
    path = steps.blob(data)
    wire = connect()
    for at in range(0, 100_000, 9_999):  # the last range goes past the end of the blob
        answer = wire.ask("GET", path, {**AGENT, "Range": f"bytes={at}-{at + 9_998}"})
        assert answer.status == 206
        assert answer.body == data[at : at + 9_999]
