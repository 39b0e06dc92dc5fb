"""Plain HTTP to a registry: what fills it before a trial, and checks it."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self
from urllib.parse import urlsplit

from bench.errors import TrialFailed

HOST = "127.0.0.1"
REQUEST_TIMEOUT = 60.0
BLOCK_SIZE = 1 << 20
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


@dataclass(frozen=True)
class HttpResponse:
    """A whole response."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """One kept connection to a registry on this machine; a context manager."""

    def __init__(self, port: int, timeout: float = REQUEST_TIMEOUT) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=timeout, blocksize=BLOCK_SIZE)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | IO[bytes] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        expect: int,
    ) -> HttpResponse:
        """One request. Raises TrialFailed when the status is another one, or the connection breaks."""
        try:
            self._connection.request(method, path, body, dict(headers or {}))
            response = self._connection.getresponse()
            answer = HttpResponse(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise TrialFailed(f"{method} {path}: {error!r}") from None
        if answer.status != expect:
            raise TrialFailed(f"{method} {path} gave {answer.status}, not {expect}: {answer.body[:200]!r}")
        return answer

    def start_upload(self, repo: str) -> str:
        """A new upload session; the path and query its bytes go to."""
        return location_path(
            self.ask("POST", f"/v2/{repo}/blobs/uploads/", b"", expect=202).headers.get("location", "")
        )

    def close_upload(self, where: str, digest: str, body: bytes | IO[bytes] = b"", size: int = 0) -> None:
        """Ends a session with the PUT that names the digest; `size` bytes may come with it."""
        mark = "&" if "?" in where else "?"
        headers = {"Content-Length": str(size), "Content-Type": "application/octet-stream"}
        self.ask("PUT", f"{where}{mark}digest={digest}", body, headers, expect=201)

    def push_blob(self, repo: str, digest: str, content: bytes | Path) -> None:
        """Pushes content in two requests."""
        where = self.start_upload(repo)
        if isinstance(content, bytes):
            self.close_upload(where, digest, content, len(content))
            return
        with content.open("rb") as file:
            self.close_upload(where, digest, file, content.stat().st_size)

    def put_manifest(self, repo: str, reference: str, body: bytes) -> None:
        self.ask("PUT", f"/v2/{repo}/manifests/{reference}", body, {"Content-Type": MANIFEST_TYPE}, expect=201)

    def blob_digest(self, repo: str, digest: str) -> tuple[str, int]:
        """Reads a whole blob; the digest its bytes really have, and how many there are. Raises TrialFailed."""
        path, running, size = f"/v2/{repo}/blobs/{digest}", hashlib.sha256(), 0
        try:
            self._connection.request("GET", path)
            with contextlib.closing(self._connection.getresponse()) as response:
                if response.status != 200:
                    raise TrialFailed(f"GET {path} gave {response.status}")
                while piece := response.read(BLOCK_SIZE):
                    running.update(piece)
                    size += len(piece)
        except (OSError, http.client.HTTPException) as error:
            raise TrialFailed(f"GET {path}: {error!r}") from None
        return f"sha256:{running.hexdigest()}", size


def location_path(address: str) -> str:
    """Path and query of a Location, which may be a whole address or just a path."""
    parts = urlsplit(address)
    return f"{parts.path}?{parts.query}" if parts.query else parts.path
