"""Configuration and fixtures of all tests: temporary files, groups of tests in a parallel run, and a running server.

`make test` runs several pytest-xdist workers (test processes). Each worker gets whole groups of tests, so the fixtures
of a group start only once. Tests with the marker `alone` measure times. While such a test runs, other workers wait."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling  # type: ignore[import-untyped]

from tests.fakes.server_process import ROOT, RegistryServer, running_server
from tests.fakes.temporary_files import disk_folder, make_shared_folder, memory_root

GROUP_FOLDERS = (
    "tests/system/clients/replay/",
    "tests/system/clients/",
    "tests/system/admin/",
    "tests/conformance/",
    "tests/deploy/release/",
    "tests/architecture/",
)
"""Each of these folders is a group, because its tests share fixtures, or parse the source code of the product
only once. In other folders, each module is a group."""
ALONE_MODULES = tuple(
    f"tests/system/hostile/test_{name}.py" for name in ("stalls", "collection_stalls", "ping_watcher")
)
"""The modules with the marker `alone`. They are one group. It begins last, so that few other groups wait."""
LONGEST_GROUPS = (
    "tests/system/clients/",
    "tests/system/hostile/",
    "tests/system/admin/",
    "tests/system/pages/test_each_page.py",
    "tests/system/events/",
    "tests/system/crash/",
    "tests/system/pages/",
    "tests/contract/test_model_agreement.py",
    "tests/system/live_change/",
    "tests/system/cli/",
    "tests/system/mirror/",
    "tests/system/",
)
"""Path prefixes of the longest groups. They begin first and in this order, so that no long group is left at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """Puts temporary files into memory if possible. Makes the folder that all test processes share. Disables the time
    limits of Hypothesis, which would fail on a busy machine. Makes a worker exit without freeing its objects, which
    would take seconds."""
    hypothesis.settings.register_profile(
        "busy machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("busy machine")
    if (root := memory_root()) is not None:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(root))
    if hasattr(config, "workerinput"):
        atexit.register(os._exit, 0)  # runs after the functions that are registered later
    else:
        config.add_cleanup(partial(shutil.rmtree, make_shared_folder(), ignore_errors=True))


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]
    """Distributes whole groups to the workers, in the order of the collected tests."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        if path in ALONE_MODULES:
            return "alone"
        return next((group for group in GROUP_FOLDERS if path.startswith(group)), path)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> GroupScheduling:
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts the tests by the order in which their groups begin."""
    if hasattr(config, "workerinput"):
        items.sort(key=_rank)


def _rank(item: pytest.Item) -> int:
    if item.get_closest_marker("alone"):
        return len(LONGEST_GROUPS) + 1
    path = item.path.relative_to(ROOT).as_posix()
    return next((rank for rank, folder in enumerate(LONGEST_GROUPS) if path.startswith(folder)), len(LONGEST_GROUPS))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Makes a test with the marker `alone` run while no other test runs. The wait does not count for the time limit of
    a test."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    folder_of_run = Path(item.config.option.basetemp).parent
    with _hold_run_lock(folder_of_run, alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _hold_run_lock(folder: Path, *, alone: bool) -> Iterator[None]:
    """Holds a lock on the file `room`: exclusive if `alone`, otherwise shared. A process that waits for this lock holds
    a lock on the file `door`. So no test can begin while a test with `alone` waits."""
    with (folder / "room").open("a") as room:
        with (folder / "door").open("a") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Yields a temporary folder, usually in memory. A test with the marker `real_disk` gets a folder on a disk."""
    if request.node.get_closest_marker("real_disk") is None:
        yield tmp_path
        return
    with disk_folder() as folder:
        yield folder


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RegistryServer]:
    """Runs `entrepot serve` with two workers and an empty data directory."""
    with running_server(tmp_path) as started:
        yield started
