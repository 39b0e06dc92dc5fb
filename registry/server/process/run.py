"""Runs an application on listening sockets until the process is told to stop."""

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
from registry.server.gate.listener import ListenerOptions
from registry.server.kernel import raise_file_limit
from registry.server.process.supervisor import Supervisor
from registry.server.process.worker import Worker
from registry.server.server_limits import ServerLimits
from registry.server.server_log import log, set_up_server_logging

_THREAD_JOIN_SECONDS = 2.0
"""How long the application's threads may take to end after the event loop has. They hold nothing acknowledged."""


def serve(
    make_app: Callable[[], AsgiApp],
    *,
    sockets: Sequence[socket.socket],
    workers: int,
    shutdown_grace: float,
    limits: ServerLimits | None = None,
    on_ready: Callable[[], None] | None = None,
    listener_options: ListenerOptions | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT. Returns the exit code: 0 after an orderly stop, 1 after a failed start.

    Calls `make_app` in each worker, after the fork; databases are to be opened in the application's lifespan. Modules
    it needs should be imported before, in the parent: the workers share their pages. Calls `on_ready` once, in the
    parent, when all workers accept requests. `shutdown_grace` is how many seconds requests in progress may go on.

    A single worker runs in this process, without a supervisor, to save memory. To be called from the main thread.
    Closes the sockets. Prints one line to stderr if the start fails.
    """
    if workers < 1:
        raise ValueError("there must be at least one worker")
    set_up_server_logging()
    raise_file_limit()
    limits, listener_options = limits or ServerLimits(), listener_options or ListenerOptions()
    if workers > 1:
        gc.collect()
        gc.freeze()  # a garbage collection would write to pages that the workers share, and so copy them
        code, failure = Supervisor(make_app, sockets, workers, shutdown_grace, limits, on_ready, listener_options).run()
    else:
        if (limit := listener_options.per_address_limit) is not None:
            limit.use_column(limit.claim_column())
        ready = on_ready or (lambda: None)
        worker = Worker(make_app, sockets, shutdown_grace, limits, ready, listener_options=listener_options)
        code, failure = worker.run()
        _end_threads(code)
    if failure:
        with suppress(OSError):
            print(f"error: {failure}", file=sys.stderr, flush=True)
    end_output()
    return code


def _end_threads(code: int) -> None:
    """Exits here if a thread of the application is stuck: the interpreter would wait for it for ever."""
    until = time.monotonic() + _THREAD_JOIN_SECONDS
    for thread in threading.enumerate():
        if thread is threading.current_thread() or thread.daemon:
            continue
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive():
            log.warning("ending although the thread %s is still busy", thread.name)
            logging.shutdown()
            flush_output()
            os._exit(code)
