"""Tests with the requests of go-containerregistry (crane, kaniko, ko), BuildKit, oras, cosign and regclient."""

from __future__ import annotations

import os
from urllib.parse import urljoin, urlsplit

import pytest

from tests.fakes.raw_http import RawConnection, chunked, message
from tests.fakes.raw_pushes import (
    OCI_EMPTY,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    OCTETS,
    Document,
    RawPushes,
    describe,
    digest_of,
    encode,
    image,
)
from tests.fakes.server_process import RegistryServer
from tests.system.clients.replay.conftest import Connect

CRANE = {"User-Agent": "crane/0.21.0 go-containerregistry/0.21.0"}
ARTIFACT = "application/vnd.oci.artifact.manifest.v1+json"


def test_crane_push(connect: Connect, server: RegistryServer, repo: str) -> None:
    """crane pushes a blob with a HEAD, a POST with a mount that fails, a chunked PATCH, and a PUT. Every Location is
    relative or has the host of the registry, as crane requires."""
    data = os.urandom(1 << 20)
    base, digest = server.url, digest_of(data)
    wire = connect()

    def follow(location: str) -> str:
        """Returns the path and the query of a Location, and checks its host."""
        parts = urlsplit(urljoin(base + "/", location))
        assert parts.netloc == urlsplit(base).netloc
        return parts.path + (f"?{parts.query}" if parts.query else "")

    assert wire.ask("HEAD", f"/v2/{repo}/blobs/{digest}", CRANE).status == 404
    mount = f"/v2/{repo}/blobs/uploads/?from=replay%2Fnothing&mount={digest.replace(':', '%3A')}"
    started = wire.ask("POST", mount, {**CRANE, "Content-Type": "application/json"})
    assert started.status == 202
    wire.send(message("PATCH", follow(started["location"]), {**CRANE, "Transfer-Encoding": "chunked"}) + chunked(data))
    patched = wire.answer("PATCH")
    assert patched.status == 202
    closed = wire.ask("PUT", f"{follow(patched['location'])}?digest={digest}", {**CRANE, "Content-Type": OCTETS})
    assert closed.status == 201
    assert connect().ask("GET", follow(closed["location"]), CRANE).body == data


def test_crane_head_needs_three_headers(connect: Connect, steps: RawPushes) -> None:
    """The response to a HEAD of a manifest has Content-Type, Content-Length and Docker-Content-Digest. crane fails
    without any one of these headers."""
    steps.blob(b"{}")
    body = image(b"{}")
    path = steps.manifest(body, "v1")
    head = connect().ask("HEAD", path, {**CRANE, "Accept": f"{OCI_MANIFEST},{OCI_INDEX}"})
    assert (head.status, head["content-type"], head["content-length"]) == (200, OCI_MANIFEST, str(len(body)))
    assert head["docker-content-digest"] == digest_of(body)


def test_crane_retries_after_a_lost_response(connect: Connect, steps: RawPushes) -> None:
    """The response to a PUT is lost, but the blob is stored. If crane sends the same PUT again, it gets 404. A complete
    new push then gets 201."""
    data = os.urandom(5000)
    location = steps.start()
    target = f"{location}?digest={digest_of(data)}"
    first = connect()
    first.send(message("PUT", target, CRANE, data))
    assert first.head().status == 201
    first.reset()
    wire = connect()
    repeated_put = wire.ask("PUT", target, CRANE, data)
    assert repeated_put.status == 404
    assert repeated_put.codes == ["BLOB_UPLOAD_UNKNOWN"]
    assert wire.ask("HEAD", f"{steps.root}/blobs/{digest_of(data)}", CRANE).status == 200
    steps.blob(data)


def test_buildkit_cache_export(connect: Connect, steps: RawPushes) -> None:
    """BuildKit with `--cache-to type=registry` pushes an index whose entries are layers and a config instead of
    manifests."""
    layers, config = [os.urandom(2000), os.urandom(3000)], b'{"layers":[],"records":[]}'
    for data in (*layers, config):
        steps.blob(data)
    note = {"buildkit/createdat": "2026-01-01T00:00:00Z", "containerd.io/uncompressed": digest_of(b"x")}
    entries = [describe(data, OCI_LAYER, annotations=note) for data in layers]
    entries.append(describe(config, "application/vnd.buildkit.cacheconfig.v0"))
    body = encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
    path = steps.manifest(body, "buildcache", OCI_INDEX)
    got = connect().ask("GET", path, {"Accept": f"{OCI_INDEX}, */*"})
    assert got.body == body
    for entry, data in zip(got.json()["manifests"], (*layers, config), strict=True):
        assert steps.get(f"{steps.root}/blobs/{entry['digest']}").body == data


def test_buildkit_cache_with_a_missing_layer(connect: Connect, steps: RawPushes) -> None:
    """Like any manifest, a cache index is refused if one of its layers was not pushed."""
    entry = describe(os.urandom(20), OCI_LAYER)
    body = encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]})
    answer = connect().ask("PUT", f"{steps.root}/manifests/buildcache", {"Content-Type": OCI_INDEX}, body)
    assert answer.status == 404
    assert answer.codes == ["MANIFEST_BLOB_UNKNOWN"]


def test_buildkit_cache_as_a_manifest(connect: Connect, steps: RawPushes) -> None:
    """BuildKit with `image-manifest=true` pushes the cache as an image manifest, whose config is a cacheconfig."""
    layer, config = os.urandom(2000), b'{"layers":[]}'
    for data in (layer, config):
        steps.blob(data)
    document: Document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": describe(config, "application/vnd.buildkit.cacheconfig.v0"),
        "layers": [describe(layer, OCI_LAYER)],
    }
    path = steps.manifest(encode(document), "buildcache")
    assert connect().ask("GET", path).body == encode(document)


def push_image_to_sign(steps: RawPushes) -> tuple[bytes, bytes]:
    """Pushes an image and the blobs of a signature. Returns the image, and the manifest of the signature, which has the
    image as its subject and is not pushed yet."""
    for data in (b"{}", b"a signature"):
        steps.blob(data)
    target = image(b"{}")
    steps.manifest(target, "signed")
    document: Document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": "application/vnd.test.signature",
        "config": describe(b"{}", OCI_EMPTY) | {"data": "e30="},
        "layers": [describe(b"a signature", "text/plain", annotations={"org.opencontainers.image.title": "s.txt"})],
        "subject": describe(target, OCI_MANIFEST),
        "annotations": {"org.opencontainers.image.created": "2026-01-01T00:00:00Z"},
    }
    return target, encode(document)


def test_oras_attach(connect: Connect, steps: RawPushes) -> None:
    """`oras attach` pushes an artifact with a subject. The header OCI-Subject in the response means that no fallback
    tag is needed. `oras discover` then finds the artifact."""
    target, artifact = push_image_to_sign(steps)
    wire = connect()
    path = f"{steps.root}/manifests/{digest_of(artifact)}"
    put = wire.ask("PUT", path, {"Content-Type": OCI_MANIFEST}, artifact)
    assert put.status == 201
    assert put["oci-subject"] == digest_of(target)
    found = wire.ask("GET", f"{steps.root}/referrers/{digest_of(target)}?artifactType=application%2Fvnd.test.signature")
    assert found["oci-filters-applied"] == "artifactType"
    assert [entry["digest"] for entry in found.json()["manifests"]] == [digest_of(artifact)]


def test_client_that_uses_only_the_fallback_tag(connect: Connect, steps: RawPushes) -> None:
    """An older client pushes its own index of referrers under the fallback tag `sha256-<hex>`. The registry stores this
    index, and the referrers API lists each referrer once."""
    target, artifact = push_image_to_sign(steps)
    tag = digest_of(target).replace(":", "-")
    wire = connect()
    assert wire.ask("GET", f"{steps.root}/manifests/{tag}").status == 404
    steps.manifest(artifact, digest_of(artifact))
    entry = describe(artifact, OCI_MANIFEST, artifactType="application/vnd.test.signature")
    index = encode({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]})
    path = steps.manifest(index, tag, OCI_INDEX)
    assert connect().ask("GET", path).body == index
    found = wire.ask("GET", f"{steps.root}/referrers/{digest_of(target)}").json()["manifests"]
    assert [entry["digest"] for entry in found] == [digest_of(artifact)]


def test_cosign_tags(connect: Connect, steps: RawPushes) -> None:
    """If `cosign sign` does not use the referrers API, it pushes a manifest under the tag `sha256-<hex>.sig`. Its layer
    has cosign's own media type."""
    target, _ = push_image_to_sign(steps)
    payload = encode({"critical": {"image": {"docker-manifest-digest": digest_of(target)}}})
    steps.blob(payload)
    note = {"dev.cosignproject.cosign/signature": "MEUCIQ=="}
    document: Document = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": describe(b"{}", "application/vnd.oci.image.config.v1+json"),
        "layers": [describe(payload, "application/vnd.dev.cosign.simplesigning.v1+json", annotations=note)],
    }
    tag = digest_of(target).replace(":", "-") + ".sig"
    wire = connect()
    assert wire.ask("GET", f"{steps.root}/manifests/{tag}").status == 404
    path = steps.manifest(encode(document), tag)
    assert wire.ask("GET", path).body == encode(document)


def test_oras_artifact_manifest(connect: Connect, steps: RawPushes) -> None:
    """oras may push the artifact manifest of the release candidates of OCI 1.1. It has blobs and a subject, but no
    config. The registry stores it and lists it as a referrer."""
    target, _ = push_image_to_sign(steps)
    document: Document = {
        "mediaType": ARTIFACT,
        "artifactType": "application/vnd.test.old",
        "blobs": [describe(b"a signature", "text/plain")],
        "subject": describe(target, OCI_MANIFEST),
    }
    path = steps.manifest(encode(document), digest_of(encode(document)), ARTIFACT)
    assert connect().ask("GET", path)["content-type"] == ARTIFACT
    found = connect().ask("GET", f"{steps.root}/referrers/{digest_of(target)}").json()["manifests"]
    assert [(entry["mediaType"], entry["artifactType"]) for entry in found] == [(ARTIFACT, "application/vnd.test.old")]


@pytest.mark.parametrize("sent_bytes", [0, 1, 300_000, 2_500_000])
def test_regclient_resumes_after_a_broken_connection(connect: Connect, steps: RawPushes, sent_bytes: int) -> None:
    """After a connection broke in the middle of a chunk, the client asks with a GET how many bytes the session has, and
    continues the upload after these bytes."""
    data = os.urandom(3_000_000)
    location = steps.start()
    wire = begin(connect, location, {"Content-Length": str(len(data)), "Content-Range": f"0-{len(data) - 1}"})
    wire.send(data[:sent_bytes])
    wire.reset()
    finish(connect, location, data)
    assert steps.get(f"{steps.root}/blobs/{digest_of(data)}").body == data


def begin(connect: Connect, location: str, headers: dict[str, str]) -> RawConnection:
    """Sends the headers of a PATCH, and waits for the response 100 with which the server requests the body."""
    wire = connect()
    wire.send(message("PATCH", location, headers | {"Expect": "100-continue"}))
    assert wire.read(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    return wire


def finish(connect: Connect, location: str, data: bytes) -> None:
    """Continues an upload session after its last byte, and completes it. If the offset of the session has changed
    meanwhile, because bytes of a broken connection still arrived, asks for the offset again."""
    wire = connect()
    for attempt in range(20):
        status = wire.ask("GET", location)
        assert status.status == 204
        last = int(status["range"].removeprefix("0-"))
        # The range `0-0` may mean no byte or one byte. The spec does not say which, so a client tries both.
        at = last + 1 if last else attempt % 2
        assert at <= len(data)
        if at == len(data):
            break
        answer = wire.ask("PATCH", location, {"Content-Range": f"{at}-{len(data) - 1}"}, data[at:])
        assert answer.status in (202, 416)
        if answer.closes:
            wire = connect()
    closed = wire.ask("PUT", f"{location}?digest={digest_of(data)}")
    assert closed.status == 201


@pytest.mark.parametrize("sent_bytes", [10, 300_000, 2_500_000])
def test_newer_request_continues_the_session_of_an_older_one(
    connect: Connect, steps: RawPushes, sent_bytes: int
) -> None:
    """An old PATCH request is still open, but sends nothing. A newer request on the same session does not wait for it,
    and bytes that the old request sends later have no effect."""
    data = os.urandom(3_000_000)
    location = steps.start()
    old = begin(connect, location, {"Content-Length": str(len(data))})
    old.send(data[:sent_bytes])
    finish(connect, location, data)
    old.send(bytes(len(data) - sent_bytes))
    answer = old.answer("PATCH")
    assert answer.status in (400, 404, 416)
    assert answer.codes[0].startswith("BLOB_UPLOAD_")
    assert steps.get(f"{steps.root}/blobs/{digest_of(data)}").body == data
