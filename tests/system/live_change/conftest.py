"""The fixture `site`: a running server whose settings a test changes with `entrepot reload` and `entrepot restart`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from tests.fakes.commands import entrepot
from tests.fakes.raw_http import RawConnection
from tests.fakes.server_process import RegistryServer, running_server


class LiveSite:
    """A running server, its settings file, and the commands that put changed settings in force."""

    def __init__(self, folder: Path, server: RegistryServer, file: Path) -> None:
        self.folder = folder
        self.server = server
        self.file = file

    def write(self, text: str) -> None:
        """Writes the settings file."""
        self.file.write_text(text)

    def run(self, command: str) -> CompletedProcess[str]:
        """Runs `entrepot reload` or `entrepot restart`."""
        return entrepot(command, "--data", self.server.data, folder=self.folder)

    def start(self, command: str) -> Callable[[], CompletedProcess[str]]:
        """Runs the command in the background. Returns a function that waits for its end."""
        results: list[CompletedProcess[str]] = []
        thread = threading.Thread(target=lambda: results.append(self.run(command)))
        thread.start()

        def wait() -> CompletedProcess[str]:
            thread.join()
            return results[0]

        return wait

    def may_push(self) -> bool:
        """Returns whether a push over a new connection can start. With `read_only = true` it cannot."""
        with RawConnection(("127.0.0.1", self.server.port)) as connection:
            status = connection.ask("POST", "/v2/live/a/blobs/uploads/", {"Connection": "close"}).status
        assert status in (202, 405)
        return status == 202


@pytest.fixture(params=[2])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LiveSite]:
    """A running server. The parameter is the number of its workers."""
    file = tmp_path / "settings.toml"
    file.write_text("")
    with running_server(tmp_path, "--config", str(file), workers=request.param) as server:
        yield LiveSite(tmp_path, server, file)
    assert "Traceback" not in server.log_text()
