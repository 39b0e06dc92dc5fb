"""A fixture with a server of two workers. Only these tests use the server, because they count its processes, files and
database rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.server_process import RegistryServer, running_server
from tests.system.fuzz.fuzz_runner import prepare


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A server with the content that the malformed requests refer to."""
    with running_server(tmp_path_factory.mktemp("fuzz"), workers=2, own_interpreter=True) as server:
        prepare(server)
        yield server
