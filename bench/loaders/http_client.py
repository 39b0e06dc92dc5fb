"""A small HTTP client for a registry on this machine. The bench fills the registry with it before a trial, and checks
responses."""

from __future__ import annotations

import hashlib
import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import urlsplit

from bench.errors import TrialFailed
from bench.system.servers import HOST

REQUEST_TIMEOUT = 60.0  # seconds
BLOCK_SIZE = 1 << 20  # bytes
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
MANIFEST_ACCEPT = ", ".join(
    (
        MANIFEST_TYPE,
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
"""The Accept header that docker sends for a manifest."""


@dataclass(frozen=True)
class HttpResponse:
    """A complete response. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """A client with one keep-alive connection. A context manager that closes the connection."""

    def __init__(self, port: int, source: str = HOST) -> None:
        """`source`: the address that the connection comes from."""
        self._connection = http.client.HTTPConnection(
            HOST, port, timeout=REQUEST_TIMEOUT, source_address=(source, 0), blocksize=BLOCK_SIZE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def request(
        self,
        method: str,
        path: str,
        body: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        expect: int | tuple[int, ...],
    ) -> HttpResponse:
        """Sends a request and reads the response. Raises TrialFailed if the status is not `expect`, or not in it, or if
        the connection breaks."""
        try:
            self._connection.request(method, path, body, dict(headers or {}))
            response = self._connection.getresponse()
            answer = HttpResponse(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise TrialFailed(f"{method} {path}: {error!r}") from None
        expected = expect if isinstance(expect, tuple) else (expect,)
        if answer.status not in expected:
            wanted = " or ".join(map(str, expected))
            raise TrialFailed(f"{method} {path} gave {answer.status}, not {wanted}: {answer.body[:200]!r}")
        return answer

    def get_manifest(self, repo: str, reference: str, *, method: str = "GET") -> HttpResponse:
        """Requests a manifest as docker does. Raises TrialFailed."""
        path = f"/v2/{repo}/manifests/{reference}"
        return self.request(method, path, headers={"Accept": MANIFEST_ACCEPT}, expect=200)

    def start_upload(self, repo: str) -> str:
        """Starts an upload session and returns path and query of its URL."""
        response = self.request("POST", f"/v2/{repo}/blobs/uploads/", b"", expect=202)
        return location_path(response.headers.get("location", ""))

    def close_upload(self, location: str, digest: str, body: bytes | IO[bytes] = b"", size: int = 0) -> None:
        """Closes an upload session with a PUT that names the digest. `body`: the last `size` bytes of the blob."""
        mark = "&" if "?" in location else "?"
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        self.request("PUT", f"{location}{mark}digest={digest}", body, headers, expect=201)

    def push_blob(self, repo: str, digest: str, content: bytes | Path) -> None:
        """Pushes a blob from memory or from a file, with a POST and a PUT."""
        location = self.start_upload(repo)
        if isinstance(content, bytes):
            self.close_upload(location, digest, content, len(content))
            return
        with content.open("rb") as file:
            self.close_upload(location, digest, file, content.stat().st_size)

    def put_manifest(self, repo: str, reference: str, body: bytes) -> None:
        """Pushes an OCI manifest under a tag or its digest."""
        self.request("PUT", f"/v2/{repo}/manifests/{reference}", body, {"Content-Type": MANIFEST_TYPE}, expect=201)

    def open_blob(self, repo: str, digest: str) -> http.client.HTTPResponse:
        """Requests a blob and returns the response once its headers have arrived, with the body unread. Raises
        TrialFailed on a status other than 200, and OSError or HTTPException on a broken connection."""
        path = f"/v2/{repo}/blobs/{digest}"
        self._connection.request("GET", path)
        response = self._connection.getresponse()
        if response.status != 200:
            raise TrialFailed(f"GET {path} gave {response.status}: {response.read(200)!r}")
        return response

    def check_blob(self, repo: str, digest: str, size: int) -> None:
        """Reads a blob. Raises TrialFailed unless the blob has the size and the digest."""
        running, received = hashlib.sha256(), 0
        try:
            response = self.open_blob(repo, digest)
            while piece := response.read(BLOCK_SIZE):
                running.update(piece)
                received += len(piece)
        except (OSError, http.client.HTTPException) as error:
            raise TrialFailed(f"blob {digest}: {error!r}") from None
        check_content(digest, size, received, running.hexdigest())


def check_content(digest: str, size: int, received: int, computed: str) -> None:
    """Raises TrialFailed unless the received bytes have the blob's size and SHA-256. `computed`: the SHA-256 of the
    received bytes, in hex."""
    if received != size or f"sha256:{computed}" != digest:
        raise TrialFailed(f"blob {digest} of {size} bytes came as {received} bytes of sha256:{computed}")


def location_path(address: str) -> str:
    """Returns path and query of a Location header, which may be a whole URL or only a path."""
    parts = urlsplit(address)
    return f"{parts.path}?{parts.query}" if parts.query else parts.path
