"""`LiveApp`: the application of a worker, whose settings can change while it answers requests.

Each set of settings has an application of its own (`Entrepot`) with its own store, mirrors and caches. A change of the
settings opens a second application and then passes new requests to it. A request belongs to one application from its
start to its end. The old application is closed when its requests, jobs and downloads have ended.

Two stores in one process exclude each other like those of two processes, because their locks belong to open files.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable
from typing import Any

from registry.app import Entrepot
from registry.asgi import Receive, Scope, Send
from registry.backend import preload_mirrors
from registry.config import Settings
from registry.http.answer_cache import CachedAnswer
from registry.log_output import set_log_level
from registry.server.process.lifespan import Lifespan
from registry.telemetry.request_recorder import RequestEnd

MakeApp = Callable[[Settings, bool], Entrepot]
"""Returns the application for some settings, not started. The second argument is `starts_work` of `Entrepot`."""
log = logging.getLogger("registry")


class _Running:
    """A started application, and the number of its requests in progress."""

    def __init__(self, app: Entrepot) -> None:
        self.app = app
        self.lifespan = Lifespan(app)
        self.requests = 0
        self.is_replaced = False
        self.has_no_requests = asyncio.Event()
        """Set when the application has been replaced and its last request has ended."""

    def end_request(self) -> None:
        self.requests -= 1
        if self.is_replaced and not self.requests:
            self.has_no_requests.set()

    def replace(self) -> None:
        """Says that the application gets no more requests."""
        self.is_replaced = True
        if not self.requests:
            self.has_no_requests.set()


class LiveApp:
    """An ASGI application that passes each request to the application with the settings in force. A change has two
    steps, so that all workers change or none: `prepare`, and then `switch` or `discard`. Used from one event loop."""

    def __init__(self, settings: Settings, make_app: MakeApp) -> None:
        self._make_app = make_app
        self._current = _Running(make_app(settings, True))
        self._prepared: _Running | None = None
        self._server_state: dict[str, Any] = {}
        """What the server gives the application in the lifespan state; each of the applications gets it."""
        self._old: dict[_Running, asyncio.Task[None]] = {}
        """Replaced applications, and the tasks that close them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._server_state = scope.get("state", {})
            self._current.lifespan.state.update(self._server_state)
            await self._run(receive, send)
            return
        running = self._current
        running.requests += 1
        try:
            await running.app(scope, receive, send)
        finally:
            running.end_request()

    def answer_at_once(self, scope: Scope) -> tuple[CachedAnswer, str] | None:
        """Returns a cached response (see `Entrepot.answer_at_once`)."""
        return self._current.app.answer_at_once(scope)

    def on_cached_answer(self, scope: Scope, answer: CachedAnswer, request_id: str) -> None:
        """Counts and logs a request (see `Entrepot.on_cached_answer`)."""
        self._current.app.on_cached_answer(scope, answer, request_id)

    def on_request_end(self, scope: Scope | None, end: RequestEnd) -> None:
        """Counts and logs a request (see `Entrepot.on_request_end`). All applications share what they count."""
        self._current.app.on_request_end(scope, end)

    def on_connection(self, change: int) -> None:
        """Counts a connection (see `Entrepot.on_connection`)."""
        self._current.app.on_connection(change)

    async def prepare(self, configuration: bytes) -> None:
        """Starts an application with the pickled `Settings`, beside the current one. Its work beside requests does not
        start yet. Raises what the start raises; the current application goes on. Replaces an application that was
        prepared before. After a cancellation, the started application ends with the event loop."""
        await self.discard()
        settings: Settings = pickle.loads(configuration)  # from the parent process
        await asyncio.to_thread(preload_mirrors, settings)  # imports take a while
        prepared = _Running(self._make_app(settings, False))
        prepared.lifespan.state.update(self._server_state)
        await prepared.lifespan.start()
        self._prepared = prepared

    async def switch(self) -> None:
        """Passes all new requests to the prepared application, and leaves the work beside requests to it. Does nothing
        if no application is prepared."""
        if self._prepared is None:
            return
        old, self._current, self._prepared = self._current, self._prepared, None
        old.replace()
        old.app.is_retiring = True
        set_log_level(self._current.app.factory.settings.log_level)
        if (work := old.app.service.work) is not None:
            await work.hand_over()
        if (work := self._current.app.service.work) is not None:
            await work.start()
        task = asyncio.create_task(self._close_when_done(old), name="close the application with the old settings")
        self._old[old] = task
        task.add_done_callback(lambda _: self._old.pop(old, None))

    async def discard(self) -> None:
        """Closes the prepared application. Does nothing if there is none."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            await prepared.lifespan.stop()

    async def retire(self) -> None:
        """Leaves the work beside requests to other processes, because this one is about to end. Running jobs and
        downloads go on until the shutdown."""
        self._current.app.is_retiring = True
        if (work := self._current.app.service.work) is not None:
            await work.hand_over()

    async def finish(self) -> None:
        """Waits until the running jobs and downloads of all applications have ended. Call `retire` first."""
        for running in [*self._old, self._current]:
            if (work := running.app.service.work) is not None:
                await work.finish()

    async def _close_when_done(self, old: _Running) -> None:
        """Closes a replaced application, once its requests, jobs and downloads have ended."""
        await old.has_no_requests.wait()
        if (work := old.app.service.work) is not None:
            await work.finish()
        try:
            await old.lifespan.stop()
        except Exception:
            log.exception("the application with the old settings failed while it was closed")

    async def _run(self, receive: Receive, send: Send) -> None:
        """The ASGI lifespan: starts the first application, and closes all applications at the end."""
        await receive()
        await self._current.lifespan.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        closing = dict(self._old)
        for task in closing.values():
            task.cancel()
        await asyncio.gather(*closing.values(), return_exceptions=True)
        await self.discard()
        results: list[Any] = await asyncio.gather(
            *(running.lifespan.stop() for running in [*closing, self._current]), return_exceptions=True
        )
        await self._current.app.telemetry.aclose()
        for error in filter(None, results):
            raise error
        await send({"type": "lifespan.shutdown.complete"})
