"""Fixtures of the compatibility tests (a registry, and a mirror of two upstreams), and hooks that record the results.

The results are written to the file that `ENTREPOT_COMPATIBILITY` names. Without this variable, the tests are not
collected: tests/deploy/chroot sets it and runs them on each Debian release.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.deploy.compatibility.client_steps import CompatibleClient
from tests.fakes.clients.mirror_clients import TwoRegistries, two_registries
from tests.fakes.deployment.client_results import ClientResult, save
from tests.fakes.server_process import RegistryServer, running_server
from tests.fakes.temporary_files import make_named_folder

collect_ignore_glob = [] if "ENTREPOT_COMPATIBILITY" in os.environ else ["test_*.py"]
RECORD = pytest.StashKey[dict[str, ClientResult]]()


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """Yields a folder with a short absolute path, because the path of a socket can have at most 107 bytes."""
    folder = make_named_folder(Path("/tmp"), "ent-")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    with running_server(tmp_path_factory.mktemp("own")) as running:
        yield running


@pytest.fixture(scope="module")
def upstreams(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoRegistries]:
    with two_registries(tmp_path_factory.mktemp("upstreams")) as running:
        yield running


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory, upstreams: TwoRegistries) -> Iterator[RegistryServer]:
    with upstreams.mirror(tmp_path_factory.mktemp("mirror")) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Records whether each step of each client works or fails."""
    report = yield
    name, step = str(item.callspec.params["client"]), str(item.callspec.params["step"])
    record = item.config.stash.setdefault(RECORD, {})
    result = record.setdefault(name, ClientResult(name, "", {}))
    if isinstance(client := item.funcargs.get("client"), CompatibleClient):
        result.version = client.version
    if report.failed:
        result.steps[step] = "fails"
    elif report.when == "call":
        result.steps[step] = "works"
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if file := os.environ.get("ENTREPOT_COMPATIBILITY"):
        save(session.config.stash.get(RECORD, {}).values(), Path(file))
