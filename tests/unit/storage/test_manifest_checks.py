"""Manifests that are pushed more than once: the same bytes are parsed once, and compared with the request each time."""

from __future__ import annotations

import json

import pytest

from storage.content import DOCKER_MANIFEST, MAX_CACHED_MANIFEST_BYTES, OCI_INDEX, OCI_MANIFEST, Manifest, digest_of
from storage.errors import DigestInvalid, ManifestInvalid


def _body(**more: object) -> bytes:
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2}
    return json.dumps({"schemaVersion": 2, "config": empty, "layers": [], **more}).encode()


def test_the_same_bytes_are_checked_once() -> None:
    """The bytes of an image that is pushed under several tags are parsed once."""
    body = _body(annotations={"which": "the same"})
    assert Manifest.parse(body, OCI_MANIFEST) is Manifest.parse(bytes(bytearray(body)), OCI_MANIFEST)


def test_the_type_counts_as_well() -> None:
    """With another Content-Type, the same bytes are another manifest, or none."""
    body = _body()
    assert Manifest.parse(body, OCI_MANIFEST).media_type == OCI_MANIFEST
    assert Manifest.parse(body, DOCKER_MANIFEST).media_type == DOCKER_MANIFEST
    for _ in range(2):
        with pytest.raises(ManifestInvalid):
            Manifest.parse(body, "application/json")
    with pytest.raises(ManifestInvalid):
        Manifest.parse(_body(mediaType=OCI_MANIFEST), OCI_INDEX)


def test_the_digest_is_looked_at_each_time() -> None:
    """Known bytes with a wrong digest are refused. With a digest of another algorithm, they are accepted if it is
    theirs."""
    body = _body()
    Manifest.parse(body, OCI_MANIFEST)
    with pytest.raises(DigestInvalid):
        Manifest.parse(body, OCI_MANIFEST, digest_of(b"other bytes"))
    longer = digest_of(body, "sha512")
    assert Manifest.parse(body, OCI_MANIFEST, longer).digest == longer
    assert Manifest.parse(body, OCI_MANIFEST).digest == digest_of(body)


def test_large_manifests_are_not_kept() -> None:
    """The cache of parsed manifests is limited in size."""
    body = _body(annotations={"much": "x" * MAX_CACHED_MANIFEST_BYTES})
    assert Manifest.parse(body, OCI_MANIFEST) == Manifest.parse(body, OCI_MANIFEST)
    assert Manifest.parse(body, OCI_MANIFEST) is not Manifest.parse(body, OCI_MANIFEST)
