"""What every suite shares: where temporary files are, what runs together in a parallel run, and a running server.

`make test` runs several pytest-xdist workers. A worker takes whole groups of tests, so that what a module's or a
folder's fixtures start is started once. Tests with the marker `alone` measure times that a busy machine would spoil;
while one runs, the other workers wait.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling  # type: ignore[import-untyped]

from tests.fakes.server_process import ROOT, RegistryServer, running_server
from tests.fakes.temporary_files import disk_folder, memory_root

TOGETHER = (
    "tests/system/clients/replay/",
    "tests/system/clients/",
    "tests/system/admin/",
    "tests/conformance/",
    "tests/deploy/release/",
)
"""Folders whose tests share fixtures of the session: each is a group. Elsewhere each module is one."""
ALONE = tuple(f"tests/system/hostile/test_{name}.py" for name in ("stalls", "collection_stalls", "ping_watcher"))
"""The modules with the marker `alone` are one group, which begins last, so that they keep no other group waiting."""
LONG = (
    "tests/system/clients/",
    "tests/system/hostile/",
    "tests/system/events/",
    "tests/system/crash/",
    "tests/contract/test_model_agreement.py",
    "tests/system/live_change/",
    "tests/system/cli/",
    "tests/system/mirror/",
    "tests/system/",
)
"""Where the groups are that take longest. They begin first, so that none is left over for the end. Groups of the
same rank have a random order."""


def pytest_configure() -> None:
    """Puts temporary files into memory where there is room and nobody asked for another place. Hypothesis measures no
    times: on a busy machine they say nothing."""
    hypothesis.settings.register_profile(
        "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("busy machine")
    if (root := memory_root()) is not None:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(root))


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Hands whole groups to the processes of a parallel run, in the order in which the tests were collected."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        if path in ALONE:
            return "alone"
        return next((group for group in TOGETHER if path.startswith(group)), path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a worker of a parallel run: puts the groups in the order of their start."""
    if hasattr(config, "workerinput"):
        items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    if item.get_closest_marker("alone"):
        return len(LONG) + 1
    path = item.path.relative_to(ROOT).as_posix()
    return next((rank for rank, folder in enumerate(LONG) if path.startswith(folder)), len(LONG))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """In a worker of a parallel run: lets tests that are to run alone do so. Outside of each test's time limit."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    folder_of_run = Path(item.config.option.basetemp).parent
    with _turn(folder_of_run, alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _turn(folder: Path, *, alone: bool) -> Iterator[None]:
    """Holds a lock on `room`, alone or with others. A waiting `alone` keeps the `door` shut, so that others cannot keep
    it out for ever."""
    with (folder / "room").open("a") as room:
        with (folder / "door").open("a") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """pytest's, which is in memory in most cases, or a folder on a disk for a test with the marker `real_disk`."""
    if request.node.get_closest_marker("real_disk") is None:
        yield tmp_path
        return
    with disk_folder() as folder:
        yield folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    """`entrepot serve` with two workers and an empty data directory."""
    with running_server(tmp_path) as started:
        yield started
