"""Fixtures for the tests of the import of the directory of a CNCF Distribution registry (the image registry:2). The
tests call it the old registry."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from registry.migration.directory_import import KIND, import_directory
from storage.composition import open_registry, prepare_data_dir
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.import_run import ImportRun
from tests.fakes.old_directory import OldDirectory

APP = RepositoryName("team/app")


@pytest.fixture
def old_registry(tmp_path: Path) -> OldDirectory:
    return OldDirectory(tmp_path / "old")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    data = tmp_path / "data"
    prepare_data_dir(data)
    async with open_registry(data) as opened:
        yield opened


@pytest.fixture
def run_import(store: StoredRegistry, old_registry: OldDirectory) -> ImportRun:
    return import_of(store, old_registry)


def import_of(store: StoredRegistry, old_registry: OldDirectory) -> ImportRun:
    return ImportRun(store, KIND, import_directory, path=str(old_registry.path))
