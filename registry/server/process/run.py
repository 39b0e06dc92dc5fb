"""`serve`: the one call the command makes to run an application on its sockets until it is told to stop."""

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

from registry.log_output import end_output, flush_output
from registry.server.asgi import AsgiApp
from registry.server.gate.listener import ListenerOptions
from registry.server.kernel import raise_file_limit
from registry.server.process.supervisor import Supervisor
from registry.server.process.worker import Worker
from registry.server.server_limits import ServerLimits
from registry.server.server_log import log, set_up_server_logging

# How long threads of the application may take to end once the loop has; they hold nothing that was acknowledged.
_THREAD_JOIN_SECONDS = 2.0


def serve(
    make_app: Callable[[], AsgiApp],
    *,
    sockets: Sequence[socket.socket],
    workers: int,
    shutdown_grace: float,
    limits: ServerLimits | None = None,
    on_ready: Callable[[], None] | None = None,
    door: ListenerOptions | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT; the exit code for the command (0 after an orderly stop, 1 after a failed start).

    `make_app` is called in each worker, after the fork; databases belong into the application's lifespan. What it needs
    should be imported before, once, in the parent: the workers share those pages. `on_ready` is called once, in the
    parent, when all workers take requests. `shutdown_grace` is in seconds: how long requests in flight may go on.

    One worker runs in this very process: nothing to supervise is the least memory. Call it from the main thread. The
    sockets are closed when it returns. A start that fails prints one line on stderr.
    """
    if workers < 1:
        raise ValueError("there must be at least one worker")
    set_up_server_logging()
    raise_file_limit()
    limits, door = limits or ServerLimits(), door or ListenerOptions()
    if workers > 1:
        gc.collect()
        gc.freeze()  # the collector must not touch, and so copy, what the workers share
        code, failure = Supervisor(make_app, sockets, workers, shutdown_grace, limits, on_ready, door).run()
    else:
        if door.crowd is not None:
            door.crowd.use(door.crowd.claim())
        ready = on_ready or (lambda: None)
        code, failure = Worker(make_app, sockets, shutdown_grace, limits, ready, door=door).run()
        _end_threads(code)
    if failure:
        with suppress(OSError):
            print(f"error: {failure}", file=sys.stderr, flush=True)
    end_output()
    return code


def _end_threads(code: int) -> None:
    """Ends the process here where a thread of the application is stuck: the interpreter would wait for it for ever."""
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
