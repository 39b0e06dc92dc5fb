"""Fixtures of the conformance tests: one server with two workers, and a new repository for each test."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import httpx2
import pytest

from tests.conformance.pusher import Pusher, make_client
from tests.fakes.server_process import RegistryServer, running_server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    with running_server(tmp_path_factory.mktemp("conformance"), workers=2) as server:
        yield server


@pytest.fixture
def client(server: RegistryServer) -> Iterator[httpx2.Client]:
    with make_client(server.url) as client:
        yield client


@pytest.fixture
def repo() -> str:
    return f"conformance/r{uuid.uuid4().hex[:16]}"


@pytest.fixture
def push(client: httpx2.Client, repo: str) -> Pusher:
    """Pushes to the test's repository."""
    return Pusher(client, repo)


@pytest.fixture(params=["sha256", "sha512"])
def algorithm(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name
