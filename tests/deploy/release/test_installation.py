"""Tests that a user needs only the wheel to install Entrepot with pip, pipx or uv."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry import __version__
from tests.fakes.client_images import image
from tests.fakes.clients.registry_client import RegistryClient, assert_same_image
from tests.fakes.deployment.book_commands import book_command
from tests.fakes.deployment.release_files import ReleaseFiles, run_in
from tests.fakes.server_process import RegistryServer, running_program

SERVE_OPTIONS = ("--data", "data", "--listen", "127.0.0.1:0")
"""Options of `entrepot serve`: a data directory in the folder of the test, and any free port."""
INSTALL_SECONDS = 300.0
"""Longest time for a command that installs everything before it starts."""
TOOLS = Path(sys.executable).parent


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment of this process without the packages of the tests. The folders of pipx and uv are below
    `folder`."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("ENTREPOT_", "PYTHON", "VIRTUAL"))
    }
    homes = {"PIPX_HOME": "pipx", "PIPX_BIN_DIR": "bin", "UV_TOOL_DIR": "uv", "UV_CACHE_DIR": "uv-cache"}
    return {**inherited, "PYTHONUNBUFFERED": "1", **{name: str(folder / value) for name, value in homes.items()}}


@contextmanager
def serving(folder: Path, command: str) -> Iterator[RegistryServer]:
    """Runs a command line that ends with the command `serve` and its options."""
    words = [*shlex.split(command), *SERVE_OPTIONS]
    with running_program(folder, *words, env=environment(folder), timeout=INSTALL_SECONDS) as server:
        yield server


def assert_serves(server: RegistryServer) -> None:
    """Checks that clients can push to the server and pull from it, and that it serves its web pages, also in
    Chinese."""
    wire, pushed = RegistryClient(server.address), image("installed")
    wire.push("team/app", "1", pushed)
    assert_same_image(wire, "team/app", "1", pushed)
    for language, page_title in (("en", "Repositories"), ("zh-CN", "仓库")):
        page = wire.ask("GET", "/ui/repositories", headers={"Accept": "text/html", "Accept-Language": language})
        assert page.status == 200
        assert page_title in page.body.decode()
    assert wire.ask("GET", "/api/docs", headers={"Accept": "text/html"}).status == 200


@pytest.mark.timeout(INSTALL_SECONDS * 2)
def test_pip(released: ReleaseFiles, tmp_path: Path) -> None:
    """`pip install` of the wheel in a new environment installs the command `entrepot`, and the server works."""
    run_in(tmp_path, sys.executable, "-m", "venv", "env")
    install = book_command("quick-start", "pip install", ("entrepot", str(released.wheel)))
    run_in(tmp_path, *shlex.split(f"env/bin/{install}"), env={"PYTHONPATH": ""})
    with serving(tmp_path, f"{tmp_path}/env/bin/{book_command('quick-start', 'entrepot serve')}") as server:
        assert_serves(server)


@pytest.mark.timeout(INSTALL_SECONDS * 2)
def test_pip_without_a_network(released: ReleaseFiles, tmp_path: Path) -> None:
    """The folder that `pip download` fills on another machine is all that an installation needs."""
    run_in(tmp_path, sys.executable, "-m", "venv", "env")
    fetch = book_command("air-gapped", "pip download", ("wheels entrepot", f"wheels {released.wheel}"))
    run_in(tmp_path, "sh", "-ec", f"env/bin/{fetch}", env={"PYTHONPATH": ""})
    install = book_command("air-gapped", "pip install --no-index")
    run_in(tmp_path, "sh", "-ec", f"env/bin/{install}", env={"PYTHONPATH": ""})
    assert run_in(tmp_path, "env/bin/entrepot", "--version").split()[-1] == __version__


@pytest.mark.timeout(INSTALL_SECONDS * 2)
def test_pipx(released: ReleaseFiles, tmp_path: Path) -> None:
    """`pipx install` installs the command `entrepot`, and the server works."""
    install = book_command("quick-start", "pipx install", ("install entrepot", f"install {released.wheel}"))
    run_in(tmp_path, *shlex.split(f"{TOOLS}/{install}"), env=environment(tmp_path))
    with serving(tmp_path, f"{tmp_path}/bin/{book_command('quick-start', 'entrepot serve')}") as server:
        assert_serves(server)


@pytest.mark.timeout(INSTALL_SECONDS * 2)
def test_pipx_run(released: ReleaseFiles, tmp_path: Path) -> None:
    """`pipx run` runs the server without a permanent installation."""
    with serving(tmp_path, f"{TOOLS}/pipx run --spec {released.wheel} entrepot serve") as server:
        assert_serves(server)


@pytest.mark.timeout(INSTALL_SECONDS * 2)
def test_uvx(released: ReleaseFiles, tmp_path: Path) -> None:
    """`uvx` runs the server without a permanent installation."""
    from_wheel = ("uvx entrepot", f"uvx --python {sys.executable} --from {released.wheel} entrepot")
    with serving(tmp_path, f"{TOOLS}/{book_command('quick-start', 'uvx', from_wheel)}") as server:
        assert_serves(server)
