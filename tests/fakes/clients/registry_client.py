"""Sends plain HTTP requests to a registry, and checks that it serves the same bytes that were pushed."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.client_images import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    ClientImage,
    digest_of,
    digests_in,
    noise,
)

ACCEPT = ", ".join([OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST])
PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class RegistryReply:
    """A complete response."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class RegistryClient:
    """Sends requests to the registry at `address` (`host:port`), each on a new connection."""

    address: str
    authorization: str = field(default="", repr=False)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> RegistryReply:
        with closing(http.client.HTTPConnection(self.address, timeout=60)) as connection:
            login = {"Authorization": self.authorization} if self.authorization else {}
            connection.request(method, path, body, {"Accept": ACCEPT, **login, **(headers or {})})
            with connection.getresponse() as reply:
                return RegistryReply(reply.status, reply.headers, reply.read())

    def manifest(self, repo: str, reference: str) -> RegistryReply:
        """Returns a manifest. Checks that its bytes have the digest in the header."""
        reply = self.ask("GET", f"/v2/{repo}/manifests/{reference}")
        assert reply.status == 200, f"{repo} {reference}: {reply.status} {reply.body!r}"
        assert reply.headers["Docker-Content-Digest"] == digest_of(reply.body)
        return reply

    def digest(self, repo: str, tag: str = "latest") -> str:
        return digest_of(self.manifest(repo, tag).body)

    def blob(self, repo: str, digest: str) -> bytes:
        reply = self.ask("GET", f"/v2/{repo}/blobs/{digest}")
        assert reply.status == 200, f"{repo} {digest}: {reply.status} {reply.body!r}"
        return reply.body

    def blob_status(self, repo: str, digest: str) -> int:
        return self.ask("HEAD", f"/v2/{repo}/blobs/{digest}").status

    def tags(self, repo: str) -> list[str]:
        reply = self.ask("GET", f"/v2/{repo}/tags/list")
        assert reply.status == 200, reply.body
        return list(reply.json()["tags"])

    def push(self, repo: str, reference: str, image: ClientImage) -> None:
        """Pushes all blobs and manifests of the image, each blob with a POST and a PUT. The top manifest is pushed
        under `reference`, all others under their digests."""
        for digest, content in image.blobs.items():
            start = self.ask("POST", f"/v2/{repo}/blobs/uploads/")
            assert start.status == 202, start.body
            location = start.headers["Location"]
            mark = "&" if "?" in location else "?"
            reply = self.ask("PUT", f"{location}{mark}digest={digest}", content.body)
            assert reply.status == 201, reply.body
        for digest, content in image.manifests.items():
            name = reference if digest == image.digest else digest
            headers = {"Content-Type": content.media_type}
            reply = self.ask("PUT", f"/v2/{repo}/manifests/{name}", content.body, headers)
            assert reply.status == 201, reply.body


def pull_all(wire: RegistryClient, repo: str, reference: str) -> set[str]:
    """Pulls a manifest and all manifests and blobs to which it refers. Checks all digests and sizes. Returns all
    digests."""
    body = wire.manifest(repo, reference).body
    found = {digest_of(body)}
    for digest, size, is_manifest in digests_in(body):
        if is_manifest:
            assert len(wire.manifest(repo, digest).body) == size
            found |= pull_all(wire, repo, digest)
        elif digest not in found:
            blob = wire.blob(repo, digest)
            assert (digest_of(blob), len(blob)) == (digest, size)
            found.add(digest)
    return found


def assert_same_image(wire: RegistryClient, repo: str, reference: str, image: ClientImage) -> None:
    """Checks that every manifest and blob of the image is served with its exact bytes and media type."""
    served = wire.manifest(repo, reference)
    assert served.body == image.manifest.body
    for digest, content in image.manifests.items():
        reply = wire.manifest(repo, digest)
        assert (reply.body, reply.headers["Content-Type"]) == (content.body, content.media_type)
    for digest, content in image.blobs.items():
        assert wire.blob(repo, digest) == content.body, digest


def assert_same_files(wire: RegistryClient, repo: str, reference: str, image: ClientImage) -> None:
    """Checks an image that was pushed by a client that compresses layers itself: the config and all uncompressed layers
    have their original bytes."""
    assert image.config is not None
    pull_all(wire, repo, reference)
    document = wire.manifest(repo, reference).json()
    assert wire.blob(repo, document["config"]["digest"]) == image.config.body
    served = [_uncompressed(wire.blob(repo, entry["digest"])) for entry in document["layers"]]
    assert [hashlib.sha256(tar).hexdigest() for tar in served] == [
        hashlib.sha256(each.tar).hexdigest() for each in image.layers
    ]


def noise_stream(seed: str, size: int) -> Iterator[bytes]:
    """Yields a long body in pieces of 1 MiB, so that it need not fit into memory. All pieces are the same block of
    random bytes, except that each begins with its number."""
    block = bytearray(noise(seed, PIECE))
    for number in range(-(-size // PIECE)):
        block[:8] = number.to_bytes(8, "big")
        yield bytes(block[: min(PIECE, size - number * PIECE)])


def _uncompressed(layer: bytes) -> bytes:
    """Returns the tar archive of a layer. The layer may be uncompressed: if docker has pulled it uncompressed before,
    it pushes it in the same form."""
    return gzip.decompress(layer) if layer.startswith(b"\x1f\x8b") else layer
