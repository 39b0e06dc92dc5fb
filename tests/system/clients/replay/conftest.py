"""Fixtures for tests that send the requests of clients byte by byte: one server with two workers for all tests, and
connections and a repository for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Protocol

import pytest

from tests.fakes.raw_http import RawConnection
from tests.fakes.raw_pushes import RawPushes
from tests.fakes.server_process import RegistryServer, running_server


class Connect(Protocol):
    """Opens a connection to the server. `receive_buffer`: as in `RawConnection`."""

    def __call__(self, *, receive_buffer: int | None = None) -> RawConnection: ...


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    with running_server(tmp_path_factory.mktemp("replay"), workers=2) as server:
        yield server


@pytest.fixture
def connect(server: RegistryServer) -> Iterator[Connect]:
    """Yields a function that opens a connection to the server. The connections are closed at the end of the test."""
    with ExitStack() as stack:

        def open_connection(*, receive_buffer: int | None = None) -> RawConnection:
            return stack.enter_context(RawConnection(("127.0.0.1", server.port), receive_buffer=receive_buffer))

        yield open_connection


@pytest.fixture
def repo() -> str:
    """A new repository name."""
    return f"replay/r{uuid.uuid4().hex[:16]}"


@pytest.fixture
def steps(connect: Connect, repo: str) -> RawPushes:
    """Returns helper methods with which a test prepares content and checks the result. They use a separate
    connection."""
    return RawPushes(connect(), repo)
