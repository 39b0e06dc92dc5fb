"""`LiveApp`: the application of a worker, whose settings can change while it answers requests.

Each set of settings has an application of its own (`Entrepot`) with its own store, mirrors and caches. A change of the
settings starts a second application, which gets all new requests. The old application still answers the requests that
it has begun, and is closed when its requests, jobs and downloads have ended. *Background work* is what an application
does without a request, such as garbage collection (`registry.background_work`).

Two applications of one process open the same data directory. Their file locks still exclude each other, because a file
lock belongs to an open file, not to a process.
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
"""A function that returns a new application with the given settings. The caller starts the application. The second
argument says whether the start of the application also starts its background work. If it is False, the caller starts
the background work later."""
log = logging.getLogger("registry")


class _AppWithLifespan:
    """An application (`Entrepot`) with its lifespan, the object that starts and stops the application."""

    def __init__(self, app: Entrepot) -> None:
        self.app = app
        self.lifespan = Lifespan(app)
        self.drained = asyncio.Event()
        """Set when the application gets no more requests and its last request has ended."""

    def begin_drain(self) -> None:
        """Sets `drained` as soon as the application has no running requests: in this call, or when the last request
        ends. Call this when the application gets no more requests."""
        self.app.on_idle = self.drained.set
        if not self.app.running_requests:
            self.drained.set()


class LiveApp:
    """An ASGI application that passes each request to the *current* application: the one with the settings in force. To
    change the settings, call `prepare` in all workers. If it succeeds in all workers, call `switch` in all of them;
    otherwise call `discard`. Call all methods in one event loop."""

    def __init__(self, settings: Settings, make_app: MakeApp) -> None:
        self._make_app = make_app
        self._current = _AppWithLifespan(make_app(settings, True))
        self.request_recorder = self._current.app.request_recorder
        """The server reports each request to this object. All applications share it."""
        self._prepared: _AppWithLifespan | None = None
        self._server_state: dict[str, Any] = {}
        """The values that the server stored in the lifespan state (ASGI). Each application gets a copy."""
        self._old: dict[_AppWithLifespan, asyncio.Task[None]] = {}
        """Applications that get no requests any more, and the tasks that close them."""
        self._handover_lock = asyncio.Lock()
        """Held while background work stops in one application and starts in another."""

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Coroutine[Any, Any, None]:
        """Calls the current application and returns its coroutine. Await the coroutine immediately, because the
        application could be closed before the coroutine begins to run. `__call__` itself is not a coroutine function,
        because a second coroutine would cost time in each request."""
        if scope["type"] == "lifespan":
            self._server_state = scope.get("state", {})
            self._current.lifespan.state.update(self._server_state)
            return self._run_lifespan(receive, send)
        return self._current.app(scope, receive, send)

    def answer_at_once(self, scope: Scope) -> tuple[CachedAnswer, str] | None:
        """Returns the cached response to the request, and the request id. Returns None if no response is cached (see
        `Entrepot.answer_at_once`)."""
        return self._current.app.answer_at_once(scope)

    async def prepare(self, configuration: bytes) -> None:
        """Starts a new application without its background work. `configuration`: the pickled `Settings`. First closes
        an application that is already prepared. The current application continues to serve. Raises the errors of the
        start. After a cancellation, the new application is closed as soon as it has started."""
        await self.discard()
        settings: Settings = pickle.loads(configuration)  # safe, because it comes from the parent process
        await asyncio.to_thread(preload_optional_modules, settings)  # imports take a while
        prepared = _AppWithLifespan(self._make_app(settings, False))
        prepared.lifespan.state.update(self._server_state)
        starting = asyncio.create_task(prepared.lifespan.start(), name="start the application with the new settings")
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            self._close_in_background(prepared, self._close_unused(prepared, starting))
            raise
        self._prepared = prepared

    async def switch(self) -> None:
        """Passes all new requests to the prepared application. A task then hands the background work over to this
        application. `switch` does not wait for the task, because a handover may take long on a slow disk. Does nothing
        if no application is prepared."""
        if self._prepared is None:
            return
        old, self._current, self._prepared = self._current, self._prepared, None
        old.begin_drain()
        old.app.is_retiring = True
        # `_hand_over_work` starts the background work. But if the application had to open its store read-only, such as
        # on a full disk, the application opens the store again later. The flag makes the application start the
        # background work then.
        self._current.app.starts_background_work = True
        self._close_in_background(old, self._close_when_done(old, self._current))
        set_log_level(self._current.app.factory.settings.log_level)

    async def discard(self) -> None:
        """Closes the prepared application. Does nothing if there is none."""
        prepared, self._prepared = self._prepared, None
        if prepared is not None:
            await prepared.lifespan.stop()

    async def retire(self) -> None:
        """Starts no more background work, so that other processes take it over. Call this before this process ends.
        Running jobs and downloads continue until the shutdown."""
        self._current.app.is_retiring = True
        async with self._handover_lock:
            if (work := self._current.app.work) is not None:
                await work.hand_over()

    async def finish(self) -> None:
        """Waits until the running jobs and downloads of all applications have ended. Call `retire` first."""
        for application in [*self._old, self._current]:
            if (work := application.app.work) is not None:
                await work.finish()

    def _close_in_background(self, application: _AppWithLifespan, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(closing, name="close an application")
        self._old[application] = task
        task.add_done_callback(lambda _: self._old.pop(application, None))

    async def _close_when_done(self, old: _AppWithLifespan, new: _AppWithLifespan) -> None:
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

    async def _hand_over_work(self, old: _AppWithLifespan, new: _AppWithLifespan) -> None:
        """Makes `old` start no more background work, and then starts the background work of `new`. Waits until an
        earlier handover has ended."""
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

    async def _close_unused(self, unused: _AppWithLifespan, starting: asyncio.Task[None]) -> None:
        """Waits until the start of an application that will not be used has ended (`starting`). If the start has
        succeeded, closes the application."""
        await asyncio.wait([starting])
        if not starting.cancelled() and starting.exception() is None:
            await self._close(unused)

    async def _close(self, application: _AppWithLifespan) -> None:
        try:
            await application.lifespan.stop()
        except Exception:
            log.exception("an application whose settings are not in use failed while it was closed")
        application.app.release()

    async def _run_lifespan(self, receive: Receive, send: Send) -> None:
        """Handles the ASGI lifespan: starts the first application, and closes all applications at the end."""
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
