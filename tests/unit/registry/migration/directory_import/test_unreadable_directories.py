"""Directories of the old registry that this process cannot list, because it has no permission or because the disk
fails."""

from __future__ import annotations

import errno
import os

import pytest

from storage.store.stored_registry import StoredRegistry
from tests.fakes.forbidden_files import ForbiddenFiles
from tests.fakes.import_run import ImportRun, assert_complete
from tests.fakes.old_directory import OldDirectory
from tests.fakes.upstream_content import noise_image
from tests.unit.registry.migration.directory_import.conftest import APP


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize(
    ("directory", "problems"),
    [
        ("_manifests", {"": "its directory _manifests/tags cannot be read"}),
        ("_manifests/tags", {"": "its directory _manifests/tags cannot be read"}),
        (
            "_manifests/revisions",
            {"": "its directory _manifests/revisions cannot be read", "v1": "the link of {digest} cannot be read"},
        ),
        ("_manifests/revisions/sha256", {"": "its directory _manifests/revisions/sha256 cannot be read"}),
        ("_layers", {"": "its directory _layers cannot be read", "v1": "the link of the blob {blob} cannot be read"}),
        ("_layers/sha256", {"": "its directory _layers/sha256 cannot be read"}),
    ],
)
@pytest.mark.slow
async def test_a_directory_that_cannot_be_listed_is_a_problem(
    store: StoredRegistry,
    old_registry: OldDirectory,
    run_import: ImportRun,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    directory: str,
    problems: dict[str, str],
) -> None:
    """A directory of a repository that cannot be listed is a problem with the system's reason. The import does not take
    it for an empty one, and imports the other repositories. Once the directory can be read, the next import brings
    what was missing."""
    image = old_registry.push(APP, noise_image("one", 10), "v1")
    other = old_registry.push("team/other", noise_image("two", 10), "v1")
    with monkeypatch.context() as patch:
        ForbiddenFiles(patch, number).paths.add(old_registry.root / "repositories" / APP / directory)
        result = await run_import()
    found = run_import.reports()
    assert result["problems"] == len(found) >= 1
    assert all("" not in step.values() for step in run_import.steps if step["event"] == "problem")
    for tag, text in problems.items():
        reason = text.format(digest=image.digest, blob=image.config.digest)
        assert (f"{APP}:{tag}", f"{reason}: {os.strerror(number)}") in found
    await assert_complete(store, "team/other", other)
    assert (await run_import())["problems"] == 0
    await assert_complete(store, APP, image)
    assert (await store.tags(APP, None, 20)).items == ["v1"]


async def test_unfinished_pushes_that_cannot_be_listed(
    old_registry: OldDirectory, run_import: ImportRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unfinished pushes are never imported. So it is only a note if they cannot be listed."""
    old_registry.push(APP, noise_image("one", 10), "v1")
    uploads = old_registry.root / "repositories" / APP / "_uploads"
    uploads.mkdir()
    with monkeypatch.context() as patch:
        ForbiddenFiles(patch).paths.add(uploads)
        result = await run_import()
    assert (result["tags"], result["problems"]) == (1, 0)
    assert (f"{APP}:", "its directory _uploads cannot be read: Permission denied") in run_import.reports("note")
