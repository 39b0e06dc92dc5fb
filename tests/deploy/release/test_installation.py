"""The wheel is all that there is to install: with pip, pipx and uv, each as its users do."""

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

ELSEWHERE = ("--data", "data", "--listen", "127.0.0.1:0")
"""Options of `entrepot serve`: a data directory in the folder of the test, and any free port."""
INSTALLING = 300.0
"""Seconds that a command may take which installs everything before it starts."""
TOOLS = Path(sys.executable).parent


def environment(folder: Path) -> dict[str, str]:
    """This process's, with the homes of pipx and uv in `folder`, and without the packages of the tests."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("ENTREPOT_", "PYTHON", "VIRTUAL"))
    }
    homes = {"PIPX_HOME": "pipx", "PIPX_BIN_DIR": "bin", "UV_TOOL_DIR": "uv", "UV_CACHE_DIR": "uv-cache"}
    return {**kept, "PYTHONUNBUFFERED": "1", **{name: str(folder / value) for name, value in homes.items()}}


@contextmanager
def serving(folder: Path, command: str) -> Iterator[RegistryServer]:
    """Runs a command line that ends with the command `serve` and its options."""
    words = [*shlex.split(command), *ELSEWHERE]
    with running_program(folder, *words, env=environment(folder), timeout=INSTALLING) as server:
        yield server


def assert_serves(server: RegistryServer) -> None:
    """The server takes a push, gives it back, and shows its pages, in Chinese as well."""
    wire, pushed = RegistryClient(server.address), image("installed")
    wire.push("team/app", "1", pushed)
    assert_same_image(wire, "team/app", "1", pushed)
    for language, said in (("en", "Repositories"), ("zh-CN", "仓库")):
        page = wire.ask("GET", "/ui/repositories", headers={"Accept": "text/html", "Accept-Language": language})
        assert page.status == 200
        assert said in page.body.decode()
    assert wire.ask("GET", "/api/docs", headers={"Accept": "text/html"}).status == 200


@pytest.mark.timeout(INSTALLING * 2)
def test_pip(released: ReleaseFiles, tmp_path: Path) -> None:
    """`pip install` of the wheel in a new environment brings the command `entrepot`."""
    run_in(tmp_path, sys.executable, "-m", "venv", "env")
    install = book_command("quick-start", "pip install", ("entrepot", str(released.wheel)))
    run_in(tmp_path, *shlex.split(f"env/bin/{install}"), env={"PYTHONPATH": ""})
    with serving(tmp_path, f"{tmp_path}/env/bin/{book_command('quick-start', 'entrepot serve')}") as server:
        assert_serves(server)


@pytest.mark.timeout(INSTALLING * 2)
def test_pip_without_a_network(released: ReleaseFiles, tmp_path: Path) -> None:
    """The folder that `pip download` fills on another machine is all that an installation needs."""
    run_in(tmp_path, sys.executable, "-m", "venv", "env")
    fetch = book_command("air-gapped", "pip download", (" entrepot", f" {released.wheel}"))
    run_in(tmp_path, "sh", "-ec", f"env/bin/{fetch}", env={"PYTHONPATH": ""})
    install = book_command("air-gapped", "pip install --no-index")
    run_in(tmp_path, "sh", "-ec", f"env/bin/{install}", env={"PYTHONPATH": ""})
    assert run_in(tmp_path, "env/bin/entrepot", "--version").split()[-1] == __version__


@pytest.mark.timeout(INSTALLING * 2)
def test_pipx(released: ReleaseFiles, tmp_path: Path) -> None:
    """`pipx install` brings the command."""
    install = book_command("quick-start", "pipx install", ("install entrepot", f"install {released.wheel}"))
    run_in(tmp_path, *shlex.split(f"{TOOLS}/{install}"), env=environment(tmp_path))
    with serving(tmp_path, f"{tmp_path}/bin/{book_command('quick-start', 'entrepot serve')}") as server:
        assert_serves(server)


@pytest.mark.timeout(INSTALLING * 2)
def test_pipx_run(released: ReleaseFiles, tmp_path: Path) -> None:
    """`pipx run` serves without an installation that stays."""
    with serving(tmp_path, f"{TOOLS}/pipx run --spec {released.wheel} entrepot serve") as server:
        assert_serves(server)


@pytest.mark.timeout(INSTALLING * 2)
def test_uvx(released: ReleaseFiles, tmp_path: Path) -> None:
    """`uvx` serves without an installation that stays."""
    from_wheel = ("uvx entrepot", f"uvx --python {sys.executable} --from {released.wheel} entrepot")
    with serving(tmp_path, f"{TOOLS}/{book_command('quick-start', 'uvx', from_wheel)}") as server:
        assert_serves(server)
