"""Tests with the requests of the library containers/image, which podman, skopeo, buildah and CRI-O use."""

from __future__ import annotations

import os

import pytest

from tests.fakes.raw_http import RawAnswer, chunked, message
from tests.fakes.raw_pushes import OCI_MANIFEST, OCTETS, RawPushes, digest_of, image
from tests.system.clients.replay.conftest import Connect

AGENT = {"User-Agent": "containers/5.36.0 (github.com/containers/image)"}
API_HEADERS = {**AGENT, "Docker-Distribution-Api-Version": "registry/2.0"}


def upload(connect: Connect, repo: str, data: bytes) -> None:
    """Pushes a blob: sends a POST, a PATCH with a chunked body, and a PUT with the digest."""
    wire = connect()
    started = wire.ask("POST", f"/v2/{repo}/blobs/uploads/", API_HEADERS)
    assert started.status == 202
    headers = {**API_HEADERS, "Content-Type": OCTETS, "Transfer-Encoding": "chunked"}
    wire.send(message("PATCH", started["location"], headers) + chunked(data[:777], data[777:]))
    patched = wire.answer("PATCH")
    assert patched.status == 202
    target = f"{patched['location']}?digest={digest_of(data).replace(':', '%3A')}"
    stored = wire.ask("PUT", target, {**API_HEADERS, "Content-Type": OCTETS, "Content-Length": "0"})
    assert stored.status == 201


def test_ping(connect: Connect) -> None:
    """The client first tries https. A TLS handshake on the plain HTTP port gets 400. The client then sends GET /v2/
    over plain HTTP, which succeeds."""
    hello = connect()
    hello.send(bytes.fromhex("1603010200010001fc0303") + bytes(200))  # the start of a TLS ClientHello
    assert hello.answer().status == 400
    assert hello.at_end()
    assert connect().ask("GET", "/v2/", AGENT).status == 200


def test_push_with_anonymous_mount(connect: Connect, repo: str) -> None:
    """The client tries to mount each blob without the parameter `from`. If the registry does not have the blob, it
    responds with an upload session. The client cancels this session and uploads the blob in a new one. If the registry
    has the blob, it mounts the blob."""
    config, layer = os.urandom(300), os.urandom(2 << 20)
    root, digest = f"/v2/{repo}", digest_of(layer)
    wire = connect()
    assert wire.ask("HEAD", f"{root}/blobs/{digest}", API_HEADERS).status == 404
    refused_mount = wire.ask("POST", f"{root}/blobs/uploads/?mount={digest.replace(':', '%3A')}", API_HEADERS)
    assert refused_mount.status == 202
    assert wire.ask("DELETE", refused_mount["location"], API_HEADERS).status == 204
    assert wire.ask("GET", refused_mount["location"], API_HEADERS).status == 404
    for data in (config, layer):
        upload(connect, repo, data)
    body = image(config, layer)
    put = wire.ask("PUT", f"{root}/manifests/latest", {**API_HEADERS, "Content-Type": OCI_MANIFEST}, body)
    assert put.status == 201
    mounted = wire.ask("POST", f"{root}/again/blobs/uploads/?mount={digest}", API_HEADERS)
    assert mounted.status == 201
    assert connect().ask("GET", mounted["location"], API_HEADERS).body == layer


def read_parts(answer: RawAnswer) -> list[bytes]:
    """Returns the parts of a multipart/byteranges body. Parses it as Go's mime/multipart does: a delimiter line, the
    headers, and the content up to the next delimiter."""
    kind, _, boundary = answer["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    delimiter = b"--" + boundary.strip('"').encode()
    body = answer.body
    assert body.startswith((delimiter, b"\r\n" + delimiter))
    body = body.removeprefix(b"\r\n").removeprefix(delimiter)
    parts = []
    while not body.startswith(b"--"):
        assert body.startswith(b"\r\n")
        head, _, rest = body[2:].partition(b"\r\n\r\n")
        names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")]
        assert b"content-range" in names
        content, found, body = rest.partition(b"\r\n" + delimiter)
        assert found
        parts.append(content)
    return parts


@pytest.mark.parametrize("count", [2, 10, 1024])
def test_zstd_chunked(connect: Connect, steps: RawPushes, count: int) -> None:
    """For a partial pull of a zstd:chunked layer, the client requests the footer with one range, and then the missing
    chunks with many ranges in one request. The chunks are sent as multipart/byteranges, in the requested order, one
    part for each range."""
    data = os.urandom(1 << 20)
    path = steps.blob(data)
    wire = connect()
    footer = wire.ask("GET", path, {**AGENT, "Range": f"bytes={len(data) - 64}-{len(data) - 1}"})
    assert footer.status == 206
    assert footer.body == data[-64:]
    step = len(data) // count
    spans = [(at, at + step // 2) for at in range(0, step * count, step)]  # with gaps between them
    ranges = ",".join(f"{start}-{stop - 1}" for start, stop in spans)
    answer = wire.ask("GET", path, {**AGENT, "Range": f"bytes={ranges}"})
    assert answer.status == 206
    assert read_parts(answer) == [data[start:stop] for start, stop in spans]
    assert wire.ask("GET", path, AGENT).body == data


def test_zstd_chunked_with_adjacent_chunks(connect: Connect, steps: RawPushes) -> None:
    """The registry sends adjacent chunks as separate parts, because the client counts the parts."""
    data = os.urandom(10_000)
    path = steps.blob(data)
    answer = connect().ask("GET", path, {**AGENT, "Range": "bytes=0-99,100-199,200-200,5000-5009"})
    assert read_parts(answer) == [data[0:100], data[100:200], data[200:201], data[5000:5010]]


def test_zstd_chunked_with_too_many_ranges(connect: Connect, steps: RawPushes) -> None:
    """A request with too many ranges gets 400. The client then sends half as many ranges, which succeeds."""
    path = steps.blob(os.urandom(10_000))
    too_many_ranges = ",".join(f"{at}-{at}" for at in range(0, 6000, 4))  # 1500 ranges; the limit is 1024
    wire = connect()
    assert wire.ask("GET", path, {**AGENT, "Range": f"bytes={too_many_ranges}"}).status == 400
    fewer_ranges = too_many_ranges[: too_many_ranges.find(",", len(too_many_ranges) // 2)]
    assert wire.ask("GET", path, {**AGENT, "Range": f"bytes={fewer_ranges}"}).status == 206


def test_skopeo_delete(connect: Connect, steps: RawPushes) -> None:
    """`skopeo delete` sends a GET of the manifest, and then a DELETE of the digest in the response header."""
    steps.blob(b"{}")
    path = steps.manifest(image(b"{}"), "doomed")
    wire = connect()
    digest = wire.ask("GET", path, {**API_HEADERS, "Accept": OCI_MANIFEST})["docker-content-digest"]
    assert wire.ask("DELETE", f"{steps.root}/manifests/{digest}", API_HEADERS).status == 202
    assert wire.ask("GET", path, API_HEADERS).status == 404
