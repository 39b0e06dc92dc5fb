"""Tests of what a real server logs about responses that break off: one line if the operator should know about it, and
never a traceback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from storage.content import digest_of
from storage.data_dir.layout import Layout
from tests.fakes.plain_client import plain_client, plain_request
from tests.fakes.server_process import RegistryServer, running_server

DATA = os.urandom(12 * 1024 * 1024)
DIGEST = digest_of(DATA)
PATH = f"/v2/team/app/blobs/{DIGEST}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    with running_server(tmp_path) as running:
        with plain_client(running.url) as client:
            pushed = client.post(f"/v2/team/app/blobs/uploads/?digest={DIGEST}", content=DATA)
        assert pushed.status_code == 201
        yield running


def problems(server: RegistryServer) -> list[str]:
    """Stops the server, so that its log is complete. Returns the log lines of warnings and errors."""
    server.stop()
    assert "Traceback" not in server.log_text()
    return [line for line in server.log_text().splitlines() if " ERROR " in line or " WARNING " in line]


def test_truncated_blob_file_is_logged_once(server: RegistryServer) -> None:
    """If a blob file is too short, the server closes the connection at the end of the file. One log line names the
    request and the reason."""
    os.truncate(Layout(server.data).blob(DIGEST), 5_000_000)
    with plain_client(server.url) as client, pytest.raises(httpx2.TransportError):
        client.get(PATH)
    (line,) = problems(server)
    assert PATH in line
    assert "the file ends at byte 5000000" in line


def test_missing_blob_file_gets_404(server: RegistryServer) -> None:
    """If a blob file is missing, the client gets 404, and the log has one line about it."""
    Layout(server.data).blob(DIGEST).unlink()
    assert plain_request("GET", f"{server.url}{PATH}").status_code == 404
    (line,) = problems(server)
    assert DIGEST in line
    assert "its bytes are missing" in line


def test_disconnected_client_is_not_logged(server: RegistryServer) -> None:
    """If a client disconnects in the middle of a blob, the log has no warning or error."""
    with plain_client(server.url) as client:
        for _ in range(3):
            with client.stream("GET", PATH) as answer:
                next(answer.iter_raw())
    assert problems(server) == []
