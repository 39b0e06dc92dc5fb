"""Kills processes before the durable steps (changes of the disk) of a scrub, the job that reads all blobs and moves
damaged ones to the quarantine: `python -m tests.system.crash.killed_scrub FOLDER` (see `crash_runs`)."""

from __future__ import annotations

import random
import sys
from pathlib import Path

from storage.composition import open_registry, prepare_data_dir
from storage.content import Manifest, digest_of
from storage.data_dir.system import System
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import BY, image_of, push_blob
from tests.fakes.scrub_runs import cut, delete, file_of, flip_byte, scrub
from tests.system.crash.crash_runs import die_before_each_step
from tests.system.crash.durable_steps import BOOT

APP = RepositoryName("team/app")
BODIES = {name: random.Random(name).randbytes(20_000) for name in ("whole", "flipped", "cut", "deleted", "last")}
"""The content of the blobs, by the damage that the test does to them."""
QUARANTINE_BYTES = 30_000
"""The size of the quarantine. It holds one damaged blob, so the scrub has to delete the others."""
DAMAGE = {"flipped": flip_byte, "cut": cut, "deleted": delete}
"""The functions that damage the file of a blob, by the name of the blob."""


def digest(name: str) -> Digest:
    return digest_of(BODIES[name])


async def push_all(registry: StoredRegistry) -> Manifest:
    """Pushes an image whose config and layers are all blobs of `BODIES`."""
    layers = [await push_blob(registry, APP, body) for body in BODIES.values()]
    manifest = image_of(layers[0], layers[1:])
    await registry.put_manifest(APP, manifest, [Tag("latest")], by=BY)
    return manifest


async def make_damaged_store(data: Path) -> None:
    """Stores an image with four damaged blobs. The damage of the blob `last` is recorded already, but its bytes are not
    in the quarantine, as if an earlier process had been killed between these two steps."""
    prepare_data_dir(data)
    async with open_registry(data, boot=BOOT) as registry:
        await push_all(registry)
        for name, damage in DAMAGE.items():
            damage(file_of(registry, digest(name)))
        flip_byte(file_of(registry, digest("last")))
        place = await registry.damage.place_of(digest("last"))
        assert place
        await registry.damage.mark_blob_damaged(
            digest("last"), place, "test", registry.blobs.quarantine_place(digest("last"))
        )


async def run(data: Path, system: System) -> None:
    """Scrubs the damaged store."""
    async with open_registry(data, boot=BOOT, system=system) as registry:
        await scrub(registry, quarantine_bytes=QUARANTINE_BYTES)


if __name__ == "__main__":
    die_before_each_step(Path(sys.argv[1]), run)
