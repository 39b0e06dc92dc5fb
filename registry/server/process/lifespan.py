"""Starts and stops the application through the ASGI lifespan protocol, version 2.0."""

from __future__ import annotations

import asyncio
from typing import Any

from registry.asgi import AsgiApp


class StartFailed(Exception):
    """The application reported that it cannot start, and raised no exception. `message` is the reason in one line."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


class Lifespan:
    """Runs the application's lifespan in a task of its own. Call `start` once, and then `stop` once."""

    def __init__(self, app: AsgiApp) -> None:
        self.state: dict[str, Any] = {}
        """Values that the application stores when it starts, and reads in requests (ASGI: lifespan state)."""
        self._app = app
        self._events: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self._reply: asyncio.Future[str | None] | None = None
        """The application's reply to the last event. Its result is None for success, or the text of a failure. The
        attribute is None before the first event."""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the application reports that it is ready. Also returns if the application ends its lifespan, but
        neither replies nor raises an exception: this counts as a successful start. If the start fails, raises the
        application's exception; StartFailed if the application reports a failure and raises none."""
        self._task = asyncio.create_task(self._run(), name="lifespan")
        failure = await self._send_event("lifespan.startup")
        if failure is not None:
            await self._task  # Starlette first reports the failure, and then raises the exception
            last_line = failure.strip().rpartition("\n")[2]  # the last line of a traceback is the error
            raise StartFailed(last_line or "the application refused to start")

    async def stop(self) -> None:
        """Shuts the application down. Raises the exception that the application raises while it shuts down. Does
        nothing if the lifespan has not started or has ended."""
        if self._task is None or self._task.done():
            return
        await self._send_event("lifespan.shutdown")
        await self._task

    async def _send_event(self, event: str) -> str | None:
        """Sends one event to the application, and waits for the application's reply or the end of its task. Returns
        the text of a reported failure, otherwise None. Raises the exception that ended the task."""
        assert self._task is not None
        self._reply = asyncio.get_running_loop().create_future()
        self._events.put_nowait({"type": event})
        waiting: set[asyncio.Future[Any]] = {self._reply, self._task}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._reply.done():
            return self._reply.result()
        self._task.result()  # raises the exception of the task, if it had one
        return None

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        await self._app(scope, self._events.get, self._on_reply)

    async def _on_reply(self, message: Any) -> None:
        """Receives the application's reply to an event. The application calls it as `send`."""
        if self._reply is not None and not self._reply.done():
            has_failed = message["type"].endswith(".failed")
            self._reply.set_result((message.get("message") or "") if has_failed else None)
