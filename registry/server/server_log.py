"""The server's own log lines: few, without colour, to stderr. One line per call is `registry.observe`'s business."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from registry.log_output import LineFormatter

log = logging.getLogger("registry.server")

_OURS = ("registry.server", "uvicorn", "asyncio")


def set_up_server_logging() -> None:
    """Sends what uvicorn, asyncio and we have to say to the root's handlers, or to stderr where it has none.

    uvicorn's start and stop lines are information about itself, not for the operator: only its warnings pass.
    """
    handler: logging.Handler | None = None
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(LineFormatter())
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler] if handler else []
        logger.propagate = handler is None
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    log.setLevel(logging.INFO)


class LoopErrors:
    """An event loop's exception handler that says each thing once: a fault in a callback may come back per packet."""

    def __init__(self, most: int = 256) -> None:
        self._said: set[str] = set()
        self._most = most

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        message = str(context.get("message", "an error in the event loop"))
        key = f"{message} {error!r}"
        if key in self._said or len(self._said) >= self._most:
            return
        self._said.add(key)
        log.error("%s (said once)", message, exc_info=error)
