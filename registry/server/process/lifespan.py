"""Starts and stops the application (ASGI lifespan protocol, version 2.0).

Unlike uvicorn's, raises the exception that made the start fail, so that one line can say why.
"""

from __future__ import annotations

import asyncio
from typing import Any

from registry.asgi import AsgiApp


class StartFailed(Exception):
    """The application refused to start. `message` says why, in one line."""

    def __init__(self, message: str) -> None:
        self.message = message
        super().__init__(message)


class Lifespan:
    """Runs the application's lifespan in its own task. Call `start`, then, once, `stop`."""

    def __init__(self, app: AsgiApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._events: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self._answer: asyncio.Future[str | None] | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the application is ready. Raises what its start-up raised, or StartFailed."""
        self._task = asyncio.create_task(self._run(), name="lifespan")
        failure = await self._ask("lifespan.startup")
        if failure is not None:
            await self._task  # Starlette says "failed" first and raises the reason then
            raise StartFailed(failure.strip().rpartition("\n")[2] or "the application refused to start")

    async def stop(self) -> None:
        """Tells the application to close, and waits for it. Raises what its shutdown raised."""
        if self._task is None or self._task.done():
            return
        await self._ask("lifespan.shutdown")
        await self._task

    async def _ask(self, event: str) -> str | None:
        """Sends one event, and waits for its answer or the end of the task. Returns the text of a `failed` answer, None
        after success. Raises what the application raised."""
        assert self._task is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._events.put_nowait({"type": event})
        waiting: set[asyncio.Future[Any]] = {self._answer, self._task}
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if self._answer.done():
            return self._answer.result()
        self._task.result()
        return None

    async def _run(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        await self._app(scope, self._events.get, self._send)

    async def _send(self, message: Any) -> None:
        if self._answer is not None and not self._answer.done():
            failed = message["type"].endswith(".failed")
            self._answer.set_result((message.get("message") or "") if failed else None)
