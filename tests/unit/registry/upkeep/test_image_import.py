"""The import of a file with images (`entrepot import FILE`) gives no repository a blob whose bytes the file lacks."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from registry.naming import NamingRules
from registry.router import Router
from registry.upkeep.images.file_sources import open_source
from registry.upkeep.images.found_images import find_images
from registry.upkeep.images.image_import import ImportName, import_images
from storage.backups import ImageFileFailed
from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor
from storage.errors import BlobUnknown
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.reporter import PlainReporter
from tests.fakes.client_images import image, layer, noise, write_layout

SECRET = image("secret", layer({"noise": noise("secret", 1000)}))
"""The image that an account without rights on its repository wants to read."""
SECRET_LAYER = SECRET.layers[-1]
EVIL = RepositoryName("evil/file")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as opened:
        yield opened


async def import_layout(store: StoredRegistry, layout: Path, name: str) -> Any:
    router = Router(store, {}, store.is_known_repository, NamingRules())
    reporter = PlainReporter(lambda _: None, lambda _: None)
    with open_source(layout) as source:
        content, by = find_images(source), Actor("cli:ann")
        return await import_images(router, content, ImportName.parse(name), by, reporter, store.imports)


async def assert_not_in_evil(store: StoredRegistry) -> None:
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(EVIL, Digest(SECRET_LAYER.digest))


async def test_file_without_a_blob_gives_no_blob_of_another_repository(store: StoredRegistry, tmp_path: Path) -> None:
    """The layout names a layer that it does not contain, and another repository has that layer. The import fails, and
    the repository does not get the layer."""
    layout = write_layout(tmp_path / "layout", {"v1": SECRET})
    await import_layout(store, layout, "bob/secret:v1")
    (layout / "blobs/sha256" / SECRET_LAYER.digest.partition(":")[2]).unlink()
    with pytest.raises(ImageFileFailed, match=f"is incomplete: it has no blob {SECRET_LAYER.digest}"):
        await import_layout(store, layout, "evil/file:v1")
    await assert_not_in_evil(store)


async def test_file_with_other_bytes_gives_no_blob_of_another_repository(store: StoredRegistry, tmp_path: Path) -> None:
    """The file of the layer has the right name and size, but other bytes than the layer in another repository. The
    import fails, and the repository does not get the layer."""
    layout = write_layout(tmp_path / "layout", {"v1": SECRET})
    await import_layout(store, layout, "bob/secret:v1")
    (layout / "blobs/sha256" / SECRET_LAYER.digest.partition(":")[2]).write_bytes(bytes(len(SECRET_LAYER.body)))
    with pytest.raises(ImageFileFailed, match=f"the blob {SECRET_LAYER.digest} is damaged"):
        await import_layout(store, layout, "evil/file:v1")
    await assert_not_in_evil(store)


async def test_blobs_of_another_repository_are_not_stored_again(store: StoredRegistry, tmp_path: Path) -> None:
    """If the file contains the blobs of an image that another repository has, the import adds them without storing
    their bytes again."""
    layout = write_layout(tmp_path / "layout", {"v1": SECRET})
    first = await import_layout(store, layout, "bob/secret:v1")
    assert (first["new_blobs"], first["present_blobs"]) == (len(SECRET.blobs), 0)
    second = await import_layout(store, layout, "team/copy:v1")
    assert (second["new_blobs"], second["present_blobs"], second["size"]) == (0, len(SECRET.blobs), 0)
    assert (await store.resolve_blob(RepositoryName("team/copy"), Digest(SECRET_LAYER.digest))).size
