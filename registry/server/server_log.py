"""Logging of the server: of processes, connections and malformed requests. Requests that the application answers are
logged elsewhere, in `registry.observe`."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from registry.log_output import LineFormatter

log = logging.getLogger("registry.server")

_LOGGERS = ("registry.server", "asyncio")
_MAX_LOGGED_ERRORS = 256
"""Different errors that `LoopErrors` logs, because error texts may differ without bound."""


def set_up_server_logging() -> None:
    """Sends the log lines of the server and of asyncio to the root logger's handlers, or to stderr if the root logger
    has no handler. Sets the server's log level to INFO."""
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
    """An exception handler for an event loop. Logs each different error once, because a callback that fails may be
    called for every packet that arrives."""

    def __init__(self) -> None:
        self._logged: set[str] = set()

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        message = str(context.get("message", "an error in the event loop"))
        key = f"{message} {error!r}"
        if key in self._logged or len(self._logged) >= _MAX_LOGGED_ERRORS:
            return
        self._logged.add(key)
        log.error("%s (logged only once)", message, exc_info=error)
