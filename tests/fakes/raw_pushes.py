"""Pushes content on raw HTTP connections, to prepare it for a test."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from tests.fakes.raw_http import RawAnswer, RawConnection

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
OCTETS = "application/octet-stream"

Document = dict[str, Any]


def digest_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def encode(document: Document) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def describe(data: bytes, media_type: str, **more: Any) -> Document:
    return {"mediaType": media_type, "digest": digest_of(data), "size": len(data)} | more


def image(config: bytes, *layers: bytes) -> bytes:
    """Returns an image manifest with this config and these layers."""
    return encode(
        {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": describe(config, OCI_CONFIG),
            "layers": [describe(layer, OCI_LAYER) for layer in layers],
        }
    )


@dataclass
class RawPushes:
    """Sends requests for one repository on one connection. Checks that each request succeeds."""

    wire: RawConnection
    repo: str

    @property
    def root(self) -> str:
        return f"/v2/{self.repo}"

    def start(self) -> str:
        """Starts an upload session and returns its location."""
        answer = self.wire.ask("POST", f"{self.root}/blobs/uploads/")
        assert answer.status == 202
        return answer["location"]

    def blob(self, data: bytes) -> str:
        """Pushes a blob and returns its path."""
        digest = digest_of(data)
        answer = self.wire.ask("PUT", f"{self.start()}?digest={digest}", body=data)
        assert answer.status == 201
        return f"{self.root}/blobs/{digest}"

    def manifest(self, body: bytes, reference: str, media_type: str = OCI_MANIFEST) -> str:
        """Pushes a manifest and returns its path."""
        path = f"{self.root}/manifests/{reference}"
        answer = self.wire.ask("PUT", path, {"Content-Type": media_type}, body)
        assert answer.status == 201
        return path

    def get(self, path: str) -> RawAnswer:
        answer = self.wire.ask("GET", path)
        assert answer.status == 200
        return answer
