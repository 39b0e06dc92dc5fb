"""Retention of imported content. Tags keep their age, but this registry does not know the pulls at the old registry. So
imported content counts as pulled and pushed at the time of its import."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from storage.content import Actor
from storage.errors import ManifestUnknown
from storage.names import Digest, Tag
from storage.pulls import PullRecord
from storage.store.stored_registry import StoredRegistry
from tests.fakes.import_run import ImportRun
from tests.fakes.old_directory import OldDirectory
from tests.fakes.registry_content import all_tags
from tests.fakes.retention_run import RetentionRun, rule
from tests.fakes.upkeep_store import DAY, START, Clock, clocked_store, pull
from tests.fakes.upstream_content import ImageTree, noise_image
from tests.unit.registry.migration.directory_import.conftest import APP

RULE = rule(keep_last=2, keep_pulled_within="14d", delete_untagged_after="7d")
OLD = START - 100 * DAY


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[StoredRegistry]:
    async with clocked_store(tmp_path / "data", clock) as opened:
        yield opened


def push_old(registry: OldDirectory, number: int, *tags: str) -> ImageTree:
    """Writes an image that was pushed to the old registry 100 days ago, plus `number` hours."""
    image = registry.push(APP, noise_image(f"image {number}", 10), *tags)
    at = OLD + number * 3600
    registry.write_link(registry.revision(APP, image.digest), image.digest, at=at)
    for tag in tags:
        registry.write_link(registry.tag(APP, tag), image.digest, at=at)
    return image


async def has_manifest(store: StoredRegistry, image: ImageTree) -> bool:
    try:
        await store.resolve_manifest(APP, Digest(image.digest))
    except ManifestUnknown:
        return False
    return True


async def test_nothing_is_deleted_just_after_an_import(
    store: StoredRegistry, clock: Clock, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """Imported tags and untagged manifests stay for `keep_pulled_within` and `delete_untagged_after` after the import,
    however old they are. A second import that changes nothing does not extend this time."""
    for number in range(4):
        push_old(old_registry, number, f"b{number}")
    untagged = push_old(old_registry, 4)
    await run_import()
    run = RetentionRun(store, clock, RULE)
    clock.now += 1

    result = await run()

    assert (result["tags_deleted"], result["manifests_deleted"]) == (0, 0)
    kept, _ = await run.preview()
    assert kept == {f"b{number}": True for number in range(4)}
    clock.pass_days(13)
    await run_import()
    assert (await run())["tags_deleted"] == 0
    assert await has_manifest(store, untagged)
    clock.pass_days(2)
    await run()
    assert await all_tags(store, APP) == ["b2", "b3"]
    assert not await has_manifest(store, untagged)


async def test_an_imported_tag_counts_as_pushed_when_imported(
    store: StoredRegistry, clock: Clock, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """An old tag stays for `keep_pushed_within` after its import, also if it was pulled meanwhile. For `keep_last`, it
    keeps its age."""
    images = [push_old(old_registry, number, f"b{number}") for number in range(3)]
    await run_import()
    await pull(store, APP, Digest(images[0].digest), clock)
    run = RetentionRun(store, clock, rule(keep_last=1, keep_pushed_within="30d"))
    clock.pass_days(29)
    assert (await run())["tags_deleted"] == 0
    clock.pass_days(2)
    await run()
    assert await all_tags(store, APP) == ["b2"]


async def test_a_tag_whose_import_is_not_recorded_yet_counts_as_imported(
    store: StoredRegistry, tmp_path: Path, clock: Clock, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """An import sets a tag, and then records its age and the import of its image. Retention may run between the two, or
    the import may be killed there."""
    push_old(old_registry, 0, "b0")
    push_old(old_registry, 1, "mine")
    await run_import()
    with closing(apsw.Connection(str(tmp_path / "data" / "entrepot.db"))) as db:  # as if nothing had been recorded
        db.execute("DELETE FROM manifest_pull; UPDATE tag SET updated = ?", (START,))
        db.execute("UPDATE tag_history SET user_agent = 'docker' WHERE tag = 'mine'")
    clock.pass_days(1)
    await RetentionRun(store, clock, rule(keep_pulled_within="14d"))()
    assert await all_tags(store, APP) == ["b0"]
    clock.now = START - DAY  # the import ran while the clock was ahead
    [tag] = await store.retention.tag_facts(APP, None)
    assert (tag.imported, tag.unrecorded_until) == (None, None)


async def test_imported_content_waits_for_the_first_start_of_a_server(
    store: StoredRegistry, clock: Clock, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """If the first server starts only weeks after an import, its first run of retention deletes nothing, because
    nobody could pull before."""
    for number in range(3):
        push_old(old_registry, number, f"b{number}")
    await run_import()
    clock.pass_days(20)
    await store.pulls.mark_pulls_recorded(clock())
    assert (await RetentionRun(store, clock, RULE)())["tags_deleted"] == 0


async def test_an_import_is_no_pull(
    store: StoredRegistry, clock: Clock, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """An import is not counted among the pulls, and the first pull after it is the first one."""
    image = push_old(old_registry, 0, "1")
    await run_import()
    [tag] = await store.retention.tag_facts(APP, None)
    assert (tag.pulled, tag.unrecorded_until, tag.pushed) == (None, START, OLD)
    assert await store.pulls.record_of(APP, Digest(image.digest)) == PullRecord("", START, 0)
    clock.pass_days(1)
    await pull(store, APP, Digest(image.digest), clock)
    assert await store.pulls.record_of(APP, Digest(image.digest)) == PullRecord("", START + DAY, 1)
    [tag] = await store.retention.tag_facts(APP, None)
    assert (tag.pulled, tag.unrecorded_until) == (START + DAY, None)


async def test_a_tag_that_moves_at_the_old_registry_counts_again(
    store: StoredRegistry, clock: Clock, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """If a later import moves a tag, also to a manifest that an earlier import has brought, the tag counts as pulled at
    the later import. Its time is not earlier than that of its change before."""
    image = push_old(old_registry, 0, "1")
    push_old(old_registry, 1, "2")
    await run_import()
    clock.pass_days(20)
    old_registry.write_link(old_registry.tag(APP, "2"), image.digest, at=OLD + 2 * 3600)
    await run_import()
    moved = (await store.retention.tag_facts(APP, None))[1]
    assert (moved.digest, moved.unrecorded_until, moved.pushed) == (image.digest, START + 20 * DAY, START)


async def test_a_tag_that_retention_has_deleted_is_not_imported_again(
    store: StoredRegistry, clock: Clock, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """An import leaves a tag alone that retention has deleted here, as long as the tag of the old registry points at
    an image that the tag has had here. Neither the tag nor its manifest comes back to be deleted again. The same holds
    for untagged manifests."""
    images = [push_old(old_registry, number, f"b{number}") for number in range(3)]
    untagged = push_old(old_registry, 3)
    await run_import()
    clock.pass_days(15)
    run = RetentionRun(store, clock, RULE)
    assert (await run())["tags_deleted"] == 1
    clock.pass_days(8)  # the manifest of a deleted tag stays for a while
    await run()
    assert not await has_manifest(store, images[0])
    result = await run_import()
    assert (result["tags"], result["manifests"]) == (0, 0)
    reason = (
        "the tag stays deleted: entrepot retention has deleted it here after it had pointed at the same image as at "
        "the old registry"
    )
    assert ("team/app:b0", reason) in run_import.reports("note")
    reason = "manifests that retention has deleted here stay deleted: 2"
    assert ("team/app:", reason) in run_import.reports("note")
    assert not await has_manifest(store, images[0])
    assert not await has_manifest(store, untagged)
    result = await run_import(overwrite=True)
    assert (result["tags"], result["manifests"]) == (1, 2)
    assert await all_tags(store, APP) == ["b0", "b1", "b2"]


async def test_a_tag_that_moved_after_retention_has_deleted_it_is_imported(
    store: StoredRegistry, clock: Clock, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """If the tag of the old registry has moved to another image since retention has deleted it here, the next import
    brings it. A tag that a user has deleted stays deleted."""
    for number in range(4):
        push_old(old_registry, number, f"b{number}")
    await run_import()
    clock.pass_days(15)
    await RetentionRun(store, clock, RULE)()
    await store.delete_tag(APP, Tag("b2"), by=Actor("ann"))
    new = push_old(old_registry, 10, "b0", "b2")
    await run_import()
    assert await all_tags(store, APP) == ["b0", "b3"]
    assert (await store.resolve_manifest(APP, Tag("b0"))).digest == new.digest
    [moved, _] = await store.retention.tag_facts(APP, None)
    assert moved.pushed == clock()


async def test_a_second_import_completes_the_records_of_an_interrupted_one(
    store: StoredRegistry, tmp_path: Path, clock: Clock, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """If an import was killed just after it had set a tag, or a power cut took its last records, the next import gives
    the tag its time, and counts its image as pulled. It does this once, and not for tags that clients have pushed."""
    for number in range(3):
        push_old(old_registry, number, f"b{number}")
    push_old(old_registry, 3, "mine")
    await run_import()
    with closing(apsw.Connection(str(tmp_path / "data" / "entrepot.db"))) as db:  # as if the records had been lost
        db.execute("DELETE FROM manifest_pull; UPDATE tag SET updated = ?", (START,))
        db.execute("UPDATE tag_history SET user_agent = 'docker' WHERE tag = 'mine'")
    clock.pass_days(1)
    result = await run_import()
    assert result["present"] == 4
    facts = [(tag.pushed, tag.unrecorded_until) for tag in await store.retention.tag_facts(APP, None)]
    expected = [(OLD + number * 3600, START + DAY) for number in range(3)]
    assert facts == [*expected, (START, None)]
    clock.pass_days(1)
    await run_import()
    assert [tag.unrecorded_until for tag in await store.retention.tag_facts(APP, None)] == [*3 * [START + DAY], None]
