"""`LiveApp`: the application of a worker, whose settings can change while it answers requests.

Each set of settings has an application of its own (`Entrepot`) with its own store, mirrors and caches. A change of the
settings opens a second application and then passes new requests to it. A request belongs to one application from its
start to its end. The old application is closed when its requests, jobs and downloads have ended. *Background work* is
what an application does without a request, such as garbage collection (`registry.background_work`).

The stores of two applications have the same data directory. File locks belong to an open file, not to a process, so the
locks of one store also exclude the other store in the same process.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable, Coroutine
from typing import Any

from registry.app import Entrepot
from registry.asgi import Receive, Scope, Send
from registry.backend import preload_optional_modules
from registry.config import Settings
from registry.http.answer_cache import CachedAnswer
from registry.log_output import set_log_level
from registry.server.process.lifespan import Lifespan

MakeApp = Callable[[Settings, bool], Entrepot]
"""Returns a new application with these settings. The caller starts it. The second argument says whether background
work begins when the application starts; if it is False, the caller begins the background work later."""
log = logging.getLogger("registry")


class _Application:
    """An application (`Entrepot`), and its lifespan, which starts and stops it."""

    def __init__(self, app: Entrepot) -> None:
        self.app = app
        self.lifespan = Lifespan(app)
        self.drained = asyncio.Event()
        """Set when the application gets no more requests and its last request has ended."""

    def begin_drain(self) -> None:
        """Sets `drained` when the last request has ended. Call this when the application gets no more requests."""
        self.app.on_idle = self.drained.set
        if not self.app.running_requests:
            self.drained.set()


class LiveApp:
    """An ASGI application that passes each request to the application with the settings in force. A change of the
    settings has two steps, so that either all workers change or none: `prepare`, and then `switch` or `discard`. Call
    all methods in one event loop."""

    def __init__(self, settings: Settings, make_app: MakeApp) -> None:
        self._make_app = make_app
        self._current = _Application(make_app(settings, True))
        self.request_recorder = self._current.app.request_recorder
        """The server reports each request to this object. All applications share it."""
        self._prepared: _Application | None = None
        self._server_state: dict[str, Any] = {}
        """The server's values in the lifespan state. Each application gets a copy."""
        self._old: dict[_Application, asyncio.Task[None]] = {}
        """Applications that get no requests any more, and the tasks that close them."""
        self._handover_lock = asyncio.Lock()
        """Held while background work stops in one application and starts in another."""

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        """Calls the application in force and returns its coroutine. Await the coroutine immediately: a request does not
        keep its application open until its coroutine has begun to run. `__call__` itself is not a coroutine function,
        because a second coroutine would cost time in each request."""
        if scope["type"] == "lifespan":
            self._server_state = scope.get("state", {})
            self._current.lifespan.state.update(self._server_state)
            return self._run(receive, send)
        return self._current.app(scope, receive, send)

    def answer_at_once(self, scope: Scope) -> tuple[CachedAnswer, str] | None:
        """Returns the cached response to the request, and the request id. Returns None if no response is cached (see
        `Entrepot.answer_at_once`)."""
        return self._current.app.answer_at_once(scope)

    async def prepare(self, configuration: bytes) -> None:
        """Starts an application with the pickled `Settings`, but not its background work. The current application
        continues to serve, even if the start fails. If another application is already prepared, closes that one first.
        Raises the errors of the start. After a cancellation, the new application is closed as soon as it has started.
        """
        await self.discard()
        settings: Settings = pickle.loads(configuration)  # safe, because it comes from the parent process
        await asyncio.to_thread(preload_optional_modules, settings)  # imports take a while
        prepared = _Application(self._make_app(settings, False))
        prepared.lifespan.state.update(self._server_state)
        starting = asyncio.create_task(prepared.lifespan.start(), name="start the application with the new settings")
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._close_in_background(prepared, self._close_unused(prepared, starting))
            raise
        self._prepared = prepared

    async def switch(self) -> None:
        """Passes all new requests to the prepared application. Starts a task that hands the background work over to the
        prepared application, and does not wait for the task, because a handover may take long on a slow disk. Does
        nothing if no application is prepared."""
        if self._prepared is None:
            return
        old, self._current, self._prepared = self._current, self._prepared, None
        old.begin_drain()
        old.app.is_retiring = True
        # The flag is for a service that the application opens later. For a service that is open already,
        # `_hand_over_work` starts the work.
        self._current.app.starts_background_work = True
        self._close_in_background(old, self._close_when_done(old, self._current))
        set_log_level(self._current.app.factory.settings.log_level)

    async def discard(self) -> None:
        """Closes the prepared application. Does nothing if there is none."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            await prepared.lifespan.stop()

    async def retire(self) -> None:
        """Leaves new background work to other processes. Call this before this process ends. Running jobs and downloads
        continue until the shutdown."""
        self._current.app.is_retiring = True
        async with self._handover_lock:
            if (work := self._current.app.work) is not None:
                await work.hand_over()

    async def finish(self) -> None:
        """Waits until the running jobs and downloads of all applications have ended. Call `retire` first."""
        for application in [*self._old, self._current]:
            if (work := application.app.work) is not None:
                await work.finish()

    def _close_in_background(self, application: _Application, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(closing, name="close an application")
        self._old[application] = task
        task.add_done_callback(lambda _: self._old.pop(application, None))

    async def _close_when_done(self, old: _Application, new: _Application) -> None:
        """Hands the background work of `old` over to `new`. Closes `old` when its requests, jobs and downloads have
        ended."""
        await self._hand_over_work(old, new)
        await old.drained.wait()
        try:
            if (work := old.app.work) is not None:
                await work.finish()
        except Exception:
            log.exception("the jobs of the application with the old settings failed")
        await self._close(old)

    async def _hand_over_work(self, old: _Application, new: _Application) -> None:
        """Stops new background work in `old`, and then starts it in `new`. If the settings change twice in short
        succession, the second handover waits for the first."""
        async with self._handover_lock:
            try:
                if (work := old.app.work) is not None:
                    await work.hand_over()
            except Exception:
                log.exception("the application with the old settings failed while it handed its work over")
            try:
                if (work := new.app.work) is not None and not new.app.is_retiring:
                    await work.start()
            except Exception:
                log.exception("the application with the new settings failed while it started its work")

    async def _close_unused(self, unused: _Application, starting: asyncio.Task[None]) -> None:
        """Closes an application that will not be used, when its start (`starting`) has succeeded."""
        await asyncio.wait([starting])
        if not starting.cancelled() and starting.exception() is None:
            await self._close(unused)

    async def _close(self, application: _Application) -> None:
        try:
            await application.lifespan.stop()
        except Exception:
            log.exception("an application whose settings are not in use failed while it was closed")
        application.app.release()

    async def _run(self, receive: Receive, send: Send) -> None:
        """The ASGI lifespan: starts the first application, and closes all applications at the end."""
        await receive()
        await self._current.lifespan.start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        # The old applications are closed below, without waiting for their requests.
        closing = dict(self._old)
        for task in closing.values():
            task.cancel()
        await asyncio.gather(*closing.values(), return_exceptions=True)
        stopping = (application.lifespan.stop() for application in [*closing, self._current])
        results: list[Any] = await asyncio.gather(self.discard(), *stopping, return_exceptions=True)
        await self._current.app.telemetry.aclose()
        for error in filter(None, results):
            raise error
        await send({"type": "lifespan.shutdown.complete"})
