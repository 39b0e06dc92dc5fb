"""Tests that the commands of the README work on minimal Debian 12 and 13 systems, which have only Python and make.

Running the whole test suite on each of them would take too long. So `make test` installs everything there, but runs
only the unit tests of one package, and some pushes and pulls with the docker, podman and skopeo of that Debian release.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.client_images import image
from tests.fakes.clients.registry_client import RegistryClient, assert_same_image
from tests.fakes.deployment.book_commands import book_command
from tests.fakes.deployment.client_results import RESULTS, load, save
from tests.fakes.deployment.debian_root import CHECKOUT, RELEASES, DebianRoot, debian_root
from tests.fakes.deployment.release_files import run_in
from tests.fakes.server_process import ROOT, RegistryServer, running_program

CLIENTS = "tests/system/clients"
QUICK_PART = (
    "tests/unit/storage/metadata",
    f"{CLIENTS}/test_docker.py::test_push_and_pull_without_a_tag",
    f"{CLIENTS}/test_podman.py::test_push_pull_and_run",
    f"{CLIENTS}/test_skopeo.py::test_docker_schema_2_is_kept",
)
SETUP_SECONDS = 900.0
"""Longest time for a command that installs everything before it starts."""

pytestmark = pytest.mark.timeout(SETUP_SECONDS + 300)


@pytest.fixture(scope="module", params=RELEASES, ids=[f"debian{number}" for number in RELEASES.values()])
def debian(request: pytest.FixtureRequest) -> Iterator[DebianRoot]:
    with debian_root(request.param) as root:
        root.copy_checkout()
        yield root


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run_in(ROOT, sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", folder)
    (built,) = folder.iterdir()
    return built


def assert_serves(debian: DebianRoot, folder: Path, script: str) -> None:
    """Starts a server on the Debian system with a shell script. Checks that clients can push and pull, and that SIGTERM
    ends the server with exit code 0."""
    with running_program(folder, *debian.command(script), env=debian.environment(), timeout=SETUP_SECONDS) as server:
        client, pushed = RegistryClient(server.address), image(f"pushed to {debian.name}")
        client.push("team/app", "1", pushed)
        assert_same_image(client, "team/app", "1", pushed)
        os.kill(pid_of_parent(server), signal.SIGTERM)
        assert server.process.wait(60) == 0


def pid_of_parent(server: RegistryServer) -> int:
    """Returns the id of the server's main process, not of a `make` or a shell that started it."""
    for pid in server.pids():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if len(words) > 1 and words[1].endswith(b"/entrepot"):
            return pid
    raise AssertionError(server.log_text())


def test_make_serve(debian: DebianRoot, tmp_path: Path) -> None:
    """`make serve` installs all missing packages and runs the server."""
    serve = book_command("README", "make serve", ('docker.io"', 'docker.io --listen 127.0.0.1:0"'))
    assert_serves(debian, tmp_path, f"cd {CHECKOUT} && exec {serve}")


def test_wheel(debian: DebianRoot, wheel: Path, tmp_path: Path) -> None:
    """After `pip install` of the wheel in a virtual environment, `entrepot serve` runs the server."""
    debian.copy_in(wheel, "/srv/release")
    debian.run("apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv")
    debian.run("python3 -m venv /srv/wheel && /srv/wheel/bin/pip install -q /srv/release/*.whl")
    assert_serves(debian, tmp_path, "exec /srv/wheel/bin/entrepot serve --data /srv/data --listen 127.0.0.1:0")


def test_installation_for_systemd(debian: DebianRoot, tmp_path: Path) -> None:
    """The commands of the page deployment install the program and the unit from the checkout, with the pinned
    dependencies. tests/deploy/test_containers.py starts the unit."""
    debian.run("apt-get update -qq")
    commands = [
        book_command("deployment", "apt-get install"),
        book_command("deployment", "python3 -m venv"),
        book_command("deployment", "/opt/entrepot/bin/pip install --require-hashes"),
        book_command("deployment", "/opt/entrepot/bin/pip install --no-deps"),
        f"mkdir -p /etc/systemd/system && {book_command('deployment', 'install -m 644')}",
    ]
    debian.run(" && ".join([f"cd {CHECKOUT}", *commands]))
    unit = debian.folder / "etc" / "systemd" / "system" / "entrepot.service"
    assert unit.read_text() == (ROOT / "deploy" / "systemd" / "entrepot.service").read_text()
    program = re.search("^ExecStart=(.*)$", unit.read_text(), re.MULTILINE)
    assert program
    assert_serves(debian, tmp_path, f"exec {program[1]} --data /srv/systemd --listen 127.0.0.1:0")


def test_make_test(debian: DebianRoot) -> None:
    """`make test` installs all missing packages. The tests pass, including those with the clients of this Debian
    release."""
    make_test = book_command("README", "make test", ("test", f"test ARGS='-q {' '.join(QUICK_PART)}'"))
    output = debian.run(f"cd {CHECKOUT} && {make_test}", timeout=SETUP_SECONDS)
    assert " passed" in output
    assert not {" failed", " skipped", " error"} & {f" {word.strip(',')}" for word in output.split()}


def test_clients(debian: DebianRoot, tmp_path: Path) -> None:
    """The clients of this Debian release have the results that docs/en/compatibility.md shows. With
    `make compatibility`, the test records the results for this page first."""
    if debian.name != "bookworm":  # bookworm has no oras and no cosign, and its docker includes buildx
        debian.run("apt-get update -qq && apt-get install -y -qq --no-install-recommends cosign docker-buildx oras")
    results = f"{CHECKOUT}/results.json"
    tests = f"ENTREPOT_COMPATIBILITY={results} .venv/bin/python -m pytest -q tests/deploy/compatibility || :"
    output = debian.run(f"cd {CHECKOUT} && make .venv/.clients packages && {tests}", timeout=SETUP_SECONDS)
    print(output)
    found, recorded = load(debian.folder / results.lstrip("/")), RESULTS / f"{debian.name}.json"
    if os.environ.get("ENTREPOT_RECORD_COMPATIBILITY"):
        save(found, recorded)
    assert {each.client: each.steps for each in load(recorded)} == {each.client: each.steps for each in found}
