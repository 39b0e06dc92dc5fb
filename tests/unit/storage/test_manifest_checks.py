"""Manifests that are pushed several times. The same bytes are parsed once and then cached. Their digest is compared
with the digest in the request each time."""

from __future__ import annotations

import json

import pytest

from storage.content import DOCKER_MANIFEST, MAX_CACHED_MANIFEST_BYTES, OCI_INDEX, OCI_MANIFEST, Manifest, digest_of
from storage.errors import DigestInvalid, ManifestInvalid


def _body(**more: object) -> bytes:
    empty = {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest_of(b"{}"), "size": 2}
    return json.dumps({"schemaVersion": 2, "config": empty, "layers": [], **more}).encode()


def test_the_same_bytes_are_parsed_once() -> None:
    """The bytes of an image that is pushed under several tags are parsed once."""
    body = _body(annotations={"which": "the same"})
    assert Manifest.parse(body, OCI_MANIFEST) is Manifest.parse(bytes(bytearray(body)), OCI_MANIFEST)


def test_media_type_is_part_of_the_cache_key() -> None:
    """The same bytes with another Content-Type are a different manifest, or are refused."""
    body = _body()
    assert Manifest.parse(body, OCI_MANIFEST).media_type == OCI_MANIFEST
    assert Manifest.parse(body, DOCKER_MANIFEST).media_type == DOCKER_MANIFEST
    for _ in range(2):
        with pytest.raises(ManifestInvalid):
            Manifest.parse(body, "application/json")
    with pytest.raises(ManifestInvalid):
        Manifest.parse(_body(mediaType=OCI_MANIFEST), OCI_INDEX)


def test_the_digest_is_checked_each_time() -> None:
    """Bytes that were parsed before are refused if the request has a wrong digest. They are accepted with the right
    digest of any algorithm."""
    body = _body()
    Manifest.parse(body, OCI_MANIFEST)
    with pytest.raises(DigestInvalid):
        Manifest.parse(body, OCI_MANIFEST, digest_of(b"other bytes"))
    sha512_digest = digest_of(body, "sha512")
    assert Manifest.parse(body, OCI_MANIFEST, sha512_digest).digest == sha512_digest
    assert Manifest.parse(body, OCI_MANIFEST).digest == digest_of(body)


def test_large_manifests_are_not_cached() -> None:
    """Manifests above a limit are not cached, so that the cache stays small."""
    body = _body(annotations={"much": "x" * MAX_CACHED_MANIFEST_BYTES})
    assert Manifest.parse(body, OCI_MANIFEST) == Manifest.parse(body, OCI_MANIFEST)
    assert Manifest.parse(body, OCI_MANIFEST) is not Manifest.parse(body, OCI_MANIFEST)
