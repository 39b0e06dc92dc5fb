"""Fixtures of the attacked server. Each test module starts its own server. The large store is built once for all test
processes."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.fakes.temporary_files import disk_folder, shared_folder
from tests.system.hostile import attacks_manifests, large_store
from tests.system.hostile.attacked_site import AttackedSite, running_site


@pytest.fixture(scope="session")
def store() -> Iterator[tuple[Path, Mapping[str, str]]]:
    """Yields the folder of a large store, and the Authorization headers of its accounts."""
    with disk_folder() as folder:
        built = _built_store(shared_folder() / "large-store")
        shutil.copytree(built / "data", folder / "data")
        yield folder, json.loads((built / "logins.json").read_text())


def _built_store(folder: Path) -> Path:
    """Builds the large store in the folder if no test process has done so yet. Returns the folder."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "logins.json").exists():
            shutil.rmtree(folder / "data", ignore_errors=True)
            logins = large_store.build(folder / "data")
            (folder / "logins.json").write_text(json.dumps(logins))
    return folder


@pytest.fixture(scope="module")
def site(store: tuple[Path, Mapping[str, str]]) -> Iterator[AttackedSite]:
    """Runs the server during the tests of the module."""
    with running_site(*store) as started:
        attacks_manifests.prepare(started)
        yield started
