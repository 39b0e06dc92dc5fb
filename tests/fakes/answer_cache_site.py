"""An application over a real store with an image in it, asked as a server does that asks for ready answers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from registry.http.answer_cache import CACHED_ANSWER_EXTENSION
from storage.composition import open_registry
from storage.content import Manifest
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.app_in_process import AppInProcess
from tests.fakes.asgi_client import AsgiAnswer, CachedAnswerClient, scope_of

APP = RepositoryName("team/app")
V2 = "/v2/team/app"
TAG = f"{V2}/manifests/latest"
MANY = 20
"""Requests until one has to be ready: what the application writes by itself may come between."""


class AnswerCacheSite:
    """`image` and `blob` are what is there."""

    def __init__(self, service: AppInProcess, folder: Path, image: Manifest) -> None:
        self.service = service
        self.folder = folder
        self.image = image
        self.blob = image.blobs[1].digest
        self.ask = CachedAnswerClient(service.app)

    @asynccontextmanager
    async def beside(self) -> AsyncIterator[StoredRegistry]:
        """The same data directory, opened once more, as another process does it."""
        async with open_registry(self.folder) as registry:
            yield registry

    async def ready(self, target: str, method: str = "GET", headers: dict[str, str] | None = None) -> AsgiAnswer:
        """A ready answer, which is the one that was found out before."""
        found = await self.ask(method, target, headers)
        for _ in range(MANY):
            again = await self.ask(method, target, headers)
            assert plain(again) == plain(found)
            assert again["x-request-id"] != found["x-request-id"]
            if self.ask.ready:
                return again
        raise AssertionError("no answer was ever ready")

    async def never_ready(self, target: str, method: str = "GET", headers: dict[str, str] | None = None) -> AsgiAnswer:
        for _ in range(4):
            answer = await self.ask(method, target, headers)
            assert not self.ask.ready
        return answer

    def has_ready(self, target: str, headers: dict[str, str] | None = None) -> bool:
        """Whether there is an answer, without asking for one where there is none."""
        scope = {**scope_of("GET", target, headers or {}), "extensions": {CACHED_ANSWER_EXTENSION: {}}}
        return self.service.app.answer_at_once(scope) is not None


def plain(answer: AsgiAnswer) -> AsgiAnswer:
    """Without what is new each time."""
    return replace(answer, fields=[field for field in answer.fields if field[0] != "x-request-id"])
