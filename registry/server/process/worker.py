"""One worker: an event loop, the application, and the connections it has accepted."""

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
from types import FrameType
from typing import Any

from registry.server.asgi import AsgiApp
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

# What ending may take after the grace: cancelled requests, then the application's shutdown. The supervisor adds to it.
CANCEL_SECONDS = 1.0
CLOSE_SECONDS = 5.0


class Worker:
    """Serves in this process and thread. `run` returns the exit code and, for a failed start, the reason in a line."""

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
        """`alive` is a pipe's reading end whose writer is the parent: it is readable when the parent is gone."""
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
        tune_malloc()
        loop = self._loop = new_event_loop()
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
        self._watch(loop)
        self._refresh(settled=True)
        app = self._make_app()
        lifespan = Lifespan(app)
        starting = asyncio.create_task(lifespan.start())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            await asyncio.wait({starting}, timeout=self._grace)  # told to stop during the start: let it end in order
        if not starting.done():
            return
        starting.result()
        gc.collect()
        gc.freeze()  # later collections look at what comes and goes alone: all of this would take them 50 ms
        limit = self._connection_limit(loop)
        limit.warn_if_low()
        ticks = asyncio.create_task(self._tick(loop, limit))
        acceptors = self._listen(loop, app, lifespan.state, limit)
        self._on_ready()
        await stopping
        await self._drain(acceptors)
        ticks.cancel()
        await _close(lifespan)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        if self._alive is None:
            signal.signal(signal.SIGINT, self._on_interrupt)
        else:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
            loop.add_reader(self._alive, os._exit, 1)  # only the parent's end can make it readable
        if self._alive is None and self._listener_options.certificates is not None:
            loop.add_signal_handler(signal.SIGHUP, self._refresh, True)
        else:
            # Sent to the whole group when a terminal closes; only a parent has workers to renew.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))

    def _refresh(self, settled: bool = False) -> None:
        if self._listener_options.certificates is not None:
            self._listener_options.certificates.refresh(settled=settled)

    def _on_interrupt(self, number: int, _: FrameType | None) -> None:
        """Called by the interpreter, not by the loop, which one of its callbacks may hold up."""
        if self._interrupted or self._stop.is_set():
            os._exit(128 + number)  # asked twice: at once
        self._interrupted = True
        with suppress(RuntimeError):  # the loop is closed: the process is about to end
            self._loop.call_soon_threadsafe(self._stop.set)

    def _connection_limit(self, loop: asyncio.AbstractEventLoop) -> ConnectionLimit:
        return ConnectionLimit(self._state.connections, self._handshakes, self._state.tasks, loop.time)

    def _listen(
        self, loop: asyncio.AbstractEventLoop, app: AsgiApp, lifespan_state: dict[str, Any], limit: ConnectionLimit
    ) -> list[Acceptor]:
        worker = WorkerContext(
            app,
            loop,
            self._limits,
            UnsentBudget(self._limits.unsent_bytes, loop.time),
            self._state,
            lifespan_state,
            self._listener_options.proxies,
            limit,
        )

        def connection(on_lost: OnLost | None) -> RegistryProtocol:
            return RegistryProtocol(worker, on_lost)

        return [
            Acceptor(loop, sock, connection, self._listener_options, self._limits, limit, self._handshakes)
            for sock in self._sockets
        ]

    async def _tick(self, loop: asyncio.AbstractEventLoop, limit: ConnectionLimit) -> None:
        """Once a second: the Date header, every connection's time limits, and the open files. No read or write sets a
        timer. Now and then: whether the certificate was renewed."""
        looked = loop.time()
        memory = FreeMemory(loop, self._state.connections)
        while True:
            self._state.default_headers = [(b"date", formatdate(time.time(), usegmt=True).encode())]
            now = loop.time()
            for connection in list(self._state.connections):
                connection.check(now)
            limit.measure()
            memory.check(now)
            if now - looked >= self._limits.certificate_seconds:
                looked = now
                self._refresh()
            await asyncio.sleep(self._limits.pulse_seconds)

    async def _drain(self, acceptors: list[Acceptor]) -> None:
        """Takes no more connections, lets the requests in flight end within the grace, then cuts what is left."""
        for acceptor in acceptors:
            acceptor.close()
        until = time.monotonic() + self._grace
        while (self._state.connections or self._state.tasks) and time.monotonic() < until:
            for connection in list(self._state.connections):  # each time: one may have been accepted just before
                connection.shutdown()
            await asyncio.sleep(0.02)
        for connection in list(self._state.connections):
            connection.abort()
        tasks = set(self._state.tasks)
        if tasks:
            log.warning("cut %d requests that did not end within %g s", len(tasks), self._grace)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)


async def _close(lifespan: Lifespan) -> None:
    """Ends the application in order, if that takes no longer than it may. What goes on then is cancelled with the rest
    of the loop."""
    closing = asyncio.create_task(lifespan.stop())
    await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
    if not closing.done():
        log.warning("the application did not close within %g s", CLOSE_SECONDS)
    elif not closing.cancelled() and (error := closing.exception()) is not None:
        log.error("the application failed while closing", exc_info=error)


def _cancel_all_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Ends what is still going on in the loop; not what refuses to."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=CANCEL_SECONDS))


def describe_failure(error: BaseException) -> str:
    """One line for a person. What is no plain fault of the surroundings is a bug: its traceback goes to the log."""
    message = getattr(error, "message", None)
    if isinstance(message, str) and message:
        return " ".join(message.split())
    if isinstance(error, OSError):
        return " ".join(str(error).split())
    log.error("the start failed", exc_info=error)
    return f"the server could not start: {type(error).__name__}: {' '.join(str(error).split())}"
