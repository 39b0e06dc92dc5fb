"""Fixtures with running servers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.system.server.app_process import AppProcess, Start


@pytest.fixture
def start() -> Iterator[Start]:
    """Returns a function that starts a server with the given options of `echo_app`. The servers end after the test."""
    with ExitStack() as stack:

        def run(env: dict[str, str] | None = None, ready: bool = True, **options: Any) -> AppProcess:
            running = AppProcess(options, env)
            stack.callback(running.close)
            return running.wait_until_ready() if ready else running

        yield run


@pytest.fixture(scope="session")
def server() -> Iterator[AppProcess]:
    """A server that the tests of HTTP/1.1 share. It lingers for longer than a test could stall."""
    running = AppProcess({"limits": {"linger_seconds": 60.0}})
    try:
        yield running.wait_until_ready()
    finally:
        running.close()


@pytest.fixture(scope="session")
def short_timeout_server() -> Iterator[AppProcess]:
    """A shared server whose timeouts are all one second."""
    seconds = {
        "head_seconds": 1.0,
        "keep_alive_seconds": 1.0,
        "body_idle_seconds": 1.0,
        "send_idle_seconds": 1.0,
        "half_close_seconds": 1.0,
        "linger_seconds": 1.0,
        "timeout_check_seconds": 0.05,
    }
    running = AppProcess({"limits": seconds})
    try:
        yield running.wait_until_ready()
    finally:
        running.close()
