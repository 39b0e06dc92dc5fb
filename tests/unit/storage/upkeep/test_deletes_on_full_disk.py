"""Deletes of manifests on a full disk, where no copy for a restore can be stored."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import apsw

from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.system import System
from storage.names import RepositoryName, Tag
from storage.tag_history import Availability
from tests.fakes.registry_content import BY, all_tags, push_image

APP = RepositoryName("team/app")


class FullDisk(System):
    """A disk without space for any commit while `is_full` is true."""

    is_full = False

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        if self.is_full:
            raise apsw.FullError
        super().commit(commit, durable=durable)


async def test_a_manifest_is_deleted_without_a_copy_on_a_full_disk(tmp_path: Path) -> None:
    """A delete normally stores a copy of the manifest for a restore. On a full disk, the manifest is deleted without
    the copy, and a warning is logged."""
    disk = FullDisk()
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path, system=disk) as store:
        image = await push_image(store, APP, "first", "v1")
        logger = logging.getLogger("storage.metadata")
        messages: list[str] = []

        def free_some_space(record: logging.LogRecord) -> bool:  # so that the delete without a copy succeeds
            messages.append(record.getMessage())
            disk.is_full = False
            return True

        logger.addFilter(free_some_space)
        try:
            disk.is_full = True
            await store.delete_manifest(APP, image.digest, by=BY)
        finally:
            logger.removeFilter(free_some_space)
        assert messages == [
            f"the disk is too full to keep the deleted manifest {image.digest} of team/app; it cannot be put back"
        ]
        changes = (await store.tag_history.changes(APP, Tag("v1"), None, 10)).items
        assert changes[1].availability is Availability.GONE
        assert await all_tags(store, APP) == []
