"""A worker process: one event loop that runs the application and serves the connections of this process.

If there are several workers, a parent process, the *supervisor*, forks and stops them. A single worker has no
supervisor. A worker *retires* after another worker has replaced it: the retiring worker accepts no more connections,
and ends when its work is done.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

from registry.asgi import COUNTS_STATE, STOPPING_STATE, AsgiApp, ServerCounts
from registry.server.connection.context import Retirement, WorkerContext, WorkerState
from registry.server.connection.protocol import RegistryProtocol
from registry.server.connection.unsent_budget import UnsentBudget
from registry.server.gate.acceptor import Acceptor, OnLost, PendingConnection
from registry.server.gate.connection_limit import MAX_CONNECTIONS, ConnectionLimit
from registry.server.kernel import tune_malloc
from registry.server.process.commands import CommandReceiver
from registry.server.process.free_memory import make_full_collections_rare
from registry.server.process.lifespan import Lifespan
from registry.server.process.live_change import ChangeRefused, LiveApplication
from registry.server.process.maintenance import Maintenance, visit_in_steps
from registry.server.process.worker_options import WorkerOptions
from registry.server.server_log import LoopErrorHandler, log

try:
    import uvloop
except ImportError:  # uvloop does not support all platforms
    new_event_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop
else:
    new_event_loop = uvloop.new_event_loop

CANCEL_SECONDS = 1.0
"""How long the worker waits for cancelled tasks to end."""
CLOSE_SECONDS = 5.0
"""How long the application may take to shut down."""
_DRAIN_CHECK_SECONDS = 0.02
"""Interval at which a stopping worker checks whether its work is done."""
_RETIREMENT_CHECK_SECONDS = 0.1
"""Interval at which a retiring worker checks whether its work is done."""
PREPARE_SECONDS = 50.0
"""How long the application may take to prepare a new configuration. Other commands to the worker wait during this
time."""

RunCommand = Callable[[str, bytes], Awaitable[None]]
"""Runs a command in the worker. The arguments are the command's name and its payload."""
OnStart = Callable[[asyncio.AbstractEventLoop, RunCommand], Callable[[], None]]
"""A function that a worker without a supervisor calls when its application has started. The arguments are the event
loop and the function that runs commands. The result is a function that the worker calls when it begins to stop."""


class Worker:
    """Serves connections until it gets SIGTERM or the command `retire`, or until the supervisor ends. A worker without
    a supervisor also stops at SIGINT."""

    def __init__(
        self,
        options: WorkerOptions,
        on_ready: Callable[[], None],
        *,
        alive_pipe: int | None = None,
        commands: socket.socket | None = None,
        on_start: OnStart | None = None,
    ) -> None:
        """The worker closes `options.sockets` when it stops or retires. `on_ready` is called once, when the worker has
        begun to accept connections. `commands` is the channel for the supervisor's commands. `alive_pipe` is a
        file descriptor that becomes readable when the supervisor has ended: the reading end of a pipe. Without a
        supervisor, `commands` and `alive_pipe` are None."""
        self._options = options
        self._on_ready = on_ready
        self._alive_pipe = alive_pipe
        self._commands = commands
        self._on_start = on_start
        self._app: AsgiApp | None = None
        self._state = WorkerState()
        self._retirement = Retirement()
        self._pending: set[PendingConnection] = set()  # accepted connections that are still being set up
        self._stop = asyncio.Event()
        self._was_interrupted = False  # a first SIGINT has arrived
        self._max_connections: int | None = None  # not known before the application has started

    def run(self) -> tuple[int, str | None]:
        """Serves until the worker stops or retires. Returns (0, None), or (1, reason) after a failure. The reason is
        one line."""
        tune_malloc()
        loop = new_event_loop()
        loop.set_exception_handler(LoopErrorHandler())
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
        """Starts the application, serves connections, and shuts down. Raises the error if the start fails."""
        self._handle_signals(loop)
        self._reload_certificates()  # the files may have changed since the server's start
        self._app = app = self._options.make_app()
        lifespan = Lifespan(app)
        lifespan.state[STOPPING_STATE] = self._stop
        lifespan.state[COUNTS_STATE] = self._counts
        starting = asyncio.create_task(lifespan.start())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            # SIGTERM or SIGINT has arrived during the start. The application can be shut down only after its start.
            await asyncio.wait({starting}, timeout=self._options.grace_seconds)
        if not starting.done():
            return  # `run` cancels the start
        starting.result()
        make_full_collections_rare()  # garbage collections of Python
        certificates = self._options.listener_options.certificates
        max_connections = MAX_CONNECTIONS if certificates is None else self._options.limits.tls_connections
        limit = ConnectionLimit(
            self._state.connections, self._pending, self._state.tasks, loop.time, max_connections=max_connections
        )
        limit.warn_if_low()
        self._max_connections = limit.capacity
        maintenance = Maintenance(loop, self._state, self._options.limits, limit, certificates)
        maintenance.start()
        receiver = None if self._commands is None else CommandReceiver(loop, self._commands, self.run_command)
        on_stop = None if self._on_start is None else self._on_start(loop, self.run_command)
        acceptors = self._listen(loop, app, lifespan.state, limit)
        self._on_ready()
        retiring = asyncio.create_task(self._retirement.wait())
        await asyncio.wait({retiring, stopping}, return_when=asyncio.FIRST_COMPLETED)
        retiring.cancel()
        if not self._stop.is_set():
            await self._retire(acceptors)
        for close in (receiver.close if receiver is not None else None, on_stop):
            if close is not None:
                close()
        await self._drain(acceptors)
        maintenance.stop()
        await _shut_down(lifespan)

    def _counts(self) -> ServerCounts:
        """Returns the numbers of connections and requests, for the application's status report."""
        state = self._state
        return ServerCounts(
            len(state.connections), self._max_connections, requests=len(state.tasks), answered=state.total_requests
        )

    def _handle_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sets the signal handlers, and makes the worker exit when the supervisor has ended."""
        loop.add_signal_handler(signal.SIGTERM, self._stop.set)
        if self._alive_pipe is None:
            signal.signal(signal.SIGINT, partial(self._on_interrupt, loop))
        else:
            # Ctrl-C sends SIGINT to the supervisor as well. The supervisor then stops its workers with SIGTERM.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            loop.add_reader(self._alive_pipe, os._exit, 1)  # the pipe becomes readable when the supervisor has ended
        # These signals must not end a worker. In a worker without a supervisor, `on_start` replaces these handlers.
        for signal_number in (signal.SIGHUP, signal.SIGUSR2):
            signal.signal(signal_number, signal.SIG_IGN)
        # The supervisor blocks these signals while it forks a worker.
        blocked = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2, signal.SIGCHLD)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    def _reload_certificates(self) -> None:
        """Reloads the TLS certificate if its files have changed. Call this only when the files are completely
        written."""
        if self._options.listener_options.certificates is not None:
            self._options.listener_options.certificates.refresh(are_files_complete=True)

    def _on_interrupt(self, loop: asyncio.AbstractEventLoop, signal_number: int, _: FrameType | None) -> None:
        """Stops the worker gracefully at the first SIGINT. A second SIGINT, or a SIGINT while the worker stops, ends
        the process at once. The interpreter calls this function even while the event loop is blocked."""
        if self._was_interrupted or self._stop.is_set():
            os._exit(128 + signal_number)
        self._was_interrupted = True
        with suppress(RuntimeError):  # the loop is closed if the worker has stopped
            loop.call_soon_threadsafe(self._stop.set)

    def _listen(
        self, loop: asyncio.AbstractEventLoop, app: AsgiApp, lifespan_state: dict[str, Any], limit: ConnectionLimit
    ) -> list[Acceptor]:
        """Accepts connections on all listening sockets."""
        context = WorkerContext(
            app,
            loop,
            self._options.limits,
            UnsentBudget(self._options.limits.unsent_bytes, self._options.limits.unsent_wait_seconds, loop.time),
            state=self._state,
            lifespan_state=lifespan_state,
            proxies=self._options.listener_options.proxies,
            connection_limit=limit,
            retirement=self._retirement,
        )

        def make_protocol(on_lost: OnLost | None) -> RegistryProtocol:
            return RegistryProtocol(context, on_lost)

        listener, limits = self._options.listener_options, self._options.limits
        on_refused = context.reports.report_refused_connection
        return [
            Acceptor(loop, sock, make_protocol, listener, limits, limit, self._pending, on_refused)
            for sock in self._options.sockets
        ]

    async def run_command(self, name: str, payload: bytes) -> None:
        """Runs a command:

        - `retire` begins the worker's retirement.
        - `prepare` and `discard` call the method with this name of a `LiveApplication`. For any other application, they
          do nothing.
        - `switch` reloads the certificates, and then calls the method `switch` of a `LiveApplication`.

        Raises ChangeRefused if the method `prepare` takes longer than `PREPARE_SECONDS`. Raises the application's own
        exceptions."""
        app = self._app if isinstance(self._app, LiveApplication) else None
        if name == "retire":
            self._retirement.begin()
        elif name == "switch":
            self._reload_certificates()
            if app is not None:
                await app.switch()
        elif app is not None and name == "discard":
            await app.discard()
        elif app is not None and name == "prepare":
            try:
                async with asyncio.timeout(PREPARE_SECONDS):
                    await app.prepare(payload)
            except TimeoutError:
                raise ChangeRefused(
                    f"a worker could not open the new configuration within {PREPARE_SECONDS:g} s"
                ) from None

    async def _retire(self, acceptors: list[Acceptor]) -> None:
        """Answers one more request on each connection, and waits for the application's background work. An idle
        connection stays open until its timeout, because the client may be sending a request. Returns in these cases:

        - All connections, requests and background work have ended.
        - The worker is told to stop.
        - `retire_seconds` have passed."""
        for acceptor in acceptors:
            acceptor.close()
        app = self._app if isinstance(self._app, LiveApplication) else None
        work = None if app is None else asyncio.create_task(_finish_work(app))
        deadline = time.monotonic() + self._options.retire_seconds
        while self._state.connections or self._state.tasks or self._pending or not (work is None or work.done()):
            if self._stop.is_set() or time.monotonic() >= deadline:
                break
            await visit_in_steps(self._state.connections, lambda connection: connection.retire())
            await asyncio.sleep(_RETIREMENT_CHECK_SECONDS)
        if work is not None:
            work.cancel()
            await asyncio.wait({work})

    async def _drain(self, acceptors: list[Acceptor]) -> None:
        """Accepts no more connections, and closes each connection after its requests. After the grace period, cuts off
        the remaining connections and requests."""
        for acceptor in acceptors:
            acceptor.close()
        if self._options.listener_options.certificates is not None:
            # Ends TLS handshakes. This loses no request, because a client sends requests only after the handshake.
            await visit_in_steps(self._pending, lambda connection: connection.evict())
        deadline = time.monotonic() + self._options.grace_seconds
        while (self._state.connections or self._state.tasks) and time.monotonic() < deadline:
            # Repeated, because a connection that is still being set up is added to `connections` later.
            await visit_in_steps(self._state.connections, lambda connection: connection.shutdown())
            await asyncio.sleep(_DRAIN_CHECK_SECONDS)
        await visit_in_steps(self._state.connections, lambda connection: connection.abort())
        tasks = set(self._state.tasks)
        if tasks:
            log.warning("cut off %d requests that did not end within %g s", len(tasks), self._options.grace_seconds)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_SECONDS)


async def _finish_work(app: LiveApplication) -> None:
    """Hands the application's background work over to other processes: the application starts no more background work.
    Then waits for the background work that is running. Logs an error instead of raising it: the shutdown of the
    application ends the work in any case."""
    try:
        await app.retire()
        await app.finish()
    except Exception:
        log.exception("the application failed while it handed its work over")


async def _shut_down(lifespan: Lifespan) -> None:
    """Shuts down the application, and logs a failure. If the shutdown takes longer than `CLOSE_SECONDS`, returns while
    the shutdown is still running. `Worker.run` then cancels the shutdown."""
    closing = asyncio.create_task(lifespan.stop())
    await asyncio.wait({closing}, timeout=CLOSE_SECONDS)
    if not closing.done():
        log.warning("the application did not shut down within %g s", CLOSE_SECONDS)
    elif not closing.cancelled() and (error := closing.exception()) is not None:
        log.error("the application failed while shutting down", exc_info=error)


def _cancel_all_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Cancels all tasks of the loop, and waits up to `CANCEL_SECONDS` for their end."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=CANCEL_SECONDS))


def describe_failure(error: BaseException) -> str:
    """Returns one line that says why the server failed. OSErrors and errors with a `message` are expected. Any other
    error is a bug, so its traceback is logged."""
    message = getattr(error, "message", None)
    if isinstance(message, str) and message:
        return " ".join(message.split())
    if isinstance(error, OSError):
        return " ".join(str(error).split())
    log.error("the server failed", exc_info=error)
    return f"the server could not start: {type(error).__name__}: {' '.join(str(error).split())}"
