"""Test clients for `/v2` that send or read slowly."""

from __future__ import annotations

import asyncio
import json

from registry.asgi import Message
from registry.http import DistributionAPI
from registry.http.body_memory import BodyMemory
from registry.memory_budget import SLOW_SECONDS, WAIT_SECONDS, MemoryBudget
from storage.content import OCI_MANIFEST
from storage.memory_registry import MemoryRegistry
from tests.fakes.asgi_client import scope_of
from tests.unit.registry.conftest import V2, image

KIB = 1024
HEADERS = {"content-type": OCI_MANIFEST}
LARGE = 100 * KIB
"""Size in bytes of a manifest that counts toward the memory budget for request bodies."""


def large_image(variant: str = "") -> bytes:
    """Returns an image manifest of a bit more than LARGE bytes, a different one for each `variant`."""
    return image(annotations={"a": "x" * LARGE, "n": variant})


class PiecewiseSender:
    """A client that puts a manifest. The test calls `send` for each piece of the body. `declared`: whether the request
    has a Content-Length."""

    def __init__(self, api: object, body: bytes, name: str = "t", declared: bool = True) -> None:
        self.api = api
        headers = {**HEADERS, **({"content-length": str(len(body))} if declared else {"transfer-encoding": "chunked"})}
        self.scope = scope_of("PUT", f"{V2}/manifests/{name}", headers)
        self.is_disconnected: bool = False
        self.scope["extensions"] = {
            "entrepot.body": {"receive": self._receive_pieces, "is_disconnected": lambda: self.is_disconnected}
        }
        self.body = body
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.answer = b""
        self._pieces: asyncio.Queue[tuple[list[bytes], bool] | None] = asyncio.Queue()

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.api(self.scope, self._receive_disconnect, self._send))  # type: ignore[operator]

    def send(self, piece: bytes, *, more: bool = True) -> None:
        self._pieces.put_nowait(([piece], more))

    def send_all(self) -> None:
        self.send(self.body, more=False)

    def leave(self) -> None:
        self.is_disconnected = True
        self._pieces.put_nowait(None)

    @property
    def message(self) -> str:
        return str(json.loads(self.answer)["errors"][0]["message"])

    async def _receive_pieces(self) -> tuple[list[bytes], bool] | None:
        return await self._pieces.get()

    async def _receive_disconnect(self) -> Message:
        """Discards pieces until the client disconnects."""
        while await self._pieces.get() is not None:
            pass
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.answer += message["body"]


def api_of(registry: MemoryRegistry, body_memory: BodyMemory) -> DistributionAPI:
    """Returns the API over `registry`."""
    return DistributionAPI(registry, body_memory=body_memory)


def budget(size: int, *, wait_seconds: float = WAIT_SECONDS, slow_seconds: float = SLOW_SECONDS) -> MemoryBudget:
    """Returns a budget of `size` bytes for request bodies."""
    return MemoryBudget(size, "request bodies", wait_seconds=wait_seconds, slow_seconds=slow_seconds)


class StalledReader(PiecewiseSender):
    """A client that does not read the response until the test sets `reads`."""

    def __init__(self, api: object, body: bytes, name: str = "t") -> None:
        super().__init__(api, body, name)
        self.reads = asyncio.Event()

    async def _send(self, message: Message) -> None:
        await super()._send(message)
        await self.reads.wait()
