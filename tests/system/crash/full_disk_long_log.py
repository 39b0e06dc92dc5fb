"""Fills a small disk when the log of its database is long, and then deletes everything: `python -m
tests.system.crash.full_disk_long_log FOLDER SIZE`.

SIZE is that of the file system. Run this program in its own mount namespace (`unshare --mount`), because it mounts a
file system on FOLDER/data.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
from pathlib import Path

from storage.composition import layout_of, open_registry, prepare_data_dir
from storage.content import OCI_INDEX, Manifest
from storage.metadata.sqlite.write_ahead_log import PAGE_BYTES, checkpoint_log_pages
from storage.names import RepositoryName, Tag
from tests.fakes.registry_content import BY
from tests.system.crash.full_disk_emptied import fill, mount

APP = RepositoryName("team/app")
MANIFEST_PAGES = 17
"""Number of pages in the log for a push of `new_manifest`, at least."""


def new_manifest() -> Manifest:
    annotations = {"unique": secrets.token_hex(30_000)}
    body = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [], "annotations": annotations}
    return Manifest.parse(json.dumps(body).encode(), OCI_INDEX)


async def main(folder: Path, size: str) -> None:
    data = folder / "data"
    mount(data, "tmpfs", size)
    prepare_data_dir(data)
    layout = layout_of(data)
    log_file = f"{layout.metadata}-wal"
    async with open_registry(data, starts_rounds=False) as registry:
        limit_bytes = (checkpoint_log_pages(layout.reserve.stat().st_size) - 2 * MANIFEST_PAGES) * PAGE_BYTES
        manifests: list[Manifest] = []
        while not manifests or os.stat(log_file).st_size < limit_bytes:
            manifests.append(new_manifest())
            await registry.put_manifest(APP, manifests[-1], [Tag(f"t{len(manifests)}")], by=BY)
        fill(data)
        for manifest in manifests:
            await registry.delete_manifest(APP, manifest.digest, by=BY)
        assert (await registry.tags(APP, None, 10)).items == []


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
