"""Logging of the server itself. `registry.observe` logs the calls on the registry."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from registry.log_output import LineFormatter

log = logging.getLogger("registry.server")

_LOGGERS = ("registry.server", "asyncio")


def set_up_server_logging() -> None:
    """Sends the log lines of the server and of asyncio to the root logger's handlers, or to stderr if it has none."""
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
    """An exception handler for event loops that logs each error once: a failing callback may be called per packet."""

    def __init__(self, most: int = 256) -> None:
        self._logged: set[str] = set()
        self._most = most

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        message = str(context.get("message", "an error in the event loop"))
        key = f"{message} {error!r}"
        if key in self._logged or len(self._logged) >= self._most:
            return
        self._logged.add(key)
        log.error("%s (said once)", message, exc_info=error)
