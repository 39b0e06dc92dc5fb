"""Clients with persistent connections, for tests that no request is lost while the server changes.

The server may close a connection only after a response with `Connection: close`. In every other case the client raises
an error: after a reset, an end without a response, or a refused connection.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Self

PARTS = 6
"""The number of parts in which a client sends each request body."""


class LiveConnection:
    """A persistent connection. It is opened again only after the server has announced with `Connection: close` that it
    closes the connection."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.opened = 0
        """How many connections were opened so far."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._close()

    async def ask(
        self, method: str, target: str, body: bytes = b"", *, slow: float = 0.0, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Sends a request and returns status, headers and body of its response. `slow`: the pause in seconds between
        the parts of the body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            self.opened += 1
        reader, writer = self._streams
        lines = [f"{method} {target} HTTP/1.1", "Host: live", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n")
        part_bytes = max(1, len(body) // PARTS)
        for start in range(0, len(body), part_bytes):
            writer.write(body[start : start + part_bytes])
            if slow:
                await writer.drain()
                await asyncio.sleep(slow)
        await writer.drain()
        status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        response_headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
        length = 0 if method == "HEAD" else int(response_headers.get("content-length", "0"))
        answer = await reader.readexactly(length)
        if response_headers.get("connection") == "close":
            self._close()
        return int(status.split()[1]), response_headers, answer

    def _close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def push(connection: LiveConnection, name: str, data: bytes, *, slow: float = 0.0) -> None:
    """Pushes a blob, whose bytes are sent in two requests, and a manifest. `slow`: the pause in seconds between the
    parts of the blob."""
    half = len(data) // 2
    status, headers, _ = await connection.ask("POST", f"/v2/{name}/blobs/uploads/")
    assert status == 202
    status, headers, _ = await connection.ask("PATCH", headers["location"], data[:half], slow=slow)
    assert status == 202
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    separator = "&" if "?" in headers["location"] else "?"
    target = f"{headers['location']}{separator}digest={digest}"
    status, _, _ = await connection.ask("PUT", target, data[half:], slow=slow)
    assert status == 201
    media_type = "application/vnd.oci.image.manifest.v1+json"
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": len(data)}
    manifest = json.dumps({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": []}).encode()
    status, _, _ = await connection.ask("PUT", f"/v2/{name}/manifests/latest", manifest, Content_Type=media_type)
    assert status == 201
