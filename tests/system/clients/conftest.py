"""Fixtures for tests with real clients. All tests of a session share one server with two workers, one dockerd, one
containerd and one set of container tools."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import pytest

from tests.fakes.admin_site import ADMIN, PASSWORD
from tests.fakes.client_images import MIB, ClientImage, image, index, layer, noise, write_layout
from tests.fakes.clients.container_tools import ContainerTools, container_tools
from tests.fakes.clients.containerd_daemon import Containerd, running_containerd
from tests.fakes.clients.cutting_proxy import CuttingProxy, cutting_proxy
from tests.fakes.clients.docker_engine import DockerEngine, running_docker
from tests.fakes.clients.member_site import SiteWithAccounts
from tests.fakes.clients.programs import log_tail
from tests.fakes.clients.registry_client import RegistryClient
from tests.fakes.commands import entrepot_output
from tests.fakes.server_process import RegistryServer, running_server


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """Yields a folder with a short absolute path. The path of a Unix socket in it may have at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="ent-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """Runs the server that all clients share. At the end, it must exit with code 0 after SIGTERM."""
    with running_server(tmp_path_factory.mktemp("entrepot")) as running:
        yield running
    shutil.rmtree(running.data)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteWithAccounts]:
    """Runs a server with two workers and accounts. Its bearer tokens live for 60 s, which is the shortest lifetime that
    the settings allow."""
    folder = tmp_path_factory.mktemp("club")
    entrepot_output("user", "add", ADMIN, "--admin", "--password-file", "-", folder=folder, stdin_text=PASSWORD)
    with running_server(folder, env={"ENTREPOT_AUTH__TOKEN_TTL": "60s"}) as running:
        yield SiteWithAccounts(running, folder)
    shutil.rmtree(running.data)


@pytest.fixture(scope="session")
def wire(server: RegistryServer) -> RegistryClient:
    """Returns an HTTP client of the shared server. Tests push content with it, and check what the server has."""
    return RegistryClient(server.address)


@pytest.fixture(scope="session")
def docker(short_folder: Path) -> Iterator[DockerEngine]:
    folder = short_folder / "docker"
    folder.mkdir()
    with running_docker(folder) as running:
        yield running


@pytest.fixture(scope="session")
def ctr(short_folder: Path) -> Iterator[Containerd]:
    folder = short_folder / "ctr"
    folder.mkdir()
    with running_containerd(folder) as running:
        yield running


@pytest.fixture(scope="session")
def tools(short_folder: Path) -> ContainerTools:
    folder = short_folder / "tools"
    folder.mkdir()
    return container_tools(folder)


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """A repository name that only this test uses."""
    return "team/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")


@pytest.fixture
def small_image(repo: str) -> ClientImage:
    """A small image with a layer that no other test pushes."""
    return image(f"hello from {repo}")


@pytest.fixture(scope="session")
def large_image() -> ClientImage:
    """An image with incompressible layers, the largest of 80 MiB."""
    sizes = {"few": 3, "middle": 256 * 1024, "large": 80 * MIB}
    return image("big", *[layer({name: noise(name, size)}) for name, size in sizes.items()])


@pytest.fixture(scope="session")
def multi_platform() -> ClientImage:
    """An index of an amd64 and an arm64 image. Each can be run on its own platform only."""
    return index((image("on amd64"), "amd64"), (image("on arm64", architecture="arm64"), "arm64"))


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory, large_image: ClientImage, multi_platform: ClientImage) -> Path:
    """An OCI image layout with `large_image` under the tag `big` and `multi_platform` under the tag `multi`."""
    return write_layout(tmp_path_factory.mktemp("layout"), {"big": large_image, "multi": multi_platform})


@pytest.fixture
def proxy(server: RegistryServer) -> Iterator[CuttingProxy]:
    """Runs a proxy in front of the shared server. The proxy can interrupt connections."""
    with cutting_proxy(server.address) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the last lines of the logs of the server and of the daemons to the report of a failed test."""
    report = yield
    if report.failed:
        for name, log in _logs(item.funcargs):
            report.sections.append((f"{name} log", log_tail(log)))
    return report


def _logs(fixtures: Mapping[str, object]) -> Iterator[tuple[str, Path]]:
    """Returns the name and the path of the log of each server and daemon among the fixtures of a test."""
    for each in fixtures.values():
        if isinstance(each, RegistryServer):
            yield "server", each.log
        elif isinstance(each, SiteWithAccounts):
            yield "server", each.server.log
        elif isinstance(each, DockerEngine):
            yield "dockerd", each.folder / "dockerd.log"
        elif isinstance(each, Containerd):
            yield "containerd", each.folder / "containerd.log"
