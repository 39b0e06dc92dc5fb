"""Fixtures of the attacked server. Each test module starts its own server. The large store is built once for all
modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.fakes.temporary_files import disk_folder
from tests.system.hostile import attacks_manifests, large_store
from tests.system.hostile.attacked_site import AttackedSite, running_site


@pytest.fixture(scope="session")
def store() -> Iterator[tuple[Path, Mapping[str, str]]]:
    """Yields the folder of a large store, and the Authorization headers of its accounts."""
    with disk_folder() as folder:
        yield folder, large_store.build(folder / "data")


@pytest.fixture(scope="module")
def site(store: tuple[Path, Mapping[str, str]]) -> Iterator[AttackedSite]:
    """Runs the server during the tests of the module."""
    with running_site(*store) as started:
        attacks_manifests.prepare(started)
        yield started
