"""Clients that send their body piece by piece, or do not read the answer."""

from __future__ import annotations

import asyncio
import json

from registry.asgi import Message
from registry.http import DistributionAPI
from registry.http.body_memory import BodyMemory
from registry.memory_budget import MemoryBudget
from storage.content import OCI_MANIFEST
from storage.memory_registry import MemoryRegistry
from tests.fakes.asgi_client import scope_of
from tests.unit.registry.conftest import V2, image

KIB = 1024
PUT = {"content-type": OCI_MANIFEST}
LARGE = 100 * KIB


def large_image(n: str = "") -> bytes:
    """Returns an image manifest of a bit more than LARGE bytes. Another `n` makes another manifest."""
    return image(annotations={"a": "x" * LARGE, "n": n})


class PiecewiseSender:
    """A client that sends its body piece by piece, when it is told to."""

    def __init__(self, api: object, body: bytes, name: str = "t", declared: bool = True) -> None:
        self.api = api
        headers = {**PUT, **({"content-length": str(len(body))} if declared else {"transfer-encoding": "chunked"})}
        self.scope = scope_of("PUT", f"{V2}/manifests/{name}", headers)
        self.left: bool = False
        self.scope["extensions"] = {"entrepot.body": {"receive": self._receive, "is_disconnected": lambda: self.left}}
        self.body = body
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.answer = b""
        self._pieces: asyncio.Queue[tuple[list[bytes], bool] | None] = asyncio.Queue()

    def start(self) -> asyncio.Task[None]:
        return asyncio.create_task(self.api(self.scope, self._messages, self._send))  # type: ignore[operator]

    def send(self, piece: bytes, *, more: bool = True) -> None:
        self._pieces.put_nowait(([piece], more))

    def send_all(self) -> None:
        self.send(self.body, more=False)

    def leave(self) -> None:
        self.left = True
        self._pieces.put_nowait(None)

    @property
    def message(self) -> str:
        return str(json.loads(self.answer)["errors"][0]["message"])

    async def _receive(self) -> tuple[list[bytes], bool] | None:
        return await self._pieces.get()

    async def _messages(self) -> Message:
        while await self._pieces.get() is not None:
            pass
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])
        else:
            self.answer += message["body"]


def api_of(registry: MemoryRegistry, intake: BodyMemory) -> DistributionAPI:
    """Returns the API over `registry`, with `intake` as the budgets for request bodies and responses."""
    return DistributionAPI(registry, body_memory=intake)


def budget(size: int, **more: float) -> MemoryBudget:
    """Returns a budget of `size` bytes for request bodies."""
    return MemoryBudget(size, "request bodies", **more)


class UnreadPut(PiecewiseSender):
    """A client that reads nothing of the response until `reads` is set."""

    def __init__(self, api: object, body: bytes, name: str = "t") -> None:
        super().__init__(api, body, name)
        self.reads = asyncio.Event()

    async def _send(self, message: Message) -> None:
        await super()._send(message)
        await self.reads.wait()
