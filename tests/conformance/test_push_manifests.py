"""Spec, "Pushing Manifests", and "Pushing Manifests with Subject"."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import pytest

from tests.conformance.pusher import (
    DOCKER_MANIFEST,
    MIB,
    OCI_CONFIG,
    OCI_EMPTY,
    OCI_INDEX,
    OCI_LAYER,
    OCI_MANIFEST,
    Document,
    Pusher,
    describe,
    digest_of,
    encode,
    error_codes,
    statuses_of_all_workers,
    with_query,
)

LIMIT = 8 * MIB
"""The default limit for the size of a manifest, in bytes."""


def padded(document: Document, size: int) -> bytes:
    """Encodes the document with an annotation that makes it exactly `size` bytes long."""
    empty = len(encode(document | {"annotations": {"padding": ""}}))
    body = encode(document | {"annotations": {"padding": "x" * (size - empty)}})
    assert len(body) == size
    return body


def put(push: Pusher, reference: str, body: bytes, kind: str | None = OCI_MANIFEST) -> Any:
    """Pushes a manifest and returns the response unchecked. `kind`: the Content-Type; None: send none."""
    headers = {} if kind is None else {"Content-Type": kind}
    return push.client.put(f"{push.root}/manifests/{reference}", content=body, headers=headers)


@pytest.mark.parametrize("by", ["tag", "digest"])
def test_push(push: Pusher, algorithm: str, by: str) -> None:
    """A push gets 201 with the digest and a Location. The same bytes can be pulled from Location, from each worker
    (end-7a)."""
    body = encode(push.image(algorithm))
    digest = digest_of(body, algorithm if by == "digest" else "sha256")
    answer = put(push, digest if by == "digest" else "v1", body)
    assert answer.status_code == 201
    assert answer.headers["docker-content-digest"] == digest
    assert push.client.get(answer.headers["location"]).content == body
    assert statuses_of_all_workers(push.client, "GET", answer.headers["location"]) == {200}


def test_exact_bytes(push: Pusher) -> None:
    """The registry keeps a manifest byte by byte, including white space, escapes and the order of fields (Pushing
    Manifests)."""
    text = json.dumps(push.image() | {"annotations": {"a": "\u00e4\U0001f40b", "z": "/"}})
    body = b" \n" + text.replace("/", "\\/").encode() + b"\r\n\t "
    digest = push.put(body, "spaced")
    answer = push.client.get(f"{push.root}/manifests/spaced")
    assert answer.content == body
    assert answer.headers["docker-content-digest"] == digest


def test_a_wrong_digest(push: Pusher, algorithm: str) -> None:
    """A push of a manifest under a digest that is not its own gets 400, and nothing is stored (Pushing Manifests)."""
    body, claimed = encode(push.image()), digest_of(b"other", algorithm)
    answer = put(push, claimed, body)
    assert answer.status_code == 400
    assert error_codes(answer) == ["DIGEST_INVALID"]
    for digest in (claimed, digest_of(body)):
        assert push.client.get(f"{push.root}/manifests/{digest}").status_code == 404


def test_a_tag_moves(push: Pusher) -> None:
    """A tag points at the manifest that was last pushed to it. The earlier manifest can still be pulled by its digest
    (Pushing Manifests)."""
    first, second = push.tag("latest"), push.tag("latest")
    assert push.client.get(f"{push.root}/manifests/latest").content == second
    assert push.client.get(f"{push.root}/manifests/{digest_of(first)}").content == first


@pytest.mark.parametrize("kind", [f"{OCI_MANIFEST}; charset=utf-8", f"{OCI_MANIFEST};a=b;c=d", OCI_MANIFEST, None])
def test_content_type_parameters(push: Pusher, kind: str | None) -> None:
    """Parameters of Content-Type are ignored. Without Content-Type, the body's own mediaType counts (Pushing
    Manifests)."""
    assert put(push, "typed", encode(push.image()), kind).status_code == 201
    assert push.client.get(f"{push.root}/manifests/typed").headers["content-type"] == OCI_MANIFEST


@pytest.mark.parametrize("kind", [OCI_INDEX, DOCKER_MANIFEST, "application/json"])
def test_content_type_against_media_type(push: Pusher, kind: str) -> None:
    """A Content-Type that differs from the body's mediaType gets 400 MANIFEST_INVALID (Pushing Manifests)."""
    answer = put(push, "typed", encode(push.image()), kind)
    assert answer.status_code == 400
    assert error_codes(answer) == ["MANIFEST_INVALID"]


def test_a_manifest_without_media_type(push: Pusher) -> None:
    """The body may lack mediaType, which the spec only recommends. Then Content-Type counts (Pushing Manifests)."""
    document = push.image()
    del document["mediaType"]
    assert put(push, "untyped", encode(document)).status_code == 201
    assert push.client.get(f"{push.root}/manifests/untyped").headers["content-type"] == OCI_MANIFEST


def shapes(push: Pusher) -> dict[str, Document]:
    """Pushes blobs and child manifests. Returns a manifest of each form that refers to them, by the name of the
    form."""
    image = push.image()
    child = describe(encode(image), OCI_MANIFEST, platform={"os": "linux", "architecture": "arm64", "variant": "v8"})
    push.put(image)
    inner = push.index(child)
    push.put(inner)
    data = base64.b64encode(b"{}").decode()
    return {
        "without layers": push.image() | {"layers": []},
        "empty index": push.index(),
        "artifact without layers": push.artifact(artifact_type="application/vnd.test") | {"layers": []},
        "artifact with the empty layer": push.artifact(artifact_type="application/vnd.test"),
        "index": push.index(child),
        "nested index": push.index(describe(encode(inner), OCI_INDEX)),
        "index of an artifact type": push.index(child, artifactType="application/vnd.test"),
        "data field": push.artifact() | {"config": describe(b"{}", OCI_EMPTY) | {"data": data}},
        "unknown fields": push.image() | {"x": {"y": [1, 2.5, None, True]}, "annotations": {"a": ""}},
        "the same layer twice": {**image, "layers": image["layers"] * 2},
    }


@pytest.mark.parametrize(
    "shape",
    [
        "without layers",
        "empty index",
        "artifact without layers",
        "artifact with the empty layer",
        "index",
        "nested index",
        "index of an artifact type",
        "data field",
        "unknown fields",
        "the same layer twice",
    ],
)
def test_shapes(push: Pusher, shape: str, algorithm: str) -> None:
    """Every form of manifest that the image spec allows is stored as it is (Pushing Manifests)."""
    body = encode(shapes(push)[shape])
    digest = push.put(body, algorithm=algorithm)
    assert push.client.get(f"{push.root}/manifests/{digest}").content == body


@pytest.mark.parametrize("reference_kind", ["config", "layer", "child"])
def test_missing_references(push: Pusher, reference_kind: str, algorithm: str) -> None:
    """A manifest whose config, layer or child is not in the repository gets MANIFEST_BLOB_UNKNOWN (Pushing
    Manifests)."""
    missing = os.urandom(20)
    document = {
        "config": push.image() | {"config": describe(missing, OCI_CONFIG, algorithm)},
        "layer": push.image() | {"layers": [describe(missing, OCI_LAYER, algorithm)]},
        "child": push.index(describe(missing, OCI_MANIFEST, algorithm)),
    }[reference_kind]
    answer = put(push, "broken", encode(document), document["mediaType"])
    assert answer.status_code == 404
    assert error_codes(answer) == ["MANIFEST_BLOB_UNKNOWN"]
    assert digest_of(missing, algorithm) in answer.text
    assert push.client.get(f"{push.root}/manifests/broken").status_code == 404


def test_references_of_another_repository(push: Pusher) -> None:
    """A manifest that refers to blobs of another repository gets MANIFEST_BLOB_UNKNOWN (Pushing Manifests)."""
    body = encode(push.image())
    other = Pusher(push.client, f"{push.repo}/other")
    assert error_codes(put(other, "x", body)) == ["MANIFEST_BLOB_UNKNOWN"]


@pytest.mark.parametrize(
    "kind",
    [
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
    ],
)
def test_nondistributable_layers(push: Pusher, kind: str) -> None:
    """The registry accepts a manifest whose non-distributable layers are not stored (Pushing Manifests; image spec,
    layer media types)."""
    layer = describe(os.urandom(20), kind, urls=["https://example.test/layer"])
    assert put(push, "windows", encode(push.image() | {"layers": [layer]})).status_code == 201


@pytest.mark.parametrize("size", [4 * MIB, LIMIT])
def test_large_manifests(push: Pusher, size: int) -> None:
    """The registry accepts a manifest of 4 MiB, and a manifest of exactly the size limit (Pushing Manifests)."""
    body = padded(push.image(), size)
    digest = push.put(body, "large")
    assert push.client.get(f"{push.root}/manifests/{digest}").content == body


@pytest.mark.parametrize("framing", ["Content-Length", "chunked"])
def test_too_large_manifests(push: Pusher, framing: str) -> None:
    """A manifest one byte larger than the limit gets 413, with Content-Length and with chunked transfer coding (Pushing
    Manifests)."""
    body = padded(push.image(), LIMIT + 1)
    content = body if framing == "Content-Length" else (body[at : at + MIB] for at in range(0, len(body), MIB))
    answer = push.client.put(f"{push.root}/manifests/large", content=content, headers={"Content-Type": OCI_MANIFEST})
    assert answer.status_code == 413
    assert error_codes(answer) == ["MANIFEST_INVALID"]
    assert push.client.get(f"{push.root}/manifests/large").status_code == 404


@pytest.mark.parametrize("count", [1, 10, 64])
def test_tag_parameters(push: Pusher, algorithm: str, count: int) -> None:
    """A push with several `tag` parameters sets all these tags. OCI-Tag names each of them (end-7b)."""
    body = encode(push.image())
    digest = digest_of(body, algorithm)
    tags = [f"v{number}" for number in range(count)]
    answer = put(push, f"{digest}?{'&'.join(f'tag={tag}' for tag in tags)}", body)
    assert answer.status_code == 201
    tags_in_response = [tag.strip() for field in answer.headers.get_list("oci-tag") for tag in field.split(",")]
    assert sorted(tags_in_response) == sorted(tags)
    for tag in tags:
        pulled = push.client.get(f"{push.root}/manifests/{tag}")
        assert pulled.content == body
        assert pulled.headers["docker-content-digest"] == digest


def test_too_many_tag_parameters(push: Pusher) -> None:
    """A push with too many `tag` parameters gets 414, and no tag is set (end-7b)."""
    body = encode(push.image())
    query = "&".join(f"tag=v{number}" for number in range(500))
    answer = put(push, f"{digest_of(body)}?{query}", body)
    assert answer.status_code == 414
    error_codes(answer)  # checks the form of the error response
    assert push.client.get(f"{push.root}/manifests/v1").status_code == 404


def test_an_invalid_tag_parameter(push: Pusher) -> None:
    """A push with one invalid `tag` parameter gets 400. Neither the manifest nor any tag is stored (end-7b)."""
    body = encode(push.image())
    answer = put(push, f"{digest_of(body)}?tag=good&tag=.bad", body)
    assert answer.status_code == 400
    assert error_codes(answer) == ["MANIFEST_INVALID"]
    for reference in ("good", digest_of(body)):
        assert push.client.get(f"{push.root}/manifests/{reference}").status_code == 404


def test_no_tag_parameters(push: Pusher) -> None:
    """The response to a push without `tag` parameters has no OCI-Tag (end-7b)."""
    body = encode(push.image())
    assert "oci-tag" not in put(push, digest_of(body), body).headers


@pytest.mark.parametrize("shape", ["image", "index"])
@pytest.mark.parametrize("is_subject_stored", [True, False])
def test_subject(push: Pusher, algorithm: str, shape: str, is_subject_stored: bool) -> None:
    """OCI-Subject names the subject of the pushed manifest, whether or not the subject is stored (Pushing Manifests
    with Subject)."""
    target = encode(push.image())
    if is_subject_stored:
        push.put(target, algorithm=algorithm)
    subject = describe(target, OCI_MANIFEST, algorithm)
    document = push.artifact(subject, "a/b") if shape == "image" else push.index(subject=subject)
    answer = put(push, digest_of(encode(document)), encode(document), document["mediaType"])
    assert answer.status_code == 201
    assert answer.headers["oci-subject"] == digest_of(target, algorithm)


def test_no_subject(push: Pusher) -> None:
    """The response to a push of a manifest without a subject has no OCI-Subject (Pushing Manifests with Subject)."""
    assert "oci-subject" not in put(push, "plain", encode(push.image())).headers


def test_conditional_push(push: Pusher) -> None:
    """A push to a tag that does not meet If-Match or If-None-Match gets 412 and changes nothing (Referrers Tag Schema;
    RFC 9110, 13.1)."""
    path = f"{push.root}/manifests/guarded"
    first, second = encode(push.image()), encode(push.image())

    def write(body: bytes, **condition: str) -> int:
        headers = {"Content-Type": OCI_MANIFEST} | {name.replace("_", "-"): etag for name, etag in condition.items()}
        return push.client.put(path, content=body, headers=headers).status_code

    assert write(first, If_Match="*") == 412
    assert write(first, If_None_Match="*") == 201
    assert write(second, If_None_Match="*") == 412
    etag = push.client.head(path).headers["etag"]
    assert write(second, If_Match=etag) == 201
    assert write(first, If_Match=etag) == 412
    assert push.client.get(path).content == second


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b"\xff\xfe{}",
        b'{"schemaVersion":2}',
        b'{"schemaVersion":1,"name":"x","tag":"y","fsLayers":[],"history":[]}',
        b'{"schemaVersion":"2","config":{}}',
        b'{"schemaVersion":2,"schemaVersion":2}',
        b'{"schemaVersion":2,"config":NaN}',
        b"[" * 100_000,
    ],
    ids=lambda body: body[:30].decode("latin-1") or "empty",
)
def test_bodies_that_are_no_manifests(push: Pusher, body: bytes) -> None:
    """A body that cannot be read as a manifest gets 400 MANIFEST_INVALID (Pushing Manifests)."""
    answer = put(push, "bad", body)
    assert answer.status_code == 400
    assert error_codes(answer) == ["MANIFEST_INVALID"]


def test_pull_of_a_nonexistent_repository(push: Pusher) -> None:
    """A pull from a repository that does not exist gets 404 (Pushing Manifests)."""
    for path in ("manifests/latest", f"blobs/{digest_of(b'')}", "tags/list"):
        assert push.client.get(f"{push.root}/{path}").status_code == 404


def test_pushing_again(push: Pusher) -> None:
    """A push of an existing manifest gets 201 again (Pushing Manifests)."""
    body = encode(push.image())
    for reference in ("a", "a", "b", digest_of(body), digest_of(body)):
        assert put(push, reference, body).status_code == 201
    assert push.client.get(with_query(f"{push.root}/tags/list", n="9")).json()["tags"] == ["a", "b"]
