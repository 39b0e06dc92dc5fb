"""Runs an ASGI application on listening sockets, in one or several processes, until a signal stops it."""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from registry.asgi import AsgiApp
from registry.log_output import end_output, flush_output
from registry.printable import printable_line
from registry.server.gate.listener import ListenerOptions
from registry.server.gate.tls_memory import tls_limits
from registry.server.kernel import raise_file_limit
from registry.server.memory_limit import memory_limit
from registry.server.process.live_change_options import LiveChangeOptions
from registry.server.process.single_process import SingleProcessReloads
from registry.server.process.supervisor import Supervisor
from registry.server.process.worker import Worker
from registry.server.process.worker_options import WorkerOptions
from registry.server.server_limits import ServerLimits
from registry.server.server_log import log, set_up_server_logging

_THREAD_JOIN_SECONDS = 2.0
"""How long the server waits for the application's threads after the event loop has ended. The exit of the process then
kills the remaining threads. No acknowledged data is lost: a request is acknowledged only when its data is on the
disk."""


def serve(
    make_app: Callable[[], AsgiApp],
    *,
    sockets: Sequence[socket.socket],
    workers: int,
    shutdown_grace: float,
    restart_grace: float = 3600.0,
    limits: ServerLimits | None = None,
    on_ready: Callable[[], None] | None = None,
    listener_options: ListenerOptions | None = None,
    change_options: LiveChangeOptions | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code: 0 after a stop by a signal, 1 if the server could not
    start. If the server could not start, prints the reason to stderr, in one line. Raises ValueError if `workers` is
    below 1.

    With several `workers`, this process becomes their supervisor: it forks the workers, and restarts workers that die.
    A single worker runs in this process, without a supervisor.

    - `make_app` is called in each worker, after the fork. The application must open its databases in its lifespan,
      because processes must not share a database that was opened before the fork. Import the application's modules
      before you call this function: the workers then share the memory of the modules.
    - `sockets`: listening sockets, which this function closes.
    - `shutdown_grace`: how many seconds requests in progress may continue after the signal.
    - `restart_grace`: how many seconds a worker that was replaced may continue to serve its connections.
    - `limits`: the limits of each worker. None: the defaults, with limits for TLS connections that depend on the memory
      of the machine.
    - `on_ready` is called once, in this process, when all workers accept connections.
    - `listener_options`: the options for the connections, such as the certificate.
    - `change_options`: the options for reloads and restarts of the running server.

    Call this function from the main thread, because it sets signal handlers.
    """
    if workers < 1:
        raise ValueError("there must be at least one worker")
    set_up_server_logging()
    raise_file_limit()
    listener_options, change_options = listener_options or ListenerOptions(), change_options or LiveChangeOptions()
    if limits is None:
        tls_connections, large_tls_connections = tls_limits(memory_limit(), workers)
        limits = ServerLimits(tls_connections=tls_connections, large_tls_connections=large_tls_connections)
    options = WorkerOptions(make_app, sockets, shutdown_grace, restart_grace, limits, listener_options)
    if workers > 1:
        gc.collect()
        # Excludes the present objects from garbage collection. A collection would write to their memory, and the kernel
        # would then copy the shared memory for each worker.
        gc.freeze()
        code, failure = Supervisor(options, workers, change_options, on_ready).run()
    else:
        if (limit := listener_options.per_address_limit) is not None:
            # `SharedCounters` is a table of counters. Each worker counts its connections in its own column of this
            # table. With several workers, the supervisor claims their columns. Here there is no supervisor, so this
            # process claims its own column.
            limit.set_own_column(limit.claim_column())
        reloads = SingleProcessReloads(change_options, on_ready or (lambda: None))
        worker = Worker(options, reloads.announce_ready, on_start=reloads.start)
        code, failure = worker.run()
        reloads.close()
        _join_threads(code)
    if failure:
        with suppress(OSError):
            print(printable_line(f"error: {failure}"), file=sys.stderr, flush=True)
    end_output()
    return code


def _join_threads(code: int) -> None:
    """Waits until the application's threads have ended. If a thread runs for more than `_THREAD_JOIN_SECONDS`, ends the
    process at once, with the exit code `code`: a normal exit would wait for the thread without a limit."""
    deadline = time.monotonic() + _THREAD_JOIN_SECONDS
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            log.warning("exiting although the thread %s is still busy", thread.name)
            logging.shutdown()
            flush_output()
            os._exit(code)
