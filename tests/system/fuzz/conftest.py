"""A server with two workers for these tests only, because they count its processes, files and rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fakes.server_process import RegistryServer, running_server
from tests.system.fuzz.fuzz_runner import prepare


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    with running_server(tmp_path_factory.mktemp("fuzz"), workers=2, own_interpreter=True) as server:
        prepare(server)
        yield server
