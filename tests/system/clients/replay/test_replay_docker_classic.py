"""Tests with the requests of the docker engine with its classic image store. Versions 20.10 to 28 use this store, and
so do hosts that were upgraded from these versions."""

from __future__ import annotations

import os

from tests.fakes.raw_http import chunked, message
from tests.fakes.raw_pushes import RawPushes, describe, digest_of, encode
from tests.system.clients.replay.conftest import Connect

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
AGENT = {"User-Agent": "docker/27.5.1 go/go1.22.11 kernel/6.1 os/linux arch/amd64 UpstreamClient(Docker-Client/27.5.1)"}


def push_layer(connect: Connect, repo: str, data: bytes) -> None:
    """Pushes a layer with a HEAD, a POST, one PATCH in chunked transfer coding, a PUT and a HEAD. Checks each response
    as the engine does."""
    root, digest = f"/v2/{repo}", digest_of(data)
    wire = connect()
    assert wire.ask("HEAD", f"{root}/blobs/{digest}", AGENT).status == 404
    started = wire.ask("POST", f"{root}/blobs/uploads/", {**AGENT, "Content-Length": "0"})
    assert started.status == 202
    assert started["docker-upload-uuid"] in started["location"]
    head = {**AGENT, "Transfer-Encoding": "chunked", "Accept-Encoding": "gzip"}
    wire.send(message("PATCH", started["location"], head))
    pieces = [data[at : at + 32768] for at in range(0, len(data), 32768)]
    wire.send(chunked(*pieces))
    patched = wire.answer("PATCH")
    assert patched.status == 202
    assert patched["range"] == f"0-{len(data) - 1}"
    assert patched["docker-upload-uuid"] == started["docker-upload-uuid"]
    stored = wire.ask("PUT", f"{patched['location']}?digest={digest}", {**AGENT, "Content-Length": "0"})
    assert stored.status == 201
    found = wire.ask("HEAD", f"{root}/blobs/{digest}", AGENT)
    assert found.status == 200
    assert found["content-length"] == str(len(data))


def schema2(config: bytes, *layers: bytes) -> bytes:
    """Returns a Docker schema 2 manifest."""
    return encode(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": describe(config, CONFIG),
            "layers": [describe(layer, LAYER) for layer in layers],
        }
    )


def test_push_and_pull(connect: Connect, repo: str) -> None:
    """The engine pushes each layer with one chunked PATCH. It pulls with a HEAD of the tag, and a GET of the digest in
    the response."""
    config, layer = os.urandom(700), os.urandom(3 << 20)
    for data in (layer, config):
        push_layer(connect, repo, data)
    body = schema2(config, layer)
    wire = connect()
    stored = wire.ask("PUT", f"/v2/{repo}/manifests/latest", {**AGENT, "Content-Type": MANIFEST}, body)
    assert stored.status == 201
    assert stored["docker-content-digest"] == digest_of(body)

    accept = [("Accept", kind) for kind in (LIST, "application/vnd.oci.image.index.v1+json", MANIFEST)]
    ping = wire.ask("GET", "/v2/", AGENT)
    assert ping.status == 200
    assert ping["docker-distribution-api-version"] == "registry/2.0"
    head = wire.ask("HEAD", f"/v2/{repo}/manifests/latest", [*AGENT.items(), *accept])
    assert (head["content-type"], head["content-length"]) == (MANIFEST, str(len(body)))
    reply = wire.ask("GET", f"/v2/{repo}/manifests/{head['docker-content-digest']}", [*AGENT.items(), *accept])
    assert reply.body == body
    assert wire.ask("GET", f"/v2/{repo}/blobs/{digest_of(layer)}", AGENT).body == layer


def test_an_interrupted_download_is_resumed(connect: Connect, steps: RawPushes) -> None:
    """After a connection broke, the engine requests the rest of the layer from the first missing byte, and gets 206
    with the exact Content-Range."""
    data = os.urandom(4 << 20)
    path = steps.blob(data)
    first = connect()
    first.send(message("GET", path, AGENT))
    assert first.head().status == 200
    received = first.read(1_000_003)
    first.reset()
    answer = connect().ask("GET", path, {**AGENT, "Range": f"bytes={len(received)}-"})
    assert answer.status == 206
    assert answer["content-range"] == f"bytes {len(received)}-{len(data) - 1}/{len(data)}"
    assert received + answer.body == data


def test_a_cross_repository_mount(connect: Connect, steps: RawPushes) -> None:
    """A POST mounts a layer of another repository: the response is 201 with the digest, without an upload session."""
    data = os.urandom(1000)
    steps.blob(data)
    answer = connect().ask(
        "POST",
        f"{steps.root}/copy/blobs/uploads/?from={steps.repo.replace('/', '%2F')}"
        f"&mount={digest_of(data).replace(':', '%3A')}",
        {**AGENT, "Content-Length": "0"},
    )
    assert answer.status == 201
    assert answer["docker-content-digest"] == digest_of(data)


def test_pushing_a_manifest_list(connect: Connect, steps: RawPushes) -> None:
    """`docker manifest push` mounts the blobs of each platform and pushes each manifest by digest. Then it pushes the
    list by tag."""
    platforms = []
    for architecture in ("amd64", "arm64"):
        source = RawPushes(steps.wire, f"{steps.repo}/{architecture}")
        config, layer = os.urandom(100), os.urandom(1000)
        for data in (config, layer):
            source.blob(data)
            target = f"{steps.root}/blobs/uploads/?from={source.repo}&mount={digest_of(data)}"
            assert steps.wire.ask("POST", target, {"Content-Length": "0"}).status == 201
        body = schema2(config, layer)
        source.manifest(body, "latest", MANIFEST)
        steps.manifest(body, digest_of(body), MANIFEST)
        platforms.append(describe(body, MANIFEST, platform={"architecture": architecture, "os": "linux"}))
    manifest_list = encode({"schemaVersion": 2, "mediaType": LIST, "manifests": platforms})
    path = steps.manifest(manifest_list, "latest", LIST)
    found = connect().ask("GET", path, {"Accept": f"{LIST}, {MANIFEST}"})
    assert found["content-type"] == LIST
    assert found.body == manifest_list
    for platform in found.json()["manifests"]:
        assert digest_of(steps.get(f"{steps.root}/manifests/{platform['digest']}").body) == platform["digest"]


def test_five_uploads_at_once(connect: Connect, repo: str) -> None:
    """The engine pushes five layers at the same time. It sends pieces of the five bodies alternately, so all five
    upload sessions are open at once."""
    layers = [os.urandom(400_000) for _ in range(5)]
    wires = [connect() for _ in layers]
    locations = [wire.ask("POST", f"/v2/{repo}/blobs/uploads/", AGENT)["location"] for wire in wires]
    for wire, location in zip(wires, locations, strict=True):
        wire.send(message("PATCH", location, {**AGENT, "Transfer-Encoding": "chunked"}))
    for at in range(0, 400_000, 50_000):
        for wire, layer in zip(wires, layers, strict=True):
            wire.send(b"%x\r\n%b\r\n" % (50_000, layer[at : at + 50_000]))  # one chunk of the body
    for wire, layer in zip(wires, layers, strict=True):
        wire.send(b"0\r\n\r\n")
        answer = wire.answer("PATCH")
        assert answer["range"] == "0-399999"
        assert wire.ask("PUT", f"{answer['location']}?digest={digest_of(layer)}").status == 201
    for layer in layers:
        assert connect().ask("GET", f"/v2/{repo}/blobs/{digest_of(layer)}").body == layer
