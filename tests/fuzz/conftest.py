"""A server with two workers for these tests alone: they count what it holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fuzz.running import prepare
from tests.serving import Server, running_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(tmp_path_factory.mktemp("fuzz"), workers=2) as server:
        prepare(server)
        yield server
