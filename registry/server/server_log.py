"""Logging of the server's processes and connections. `registry.telemetry.access_log` logs the requests."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from registry.log_output import LineFormatter

log = logging.getLogger("registry.server")

_LOGGERS = ("registry.server", "asyncio")
_MAX_LOGGED_ERRORS = 256
"""Largest number of different errors that one `LoopErrorHandler` logs. Without this limit, errors that all have
different texts could fill the log and the memory."""


def set_up_server_logging() -> None:
    """Sends the log lines of the server and of asyncio to the root logger's handlers. If the root logger has no
    handler, sends them to stderr. Sets the level of the server's logger to INFO."""
    handler: logging.Handler | None = None
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(LineFormatter())
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers = [handler] if handler else []
        logger.propagate = handler is None
    log.setLevel(logging.INFO)


class LoopErrorHandler:
    """An exception handler for an event loop. Logs an error only once, because a callback can fail in the same way for
    every packet. Logs at most `_MAX_LOGGED_ERRORS` different errors."""

    def __init__(self) -> None:
        self._logged: set[str] = set()  # message and exception of each logged error

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        message = str(context.get("message", "an error in the event loop"))
        key = f"{message} {error!r}"
        if key in self._logged or len(self._logged) >= _MAX_LOGGED_ERRORS:
            return
        self._logged.add(key)
        log.error("%s (logged only once)", message, exc_info=error)
