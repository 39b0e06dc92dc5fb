"""The arguments of an import of a directory: its path, and patterns that choose repositories."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.imports import ImportInvalid
from storage.store.stored_registry import StoredRegistry
from tests.fakes.import_run import ImportRun
from tests.fakes.old_directory import OldDirectory
from tests.fakes.upstream_content import noise_image
from tests.unit.registry.migration.directory_import.conftest import APP


@pytest.mark.parametrize("below", ["", "docker", "docker/registry", "docker/registry/v2"])
async def test_the_path_may_name_any_directory_of_the_layout(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, below: str
) -> None:
    """The path may be the root directory of the old registry, or `docker`, `docker/registry` or `docker/registry/v2`
    below it."""
    old_registry.push(APP, noise_image("found", 10), "1")
    assert (await run_import(path=str(old_registry.path / below)))["tags"] == 1


async def test_chosen_repositories(store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun) -> None:
    """The arguments `include` and `exclude` choose repositories by patterns. A repository whose name belongs to a
    mirror is reported and not imported."""
    for number, name in enumerate(("team/app", "team/tmp-1", "other", "ghcr.io/x")):
        old_registry.push(name, noise_image(str(number), 10), "1")

    await run_import(include=["team/**", "none/**"], exclude=["team/tmp-*"], upstreams=("ghcr.io",))
    assert (await store.repositories(None, 10)).items == ["team/app"]
    # The note is about no repository and no tag, so `reports` returns ":" (`repository:tag`) without names.
    assert run_import.reports("note") == [(":", "the pattern none/** matches no repository of the old registry")]

    await run_import(upstreams=("ghcr.io",))
    assert run_import.reports() == [("ghcr.io/x:", "in this registry, the name belongs to the mirror of ghcr.io")]
    assert (await store.repositories(None, 10)).items == ["other", "team/app", "team/tmp-1"]


async def test_invalid_paths_and_patterns_are_refused(
    store: StoredRegistry, run_import: ImportRun, tmp_path: Path
) -> None:
    """A path that is not the directory of a registry is refused, and so is a malformed pattern."""
    with pytest.raises(ImportInvalid, match="is no registry: name the directory that contains docker/registry/v2"):
        await run_import(path=str(tmp_path / "data"))
    with pytest.raises(ImportInvalid, match="is no directory"):
        await run_import(path=str(tmp_path / "none"))
    with pytest.raises(ImportInvalid, match="is not a pattern of names"):
        await run_import(include=["a b"])
