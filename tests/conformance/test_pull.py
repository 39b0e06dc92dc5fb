"""Spec, "Pull": pulling manifests, pulling blobs, checking if content exists."""

from __future__ import annotations

import os

import httpx2
import pytest

from tests.conformance.pusher import (
    DOCKER_CONFIG,
    DOCKER_LAYER,
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MIB,
    OCI_INDEX,
    OCI_MANIFEST,
    Document,
    Pusher,
    describe,
    digest_of,
    encode,
    error_codes,
    statuses_of_all_workers,
)


def test_pulling_manifests_gives_the_pushed_bytes(push: Pusher, algorithm: str) -> None:
    """GET by tag and by digest gets 200 with the exact bytes of the manifest (Pulling manifests)."""
    body = encode(push.image(algorithm))
    digest = push.put(body, algorithm=algorithm)
    push.put(body, "tagged")
    for reference in (digest, "tagged"):
        answer = push.client.get(f"{push.root}/manifests/{reference}")
        assert answer.status_code == 200
        assert answer.content == body
        assert answer.headers["content-type"] == OCI_MANIFEST
        assert answer.headers["content-length"] == str(len(body))


def test_pulling_manifests_names_the_digest(push: Pusher, algorithm: str) -> None:
    """The responses to GET and HEAD have the requested digest in Docker-Content-Digest, whether it is a sha256 or a
    sha512 digest (Pulling manifests)."""
    body = encode(push.image(algorithm))
    digest = push.put(body, algorithm=algorithm)
    for method in ("GET", "HEAD"):
        answer = push.client.request(method, f"{push.root}/manifests/{digest}")
        assert answer.headers["docker-content-digest"] == digest


def test_pulling_manifests_keeps_the_content_type(push: Pusher) -> None:
    """The Content-Type of the response is the Content-Type of the push without parameters (Pulling manifests)."""
    body = encode(push.image())
    path = f"{push.root}/manifests/typed"
    headers = {"Content-Type": f"{OCI_MANIFEST}; charset=utf-8"}
    assert push.client.put(path, content=body, headers=headers).status_code == 201
    for method in ("GET", "HEAD"):
        assert push.client.request(method, path).headers["content-type"] == OCI_MANIFEST


@pytest.mark.parametrize("accept", [None, "*/*", OCI_INDEX, "text/html", f"{DOCKER_MANIFEST}, {DOCKER_LIST}"])
def test_pulling_manifests_converts_nothing(push: Pusher, accept: str | None) -> None:
    """The stored manifest is served even if Accept does not list its type (Content Negotiation)."""
    body = push.tag("plain")
    answer = push.client.get(f"{push.root}/manifests/plain", headers={"Accept": accept} if accept else {})
    assert answer.status_code == 200
    assert answer.content == body
    assert answer.headers["content-type"] == OCI_MANIFEST


def test_pulling_docker_manifests(push: Pusher) -> None:
    """Docker's schema 2 manifest and its manifest list are served with their own types (Pulling manifests)."""
    config, layer = b'{"os":"linux"}', os.urandom(50)
    push.blob(config)
    push.blob(layer)
    manifest: Document = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": describe(config, DOCKER_CONFIG),
        "layers": [describe(layer, DOCKER_LAYER)],
    }
    listed = describe(encode(manifest), DOCKER_MANIFEST, platform={"os": "linux", "architecture": "amd64"})
    manifest_list: Document = {"schemaVersion": 2, "mediaType": DOCKER_LIST, "manifests": [listed]}
    for document, kind in ((manifest, DOCKER_MANIFEST), (manifest_list, DOCKER_LIST)):
        digest = push.put(document)
        answer = push.client.get(f"{push.root}/manifests/{digest}")
        assert answer.headers["content-type"] == kind
        assert answer.content == encode(document)


def test_pulling_manifests_that_are_missing(push: Pusher) -> None:
    """GET and HEAD of an unknown manifest, or of a manifest in an unknown repository, get 404 (Pulling manifests)."""
    push.tag("there")
    for reference in ("missing", digest_of(b"missing"), digest_of(b"missing", "sha512")):
        for root in (push.root, f"{push.root}/unknown"):
            answer = push.client.get(f"{root}/manifests/{reference}")
            assert answer.status_code == 404
            assert error_codes(answer) in (["MANIFEST_UNKNOWN"], ["NAME_UNKNOWN"])
            assert push.client.head(f"{root}/manifests/{reference}").status_code == 404


@pytest.mark.parametrize("size", [0, 1, 100, 3 * MIB + 17])
def test_pulling_blobs(push: Pusher, algorithm: str, size: int) -> None:
    """GET gets 200 with the bytes of the blob. The headers have its digest and length (Pulling blobs)."""
    data = os.urandom(size)
    digest = push.blob(data, algorithm)
    answer = push.client.get(f"{push.root}/blobs/{digest}")
    assert answer.status_code == 200
    assert answer.content == data
    assert answer.headers["docker-content-digest"] == digest
    assert answer.headers["content-length"] == str(size)
    assert answer.headers["content-type"] == "application/octet-stream"


def test_pulling_blobs_on_any_worker(push: Pusher) -> None:
    """Right after a push to one worker, all workers serve the blob (Pulling blobs)."""
    digest = push.blob()
    assert statuses_of_all_workers(push.client, "GET", f"{push.root}/blobs/{digest}") == {200}


def test_pulling_blobs_that_are_missing(push: Pusher, algorithm: str) -> None:
    """GET and HEAD of an unknown blob get 404 (Pulling blobs)."""
    path = f"{push.root}/blobs/{digest_of(b'missing', algorithm)}"
    answer = push.client.get(path)
    assert answer.status_code == 404
    assert error_codes(answer) == ["BLOB_UNKNOWN"]
    assert push.client.head(path).status_code == 404


def test_pulling_blobs_of_another_repository(push: Pusher) -> None:
    """A blob can be pulled only from the repository to which it was pushed (Pulling blobs)."""
    digest = push.blob()
    assert push.client.get(f"{push.root}/other/blobs/{digest}").status_code == 404


def test_checking_existence(push: Pusher, algorithm: str) -> None:
    """HEAD of a blob or manifest gets 200 with Docker-Content-Digest and Content-Length (Checking if content
    exists)."""
    data = os.urandom(1234)
    blob = push.blob(data, algorithm)
    body = encode(push.image(algorithm))
    manifest = push.put(body, algorithm=algorithm)
    for path, digest, size in (
        (f"{push.root}/blobs/{blob}", blob, len(data)),
        (f"{push.root}/manifests/{manifest}", manifest, len(body)),
    ):
        answer = push.client.head(path)
        assert answer.status_code == 200
        assert answer.headers["docker-content-digest"] == digest
        assert answer.headers["content-length"] == str(size)
        assert answer.content == b""


VOLATILE = {"date", "x-request-id", "docker-upload-uuid"}
"""Headers that differ between any two responses."""


def _steady_headers(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name not in VOLATILE}


def test_head_has_the_status_and_headers_of_get(push: Pusher, algorithm: str) -> None:
    """At every endpoint with GET, the response to HEAD has the status and the headers of the response to GET, but no
    body (RFC 9110, 9.3.2). This includes the responses to requests that fail."""
    blob = push.blob(os.urandom(100), algorithm)
    digest = push.put(push.image(algorithm), algorithm=algorithm)
    push.tag("tagged")
    session = push.start()
    missing = digest_of(b"missing", algorithm)
    paths = [
        "/v2/",
        "/v2/_catalog?n=1",
        f"{push.root}/tags/list",
        f"{push.root}/tags/list?n=0",
        f"{push.root}/manifests/tagged",
        f"{push.root}/manifests/{digest}",
        f"{push.root}/blobs/{blob}",
        f"{push.root}/referrers/{digest}",
        f"{push.root}/referrers/{digest}?artifactType=a/b",
        session,
        f"{push.root}/manifests/missing",
        f"{push.root}/manifests/.bad",
        f"{push.root}/blobs/{missing}",
        f"{push.root}/blobs/bad",
        f"{push.root}/referrers/bad",
        f"{push.root}/none/tags/list",
        "/v2/NAME/tags/list",
        "/v2/nothing",
    ]
    for path in paths:
        get, head = push.client.get(path), push.client.head(path)
        assert head.status_code == get.status_code, path
        assert head.content == b"", path
        assert _steady_headers(head) == _steady_headers(get), path
