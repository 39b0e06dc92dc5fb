"""What every suite shares: a running server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.server_process import RegistryServer, running_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    """`entrepot serve` with two workers and an empty data directory."""
    with running_server(tmp_path) as started:
        yield started
