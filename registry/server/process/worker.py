"""A worker: one event loop, the application, and the connections that this process has accepted."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from email.utils import formatdate
from functools import partial
from types import FrameType
from typing import Any

from registry.asgi import AsgiApp
from registry.server.connection.context import WorkerContext, WorkerState
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.gate.acceptor import Acceptor, Handshake, OnLost
from registry.server.gate.connection_limit import ConnectionLimit
from registry.server.gate.listener import ListenerOptions
from registry.server.kernel import tune_malloc
from registry.server.process.free_memory import FreeMemory
from registry.server.process.lifespan import Lifespan
from registry.server.server_limits import ServerLimits
from registry.server.server_log import LoopErrors, log

try:
    import uvloop
except ImportError:  # no wheel for this platform
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    new_event_loop = uvloop.new_event_loop

CANCEL_SECONDS = 1.0
"""For requests that were cancelled after the grace period."""
CLOSE_SECONDS = 5.0
"""For the application's shutdown after that."""
_DRAIN_STEP_SECONDS = 0.02


class Worker:
    """Serves in this process and thread."""

    def __init__(
        self,
        make_app: Callable[[], AsgiApp],
        sockets: Sequence[socket.socket],
        grace: float,
        limits: ServerLimits,
        on_ready: Callable[[], None],
        *,
        listener_options: ListenerOptions | None = None,
        alive: int | None = None,
    ) -> None:
        """`grace` is how many seconds requests in progress may go on after a stop. `on_ready` is called when the worker
        accepts connections. `alive` is the reading end of a pipe that only the parent can write to: it becomes readable
        when the parent is gone; None: there is no parent."""
        self._make_app = make_app
        self._sockets = sockets
        self._grace = grace
        self._limits = limits
        self._on_ready = on_ready
        self._listener_options = listener_options or ListenerOptions()
        self._alive = alive
        self._state = WorkerState()
        self._handshakes: set[Handshake] = set()
        self._stop = asyncio.Event()
        self._interrupted = False

    def run(self) -> tuple[int, str | None]:
        """Serves until it is told to stop. Returns the exit code and, after a failed start, the reason in one line."""
        tune_malloc()
        loop = new_event_loop()
        loop.set_exception_handler(LoopErrors())
        asyncio.set_event_loop(loop)
        try:
            loop.run_until_complete(self._serve(loop))
        except Exception as error:
            return 1, describe_failure(error)
        finally:
            _cancel_all_tasks(loop)
            asyncio.set_event_loop(None)
            loop.close()
        return 0, None

    async def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        self._handle_signals(loop)
        self._refresh_certificates(settled=True)
        app = self._make_app()
        lifespan = Lifespan(app)
        starting = asyncio.create_task(lifespan.start())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            await asyncio.wait({starting}, timeout=self._grace)  # a stop during the start: let it end in order
        if not starting.done():
            return
        starting.result()
        gc.collect()
        gc.freeze()  # later collections skip the objects made so far, which would take them 50 ms
        limit = ConnectionLimit(self._state.connections, self._handshakes, self._state.tasks, loop.time)
        limit.warn_if_low()
        ticks = asyncio.create_task(self._tick(loop, limit))
        acceptors = self._listen(loop, app, lifespan.state, limit)
        self._on_ready()
        await stopping
        await self._drain(acceptors)
        ticks.cancel()
        await _close(lifespan)

    def _handle_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        if self._alive is None:
            signal.signal(signal.SIGINT, partial(self._on_interrupt, loop))
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
            loop.add_reader(self._alive, os._exit, 1)  # it becomes readable only when the parent ends
        if self._alive is None and self._listener_options.certificates is not None:
            loop.add_signal_handler(signal.SIGHUP, self._refresh_certificates, True)
        else:
            # A terminal that closes sends it to the whole process group. Only a parent has workers to renew.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))

    def _refresh_certificates(self, settled: bool = False) -> None:
        if self._listener_options.certificates is not None:
            self._listener_options.certificates.refresh(settled=settled)

    def _on_interrupt(self, loop: asyncio.AbstractEventLoop, number: int, _: FrameType | None) -> None:
        """Stops; exits at once the second time. The interpreter calls it, so it works while a callback blocks the
        event loop."""
        if self._interrupted or self._stop.is_set():
            os._exit(128 + number)
        self._interrupted = True
        with suppress(RuntimeError):  # the loop is closed: the process is about to end
            loop.call_soon_threadsafe(self._stop.set)

    def _listen(
        self, loop: asyncio.AbstractEventLoop, app: AsgiApp, lifespan_state: dict[str, Any], limit: ConnectionLimit
    ) -> list[Acceptor]:
        worker = WorkerContext(
            app,
            loop,
            self._limits,
            UnsentBudget(self._limits.unsent_bytes, loop.time),
            state=self._state,
            lifespan_state=lifespan_state,
            proxies=self._listener_options.proxies,
            connection_limit=limit,
        )

        def connection(on_lost: OnLost | None) -> RegistryProtocol:
            return RegistryProtocol(worker, on_lost)

        return [
            Acceptor(loop, sock, connection, self._listener_options, self._limits, limit, self._handshakes)
            for sock in self._sockets
        ]

    async def _tick(self, loop: asyncio.AbstractEventLoop, limit: ConnectionLimit) -> None:
        """Once a second renews the Date header, checks each connection's timeouts, counts open files, and returns free
        memory. Every few seconds checks whether the certificate was renewed."""
        checked = loop.time()
        memory = FreeMemory(loop, self._state.connections)
        while True:
            self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
            now = loop.time()
            for connection in list(self._state.connections):
                connection.check(now)
            limit.measure()
            memory.check(now)
            if now - checked >= self._limits.certificate_seconds:
                checked = now
                self._refresh_certificates()
            await asyncio.sleep(self._limits.pulse_seconds)

    async def _drain(self, acceptors: list[Acceptor]) -> None:
        """Accepts no more connections, lets requests in progress end within the grace period, then cancels the rest."""
        for acceptor in acceptors:
            acceptor.close()
        until = time.monotonic() + self._grace
        while (self._state.connections or self._state.tasks) and time.monotonic() < until:
            for connection in list(self._state.connections):  # anew: one may have been accepted just before
                connection.shutdown()
            await asyncio.sleep(_DRAIN_STEP_SECONDS)
        for connection in list(self._state.connections):
            connection.abort()
        tasks = set(self._state.tasks)
        if tasks:
            log.warning("cut %d requests that did not end within %g s", len(tasks), self._grace)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)


async def _close(lifespan: Lifespan) -> None:
    """Waits for the application's shutdown for a bounded time. If it takes longer, it is cancelled with the loop."""
    closing = asyncio.create_task(lifespan.stop())
    await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
    if not closing.done():
        log.warning("the application did not close within %g s", CLOSE_SECONDS)
    elif not closing.cancelled() and (error := closing.exception()) is not None:
        log.error("the application failed while closing", exc_info=error)


def _cancel_all_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Cancels all tasks, and waits for them for a bounded time."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=CANCEL_SECONDS))


def describe_failure(error: BaseException) -> str:
    """Returns one line that says why the start failed. Anything but a reported problem or an OSError is a bug: its
    traceback goes to the log."""
    message = getattr(error, "message", None)
    if isinstance(message, str) and message:
        return " ".join(message.split())
    if isinstance(error, OSError):
        return " ".join(str(error).split())
    log.error("the start failed", exc_info=error)
    return f"the server could not start: {type(error).__name__}: {' '.join(str(error).split())}"
