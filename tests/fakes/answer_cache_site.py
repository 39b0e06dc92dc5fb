"""An application with a real store and an image, for tests of the response cache. The requests reach the application in
the same way as from our own server, which looks into the cache first. A response in this cache is called a *ready*
answer."""

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
"""Of this number of equal requests, at least one must be answered from the cache. The first requests may be answered
without it, because the application's own writes to the store can remove entries from the cache."""


class AnswerCacheSite:
    """The application, and the content of its store: the manifest `image`, and `blob`, the digest of one of its
    blobs."""

    def __init__(self, service: AppInProcess, folder: Path, image: Manifest) -> None:
        self.service = service
        self.folder = folder
        self.image = image
        self.blob = image.blobs[1].digest
        self.request = CachedAnswerClient(service.app)

    async def end_background_work(self) -> None:
        """Ends the work that the application does by itself. Otherwise it adds new content to the search index a second
        later, for example, and this write removes all answers from the cache."""
        work = self.service.app.service.work
        assert work is not None
        await work.hand_over()

    @asynccontextmanager
    async def other_process(self) -> AsyncIterator[StoredRegistry]:
        """Opens the data directory a second time, as another process would."""
        async with open_registry(self.folder) as registry:
            yield registry

    async def cached_answer(
        self, target: str, method: str = "GET", headers: dict[str, str] | None = None
    ) -> AsgiAnswer:
        """Sends the same request again and again until the response comes from the cache. Checks that all responses
        equal the first one."""
        first = await self.request(method, target, headers)
        for _ in range(MANY):
            repeated = await self.request(method, target, headers)
            assert plain(repeated) == plain(first)
            assert repeated["x-request-id"] != first["x-request-id"]
            if self.request.ready:
                return repeated
        raise AssertionError("no answer was ever ready")

    async def never_ready(self, target: str, method: str = "GET", headers: dict[str, str] | None = None) -> AsgiAnswer:
        """Sends the same request several times, and checks that no response comes from the cache. Returns the last
        response."""
        for _ in range(4):
            answer = await self.request(method, target, headers)
            assert not self.request.ready
        return answer

    def has_ready(self, target: str, headers: dict[str, str] | None = None) -> bool:
        """Returns whether the cache has a response to the request. Does not send the request to the application."""
        scope = {**scope_of("GET", target, headers or {}), "extensions": {CACHED_ANSWER_EXTENSION: {}}}
        return self.service.app.answer_at_once(scope) is not None


def plain(answer: AsgiAnswer) -> AsgiAnswer:
    """Returns the response without the header that differs between any two responses."""
    return replace(answer, fields=[field for field in answer.fields if field[0] != "x-request-id"])
