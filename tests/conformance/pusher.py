"""Helpers of the conformance tests: they make content, push it with plain HTTP requests, and read error responses."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import httpx2

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"

MIB = 1024 * 1024
CONNECTIONS = 8
"""Number of new connections of which at least one reaches each worker."""

Document = dict[str, Any]


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def encode(document: Document) -> bytes:
    """Encodes a document with white space, because a registry must keep the bytes of a manifest as they are."""
    return json.dumps(document, indent=3).encode()


def describe(data: bytes, media_type: str, algorithm: str = "sha256", **more: Any) -> Document:
    return {"mediaType": media_type, "digest": digest_of(data, algorithm), "size": len(data), **more}


def with_query(location: str, **parameters: str) -> str:
    """Adds query parameters to `location`, as clients do. Keeps the query that `location` may have already."""
    return location + ("&" if "?" in location else "?") + urlencode(parameters)


def make_client(url: str | httpx2.URL) -> httpx2.Client:
    """Returns a client for plain HTTP. `verify=False` spares it the loading of all certificate authorities."""
    return httpx2.Client(base_url=url, timeout=60, trust_env=False, verify=False)


def new_client(client: httpx2.Client) -> httpx2.Client:
    """Returns a new client of the same server. Its first request opens a new connection."""
    return make_client(client.base_url)


def statuses_of_all_workers(client: httpx2.Client, method: str, path: str) -> set[int]:
    """Sends the request on several new connections, so that it reaches each worker. Returns the set of all statuses."""
    statuses = set()
    for _ in range(CONNECTIONS):
        with new_client(client) as other:
            statuses.add(other.request(method, path).status_code)
    return statuses


def error_codes(answer: httpx2.Response) -> list[str]:
    """Returns the codes in an error response. Checks that the response has the form of the spec ("Error Codes")."""
    assert answer.headers["content-type"] == "application/json"
    document = answer.json()
    assert set(document) == {"errors"}
    assert document["errors"]
    for error in document["errors"]:
        assert set(error) <= {"code", "message", "detail"}
        assert isinstance(error["message"], str)
        assert error["message"]
    return [error["code"] for error in document["errors"]]


@dataclass
class Pusher:
    """Pushes content to one repository. Each method checks that its requests succeed."""

    client: httpx2.Client
    repo: str

    @property
    def root(self) -> str:
        return f"/v2/{self.repo}"

    def start(self, **parameters: str) -> str:
        """Starts an upload session. Returns its location."""
        answer = self.client.post(with_query(f"{self.root}/blobs/uploads/", **parameters))
        assert answer.status_code == 202, answer.text
        return answer.headers["location"]

    def blob(self, data: bytes | None = None, algorithm: str = "sha256") -> str:
        """Pushes a blob and returns its digest. Without `data`, pushes random bytes."""
        data = os.urandom(64) if data is None else data
        digest = digest_of(data, algorithm)
        answer = self.client.put(with_query(self.start(), digest=digest), content=data)
        assert answer.status_code == 201, answer.text
        return digest

    def put(self, document: Document | bytes, reference: str | None = None, algorithm: str = "sha256") -> str:
        """Pushes a manifest under `reference`, or under its digest if `reference` is None. Returns the digest."""
        body = document if isinstance(document, bytes) else encode(document)
        digest = digest_of(body, algorithm)
        kind = json.loads(body).get("mediaType", OCI_MANIFEST)
        answer = self.client.put(
            f"{self.root}/manifests/{reference or digest}", content=body, headers={"Content-Type": kind}
        )
        assert answer.status_code == 201, answer.text
        return digest

    def image(self, algorithm: str = "sha256", **more: Any) -> Document:
        """Pushes a config and a layer. Returns an image manifest that refers to them. `more`: other fields of the
        manifest."""
        config, layer = encode({"nonce": os.urandom(8).hex()}), os.urandom(100)
        self.blob(config, algorithm)
        self.blob(layer, algorithm)
        document: Document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": describe(config, OCI_CONFIG, algorithm),
            "layers": [describe(layer, OCI_LAYER, algorithm)],
        }
        return document | more

    def artifact(self, subject: Document | None = None, artifact_type: str | None = None, **more: Any) -> Document:
        """Pushes the empty config. Returns an artifact manifest that refers to it. `more`: other fields of the
        manifest."""
        self.blob(b"{}")
        document: Document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": describe(b"{}", OCI_EMPTY),
            "layers": [describe(b"{}", OCI_EMPTY)],
        }
        if artifact_type:
            document["artifactType"] = artifact_type
        if subject:
            document["subject"] = subject
        return document | more

    def index(self, *manifests: Document, **more: Any) -> Document:
        document: Document = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(manifests)}
        return document | more

    def tag(self, *tags: str) -> bytes:
        """Pushes a new image under each of `tags`. Returns the bytes of its manifest."""
        body = encode(self.image())
        for tag in tags:
            self.put(body, tag)
        return body
