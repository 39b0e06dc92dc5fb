"""Runs the commands of those pages of the book that need docker, podman and skopeo."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fakes.book_page import PageClients, PageRun, needs_clients, pages_in_english, runnable_blocks
from tests.fakes.clients.container_tools import container_tools
from tests.fakes.clients.docker_engine import running_docker
from tests.fakes.commands import entrepot

PAGES = [name for name, file in pages_in_english().items() if any(map(needs_clients, runnable_blocks(file)))]
UPSTREAMS = '[[upstream]]\nname = "docker.io"\ndefault = true\n[[upstream]]\nname = "ghcr.io"\n'


@pytest.fixture(scope="module")
def clients() -> Iterator[PageClients]:
    """Yields clients that are set up as accelerator.md says. They use a registry at a fixed port, at which the server
    of each page listens."""
    folder = Path(tempfile.mkdtemp(prefix="ent-", dir="/tmp"))  # the path of a socket must be short
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    for name in ("docker", "tools"):
        (folder / name).mkdir()
    (folder / "daemon.json").write_text(json.dumps({"registry-mirrors": [url]}))
    (folder / "entrepot.toml").write_text(UPSTREAMS)
    tools = container_tools(folder / "tools")
    printed = entrepot("client", "podman", "--url", url, "--config", folder / "entrepot.toml", folder=folder)
    assert printed.returncode == 0, printed.stderr
    drop_in_folder = folder / "tools" / "home" / ".config" / "containers" / "registries.conf.d"
    drop_in_folder.mkdir()
    for file in (folder / "tools" / "registries.conf", drop_in_folder / "50-entrepot.conf"):
        file.write_text(printed.stdout)
    with running_docker(folder / "docker", "--config-file", str(folder / "daemon.json")) as docker:
        yield PageClients(docker, tools, port)
    shutil.rmtree(folder)


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_work(tmp_path: Path, clients: PageClients, page: str) -> None:
    """Each command of the page has the exit code that the page shows, and prints the lines that the page shows."""
    with ExitStack() as stack:
        PageRun(tmp_path, stack, clients).run_page(pages_in_english()[page])
