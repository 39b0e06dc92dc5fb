"""What the server logs about errors in its event loop, and how it describes a failed start."""

from __future__ import annotations

import asyncio
import logging

import pytest

from registry.server.process.worker import describe_failure
from registry.server.server_log import LoopErrorHandler


async def test_repeated_loop_errors_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """If a callback of the event loop fails repeatedly, the error is logged once, with its traceback."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(LoopErrorHandler())
    logger = logging.getLogger("registry.server")
    propagate_before = logger.propagate
    logger.propagate = True
    try:
        for _ in range(3):
            loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    finally:
        logger.propagate = propagate_before
        loop.set_exception_handler(None)
    (record,) = caplog.records
    assert record.exc_info is not None


def test_reason_of_a_failed_start_is_one_line() -> None:
    """The reason of a failed start is one line, whatever the exception contains."""
    assert describe_failure(OSError(28, "No space left\non device")) == "[Errno 28] No space left on device"
