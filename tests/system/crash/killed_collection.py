"""Kills processes before the durable steps (changes of the disk) of garbage collections and of changes of tags: `python
-m tests.system.crash.killed_collection FOLDER` (see `crash_runs`). The store has deleted manifests and garbage."""

from __future__ import annotations

import sys
from pathlib import Path

from storage.composition import open_registry, prepare_data_dir
from storage.content import digest_of
from storage.data_dir.system import System
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.tag_changes import TagChanger
from tests.fakes.registry_content import BY, index_of, push_blob, push_image
from tests.fakes.upkeep_store import APP, START, Clock
from tests.system.crash.crash_runs import die_before_each_step
from tests.system.crash.durable_steps import BOOT

WEB = RepositoryName("team/web")
GRACE = 100.0
"""The number of seconds for which a deleted manifest can be restored."""
RESTORABLE = ("deleted", "family", "overwritten")
"""The tags of WEB that `run` restores to the manifest at which they pointed earlier."""


def tag_changes(store: StoredRegistry) -> TagChanger:
    return TagChanger(store.tag_history, store.immutable_tags)


async def make_store(data: Path) -> tuple[dict[str, Digest], Digest]:
    """Makes a store with everything that a collection can remove. Returns the digest to which each tag in
    `RESTORABLE` can be restored, and the digest of a manifest without a tag."""
    clock = Clock()
    prepare_data_dir(data)
    async with open_registry(data, boot=BOOT, clock=clock) as store:
        await push_image(store, APP, "kept", "kept")
        await push_image(store, WEB, "kept", "same")  # the same content in both repositories
        for number in range(2):
            expired = await push_image(store, APP, f"gone {number}", "gone")
            await store.delete_manifest(APP, expired.digest, by=BY)
        await push_blob(store, APP, b"without a manifest")
        writer = await store.start_upload(APP)
        await writer.write(b"abandoned")
        await writer.aclose()
        partial = await store.partials.claim(digest_of(b"half a blob"), 11)
        partial.write_at(0, b"half")
        partial.close()
        # The manifests that were deleted above can no longer be restored. Those that are deleted below can.
        clock.now += 2 * GRACE
        deleted = await push_image(store, WEB, "deleted", "deleted")
        await push_image(store, WEB, "signature", subject=deleted.digest)
        child = await push_image(store, WEB, "child")
        family = index_of([child.descriptor])
        await store.put_manifest(WEB, family, [Tag("family")], by=BY)
        overwritten = await push_image(store, WEB, "overwritten", "overwritten")
        overwriting = await push_image(store, WEB, "overwriting", "overwritten")
        for digest in (deleted.digest, family.digest, child.digest):
            await store.delete_manifest(WEB, digest, by=BY)
        await store.delete_manifest(WEB, overwritten.digest, by=BY)
    restorable = {"deleted": deleted.digest, "family": family.digest, "overwritten": overwritten.digest}
    return restorable, overwriting.digest


async def run(data: Path, system: System) -> None:
    """Collects garbage before the changes of tags, between them and after them. At the last collection, every grace
    period has ended."""
    clock = Clock(START + 2.5 * GRACE)
    async with open_registry(data, grace=GRACE, expire=GRACE, system=system, boot=BOOT, clock=clock) as store:
        await store.collector.collect()
        for tag in RESTORABLE:
            await tag_changes(store).restore(WEB, Tag(tag), by=BY)
        await tag_changes(store).move(WEB, Tag("moved"), Tag("deleted"), by=BY)
        await store.collector.collect()
        await store.delete_tag(WEB, Tag("moved"), by=BY)
        clock.now += 2 * GRACE
        await store.collector.collect()


if __name__ == "__main__":
    die_before_each_step(Path(sys.argv[1]), run)
