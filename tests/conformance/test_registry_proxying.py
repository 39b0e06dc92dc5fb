"""Spec, "Registry Proxying": the parameter `ns` in requests for content that was pushed to this registry."""

from __future__ import annotations

import pytest

from tests.conformance.pusher import Pusher, describe, digest_of, encode


@pytest.mark.parametrize("host", ["docker.io", "registry.example.org:5000", "", "NOT A HOST"])
def test_ns_is_ignored(push: Pusher, host: str) -> None:
    """`ns` is the host name in the image reference that a client pulls. The registry ignores it for pushed content, and
    sends no OCI-Namespace."""
    body = encode(push.image())
    digest = push.put(body, "here")
    blob = push.blob(b"{}")
    for path in (f"manifests/{digest}", "manifests/here", f"blobs/{blob}", f"referrers/{digest}", "tags/list"):
        for method in ("GET", "HEAD"):
            answer = push.client.request(method, f"{push.root}/{path}", params={"ns": host})
            assert answer.status_code == 200
            assert "oci-namespace" not in answer.headers


def test_ns_on_a_push(push: Pusher) -> None:
    """Some clients also send `ns` in pushes. The registry ignores it."""
    data = b"with ns"
    answer = push.client.post(f"{push.root}/blobs/uploads/?ns=docker.io")
    assert answer.status_code == 202
    location = answer.headers["location"]
    answer = push.client.put(location, content=data, params={"digest": digest_of(data), "ns": "docker.io"})
    assert answer.status_code == 201
    body = encode(push.artifact(layers=[describe(data, "text/plain")]))
    kind = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
    answer = push.client.put(f"{push.root}/manifests/x?ns=docker.io", content=body, headers=kind)
    assert answer.status_code == 201
    assert push.client.get(f"{push.root}/manifests/x").content == body


def test_stray_credentials_are_ignored(push: Pusher) -> None:
    """A registry without accounts ignores the credentials that a client sends (Registry Proxying)."""
    push.tag("open")
    for value in ("Basic dXNlcjpwYXNz", "Bearer abc.def.ghi", "Negotiate x", "", "no scheme at all ="):
        answer = push.client.get(f"{push.root}/manifests/open", headers={"Authorization": value})
        assert answer.status_code == 200
