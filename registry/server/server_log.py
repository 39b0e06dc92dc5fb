"""Logging of the server: its processes, its connections, and the responses that it cannot send. The access log
(`registry.telemetry.access_log`) has a line for each request."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from registry.log_output import LineFormatter

log = logging.getLogger("registry.server")

_LOGGERS = ("registry.server", "asyncio")
_MAX_LOGGED_ERRORS = 256
"""Largest number of different errors that one `LoopErrors` logs. Without this bound, errors whose texts all differ
could fill the log and the memory."""


def set_up_server_logging() -> None:
    """Makes the log lines of the server and of asyncio go to the root logger's handlers, or to stderr if the root
    logger has no handler. Sets the level of the server's logger to INFO."""
    handler: logging.Handler | None = None
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(LineFormatter())
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler] if handler else []
        logger.propagate = handler is None
    log.setLevel(logging.INFO)


class LoopErrors:
    """An exception handler for an event loop. Logs each different error once, because a callback that fails can fail
    again for every packet that arrives."""

    def __init__(self) -> None:
        self._logged: set[str] = set()  # message and exception of each error that was logged

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        message = str(context.get("message", "an error in the event loop"))
        key = f"{message} {error!r}"
        if key in self._logged or len(self._logged) >= _MAX_LOGGED_ERRORS:
            return
        self._logged.add(key)
        log.error("%s (logged only once)", message, exc_info=error)
