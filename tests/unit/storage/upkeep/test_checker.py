"""The consistency check of a store. It reports each kind of damage with a problem code. A repair mends the damage that
can be repaired without loss of content, and a check after it finds no problem."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.consistency import ProblemCode
from storage.content import digest_of
from storage.damage import UPKEEP_ACTOR
from storage.errors import BlobUnknown, ManifestUnknown, StorageFailed
from storage.jobs import JobStopped
from storage.names import Tag
from storage.outbox import CHANGE_ACTIONS, LIST_READER, EventAction, EventReader
from storage.patterns import ALL_NAMES
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, ConfirmedProblem
from storage.upkeep.usage_counting import configure_and_count
from storage.usage import ScopeDefinition
from tests.fakes.damaged_store import (
    APP,
    LAYER,
    MAX_LOOP_SECONDS,
    OTHER,
    DamagedStore,
    count_usage,
    cut_file,
    flip_byte,
    leave_stray,
    lose_child_reference,
    lose_file,
    lose_link,
    lose_linked_blob,
    lose_linked_repository,
    lose_place,
    lose_queued_blob,
    lose_queued_link,
    lose_reference,
    lose_tagged_manifest,
    reference_of_nothing,
    rot_manifest,
    tag_of_other_repository,
    wrong_count,
    wrong_fields,
    wrong_reference,
    wrong_size,
    wrong_usage_links,
    wrong_usage_totals,
)
from tests.fakes.loop_hold import watch_loop
from tests.fakes.registry_content import BY, index_of, push_blob, push_image, read_blob
from tests.fakes.scrub_runs import scrub
from tests.fakes.second_connection import second_connection


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[DamagedStore]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as store:
        image = await push_image(store, APP, "image", "latest")
        children = [await push_image(store, APP, f"child {number}") for number in range(2)]
        index = index_of([child.descriptor for child in children])
        await store.put_manifest(APP, index, [Tag("multi")], by=BY)
        await push_image(store, APP, "signature", subject=image.digest)
        await store.mount_blob(OTHER, digest_of(LAYER), APP, by=BY)
        db = second_connection(tmp_path / "data" / "entrepot.db")
        yield DamagedStore(store, tmp_path / "data", db, image, index, children)
        db.close()


async def findings(store: StoredRegistry, *, damaged: int | None = None, **options: Any) -> list[ConfirmedProblem]:
    """Checks the store, and returns the findings. `damaged`: the expected number of blobs and manifests that are known
    to be damaged."""
    reported: list[ConfirmedProblem] = []
    progress: list[tuple[int, int]] = []

    async def on_problem(finding: ConfirmedProblem) -> None:
        reported.append(finding)

    async def on_progress(done: int, total: int, message: str) -> None:
        progress.append((done, total))

    report = await store.checker.check(CheckOptions(**options), on_problem, on_progress)
    assert sum(report.found.values()) == len(reported)
    assert damaged in (None, report.damaged)
    assert report.repaired == sum(finding.repair is not None for finding in reported)
    assert progress == sorted(progress)
    assert all(done <= total for done, total in progress)
    return reported


def codes(found: list[ConfirmedProblem]) -> set[ProblemCode]:
    return {finding.problem.code for finding in found}


async def test_a_sound_store_has_no_findings(site: DamagedStore) -> None:
    """A check of a store without damage finds no problem, even if all bytes are hashed. A repair changes nothing."""
    rows_before = site.rows()
    assert await findings(site.store, hash_bytes=True, repair=True) == []
    assert site.rows() == rows_before


REPAIRABLE_DAMAGE: dict[Callable[[DamagedStore], None], ProblemCode] = {
    lose_file: ProblemCode.BLOB_FILE_MISSING,
    cut_file: ProblemCode.BLOB_FILE_SIZE,
    wrong_size: ProblemCode.BLOB_FILE_SIZE,
    flip_byte: ProblemCode.BLOB_FILE_DIGEST,
    lose_place: ProblemCode.BLOB_PLACE,
    leave_stray: ProblemCode.STRAY,
    lose_queued_link: ProblemCode.LINK_NOT_QUEUED,
    lose_queued_blob: ProblemCode.BLOB_NOT_QUEUED,
    lose_linked_blob: ProblemCode.LINK_WITHOUT_BLOB,
    lose_linked_repository: ProblemCode.LINK_WITHOUT_REPOSITORY,
    lose_link: ProblemCode.MANIFEST_BLOB_MISSING,
    wrong_count: ProblemCode.REPOSITORY_COUNT,
    lose_tagged_manifest: ProblemCode.TAG_WITHOUT_MANIFEST,
    tag_of_other_repository: ProblemCode.TAG_WITHOUT_MANIFEST,
    lose_reference: ProblemCode.MANIFEST_REFERENCES,
    lose_child_reference: ProblemCode.MANIFEST_REFERENCES,
    wrong_reference: ProblemCode.MANIFEST_REFERENCES,
    reference_of_nothing: ProblemCode.REFERENCE_WITHOUT_MANIFEST,
    rot_manifest: ProblemCode.MANIFEST_DIGEST,
    wrong_fields: ProblemCode.MANIFEST_FIELDS,
    wrong_usage_links: ProblemCode.USAGE_LINKS,
    wrong_usage_totals: ProblemCode.USAGE_TOTALS,
}


@pytest.mark.parametrize("damage", REPAIRABLE_DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.slow
async def test_damage_is_found_and_repaired(site: DamagedStore, damage: Callable[[DamagedStore], None]) -> None:
    """A check without `repair` reports the damage and changes nothing. A repair mends the damage. After it, a check
    finds no problem, and all manifests and tags exist."""
    hash_bytes = damage is flip_byte  # only a check that hashes the bytes finds a changed byte
    manifests = site.run("SELECT count(*) FROM manifest")
    damage(site)
    manifests = max(manifests, site.run("SELECT count(*) FROM manifest"))
    rows_before = site.rows()

    reported = await findings(site.store, hash_bytes=hash_bytes)
    assert REPAIRABLE_DAMAGE[damage] in codes(reported)
    assert all(finding.repair is None and finding.problem.text for finding in reported)
    assert site.rows() == rows_before

    repaired = await findings(site.store, hash_bytes=hash_bytes, repair=True)
    assert REPAIRABLE_DAMAGE[damage] in codes(repaired)
    assert all(finding.repair for finding in repaired), repaired
    assert await findings(site.store, hash_bytes=hash_bytes) == []
    assert site.run("SELECT count(*) FROM manifest") == manifests
    tags: list[Any] = site.db.execute(
        "SELECT t.name, m.digest FROM tag t JOIN manifest m ON m.id = t.manifest"
    ).fetchall()
    assert dict(tags) == {"latest": site.image.digest, "multi": site.index.digest}


async def test_a_repaired_tag_has_an_event(site: DamagedStore) -> None:
    """When a repair makes a tag point at a manifest again, it adds an event with the reason."""
    await site.store.outbox.configure([EventReader(LIST_READER, CHANGE_ACTIONS, ("**",))])
    lose_tagged_manifest(site)
    await findings(site.store, repair=True)
    (event,) = [event.content for event in (await site.store.outbox.after(0, 10)).events]
    assert (event.action, event.repository, event.tag) == (EventAction.MOVE, APP, "latest")
    assert (event.digest, event.size, event.by) == (site.image.digest, len(site.image.body), UPKEEP_ACTOR)
    assert event.reason


async def test_a_corrected_size_corrects_the_usage_counts(site: DamagedStore) -> None:
    """When a repair corrects the recorded size of a blob, it also corrects the counts of used bytes."""
    wrong_size(site)
    count_usage(site)
    assert codes(await findings(site.store, repair=True)) == {ProblemCode.BLOB_FILE_SIZE}
    assert await findings(site.store) == []


async def test_a_repair_that_the_database_refuses_is_skipped(site: DamagedStore) -> None:
    """If the database refuses a repair, for example a link that would exceed a quota, the repair is skipped and the
    problem is reported. Other problems are repaired."""
    lose_link(site)
    wrong_count(site)
    quota = ScopeDefinition("quota team/app", (APP,), max_bytes=1)
    await configure_and_count(site.store.usage, site.store.leases, [quota])
    reported = await findings(site.store, repair=True)
    assert {finding.problem.code for finding in reported if finding.repair is None} == {
        ProblemCode.MANIFEST_BLOB_MISSING
    }
    assert codes(await findings(site.store)) == {ProblemCode.MANIFEST_BLOB_MISSING}


async def test_a_repaired_index_has_all_its_manifests(site: DamagedStore) -> None:
    """After a repair, the store has the relation of an index to all manifests that it lists, and a referrer is listed
    for its subject again."""
    lose_child_reference(site)
    wrong_fields(site)
    await findings(site.store, repair=True)
    children = site.db.execute("SELECT digest FROM manifest_child WHERE manifest = ?", (site.manifest_id(site.index),))
    assert {digest for (digest,) in children} == {child.digest for child in site.children}
    assert len((await site.store.referrers(APP, site.image.digest, None, None, 10)).items) == 1


def bad_digest(site: DamagedStore) -> None:
    site.run("UPDATE manifest SET digest = 'none' WHERE id = ?", site.manifest_id(site.image))


def lose_child(site: DamagedStore) -> None:
    manifest = site.manifest_id(site.children[0])
    for table, column in (("manifest_blob", "manifest"), ("manifest", "id")):
        site.run(f"DELETE FROM {table} WHERE {column} = ?", manifest)
    site.run("UPDATE repository SET manifests = manifests - 1 WHERE name = ?", APP)
    site.run("INSERT OR IGNORE INTO collect_queue SELECT 1, b.digest, 0 FROM blob b")


def lose_repository(site: DamagedStore) -> None:
    site.run("DELETE FROM repository WHERE name = ?", APP)


def lose_whole_blob(site: DamagedStore) -> None:
    site.run("DELETE FROM blob_link WHERE blob = (SELECT id FROM blob WHERE digest = ?)", digest_of(LAYER))
    site.run("DELETE FROM blob WHERE digest = ?", digest_of(LAYER))


def lose_history(site: DamagedStore) -> None:
    site.run("DELETE FROM tag_history")
    lose_tagged_manifest(site)


UNREPAIRABLE_DAMAGE: dict[Callable[[DamagedStore], None], set[ProblemCode]] = {
    bad_digest: {ProblemCode.MANIFEST_DIGEST},
    lose_child: {ProblemCode.INDEX_CHILD_MISSING},
    lose_repository: {
        ProblemCode.MANIFEST_WITHOUT_REPOSITORY, ProblemCode.TAG_WITHOUT_REPOSITORY,
        ProblemCode.LINK_WITHOUT_REPOSITORY,
    },
    lose_whole_blob: {ProblemCode.MANIFEST_BLOB_MISSING},
    lose_history: {ProblemCode.TAG_WITHOUT_MANIFEST},
}  # fmt: skip


@pytest.mark.parametrize("damage", UNREPAIRABLE_DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.slow
async def test_unrepairable_damage_is_not_changed(site: DamagedStore, damage: Callable[[DamagedStore], None]) -> None:
    """A problem that cannot be repaired is reported by each check, and a repair does not change its rows."""
    damage(site)
    rows_before = {name: rows for name, rows in site.rows().items() if name in ("manifest", "tag", "blob_link")}
    for repair in (False, True, True):
        unrepaired = [finding for finding in await findings(site.store, repair=repair) if finding.repair is None]
        assert codes(unrepaired) >= UNREPAIRABLE_DAMAGE[damage]
    assert {name: rows for name, rows in site.rows().items() if name in rows_before} == rows_before


@pytest.mark.parametrize("damage", [lose_file, cut_file, flip_byte])
@pytest.mark.slow
async def test_a_push_replaces_damaged_bytes_after_a_repair(
    site: DamagedStore, damage: Callable[[DamagedStore], None]
) -> None:
    """After a repair, a damaged blob is marked as damaged and not served, and its bytes are in the quarantine. Later
    checks do not report the blob. A push of the blob stores the right bytes again."""
    damage(site)
    bytes_before = None if damage is lose_file else site.file(digest_of(LAYER)).read_bytes()
    [finding] = await findings(site.store, hash_bytes=True, repair=True)
    [damaged] = (await site.store.damage.damaged_blobs(None, 10)).items
    quarantined = await site.store.blobs.list_quarantine()

    assert finding.repair is not None
    assert (damaged.digest, damaged.size, set(damaged.repositories)) == (digest_of(LAYER), len(LAYER), {APP, OTHER})
    assert [(site.data / item.place).read_bytes() for item in quarantined] == ([bytes_before] if bytes_before else [])
    assert damaged.quarantine_place == (quarantined[0].place if quarantined else "")
    assert site.data / damaged.former_place == site.file(digest_of(LAYER))
    assert site.run("SELECT count(*) FROM audit WHERE action = 'blob.damaged'") == 2
    assert not site.file(digest_of(LAYER)).exists()
    with pytest.raises(BlobUnknown, match="damaged"):
        await read_blob(site.store, APP, digest_of(LAYER))
    for repair in (False, True):
        assert await findings(site.store, hash_bytes=True, repair=repair, damaged=1) == []

    await push_blob(site.store, APP, LAYER)
    assert await read_blob(site.store, APP, digest_of(LAYER)) == LAYER
    assert await findings(site.store, hash_bytes=True) == []


async def test_a_repair_marks_a_damaged_manifest(site: DamagedStore) -> None:
    """A repair marks a damaged manifest as damaged, as a scrub does. Its blobs stay. A push of the manifest makes it
    available again."""
    rot_manifest(site)
    [finding] = await findings(site.store, repair=True)
    [damaged] = await site.store.damage.damaged_manifests(10)

    assert (finding.problem.code, damaged.digest) == (ProblemCode.MANIFEST_DIGEST, site.image.digest)
    with pytest.raises(ManifestUnknown, match="push the image again"):
        await site.store.get_manifest(APP, Tag("latest"))
    assert await findings(site.store, hash_bytes=True, repair=True, damaged=1) == []

    await site.store.put_manifest(APP, site.image, by=BY)
    assert (await site.store.get_manifest(APP, Tag("latest"))).body == site.image.body
    assert await findings(site.store) == []


async def test_damage_that_scrub_has_marked_is_not_reported(site: DamagedStore) -> None:
    """A check counts content that a scrub has marked as damaged, but does not report it as a problem. After a repair,
    the next scrub finds no new damage."""
    flip_byte(site)
    rot_manifest(site)
    await scrub(site.store)
    for repair in (False, True):
        assert await findings(site.store, hash_bytes=True, repair=repair, damaged=2) == []
    result, _ = await scrub(site.store)
    assert (result["damaged"], await site.store.damage.damaged_count()) == (0, 2)


async def test_a_repair_limits_the_size_of_the_quarantine(site: DamagedStore) -> None:
    """If the quarantine becomes too large during a repair, the oldest bytes in it are deleted."""
    for blob in (LAYER, b"layer of child 0", b"layer of child 1"):
        site.file(digest_of(blob)).write_bytes(b"X" + blob[1:])
    size = len(b"layer of child 1")
    assert len(await findings(site.store, hash_bytes=True, repair=True, max_quarantine_bytes=size)) == 3
    assert [item.digest for item in await site.store.blobs.list_quarantine()] == [digest_of(b"layer of child 1")]


@pytest.mark.full_store
async def test_an_unmounted_directory_is_no_damage(site: DamagedStore) -> None:
    """If the directory of a blob does not exist, for example because its file system is not mounted, a repair ends with
    an error. No blob is marked as damaged."""
    folder = site.file(digest_of(LAYER)).parent
    folder.rename(site.data / "elsewhere")
    with pytest.raises(StorageFailed, match="is its file system mounted"):
        await findings(site.store, repair=True)
    (site.data / "elsewhere").rename(folder)
    assert await findings(site.store) == []


async def test_missing_content_of_a_mirrored_repository_is_no_problem(site: DamagedStore) -> None:
    """A mirrored repository may lack content, because a mirror fetches it on request. This holds if the repository's
    upstream is in the settings, and also if only the records in the store show that it was mirrored."""
    lose_whole_blob(site)
    lose_child(site)
    assert await findings(site.store, is_mirrored=lambda name: name == APP) == []
    assert len(await findings(site.store)) == 2
    site.run("INSERT INTO upstream_check VALUES (?, 'latest', 0, 1)", APP)
    assert await findings(site.store) == []


async def test_new_files_without_a_row_are_no_problem(site: DamagedStore) -> None:
    """A file that was just written may have no row in the database, because a push that is in progress adds the row
    later."""
    path = site.file(digest_of(b"just written"))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"just written")
    assert await findings(site.store, repair=True) == []


async def test_a_damaged_database_is_the_only_finding(site: DamagedStore) -> None:
    """If SQLite finds that the database is damaged, the check reports this and ends, because further results from the
    database cannot be trusted."""
    site.db.execute("PRAGMA writable_schema = ON")
    site.db.execute("UPDATE sqlite_schema SET rootpage = 2 WHERE name = 'tag_manifest'")
    site.db.execute("PRAGMA writable_schema = RESET")
    reported = await findings(site.store)
    assert codes(reported) == {ProblemCode.DATABASE}
    assert all("restore the database from a backup" in finding.problem.text for finding in reported)


@pytest.mark.parametrize("damage", ["DELETE FROM search_word_data", "DELETE FROM search_word_config"])
async def test_a_damaged_search_index(site: DamagedStore, damage: str) -> None:
    """If only the search index is damaged, the check also reports other problems. A repair deletes the index, and the
    server builds it again."""
    await site.store.search_indexer.run()
    site.db.execute(damage)
    site.run("DELETE FROM collect_queue")
    reported = await findings(site.store)
    assert codes(reported) >= {ProblemCode.SEARCH_INDEX, ProblemCode.LINK_NOT_QUEUED}
    await findings(site.store, repair=True)
    assert await findings(site.store) == []
    await site.store.search_indexer.run()
    assert (await site.store.search.find_tags(["latest"], ALL_NAMES, 0, 10)).items


async def test_a_changed_search_index(site: DamagedStore) -> None:
    """What another process has changed in the search index since the last check of this process is no damage."""
    await site.store.search_indexer.run()
    assert ProblemCode.SEARCH_INDEX not in codes(await findings(site.store))
    for row in range(1000, 1010):
        site.db.execute("INSERT INTO search_name (rowid, name) VALUES (?, 'team/other')", (row,))
    site.db.execute("INSERT INTO search_name (search_name) VALUES ('optimize')")  # merges what the check has seen
    assert ProblemCode.SEARCH_INDEX not in codes(await findings(site.store))


async def test_a_check_can_be_stopped(site: DamagedStore) -> None:
    """A check can be stopped while it runs, when it reports its progress."""

    async def stop(done: int, total: int, message: str) -> None:
        if done:
            raise JobStopped

    async def ignore(finding: ConfirmedProblem) -> None:
        pass

    with pytest.raises(JobStopped):
        await site.store.checker.check(CheckOptions(), ignore, stop)


@pytest.fixture
def wrong_row_count(site: DamagedStore) -> int:
    """Adds so many wrong rows to several tables that the check reads several pages of each table. Returns the number of
    rows."""
    count = 1300
    with site.db:
        for row in range(count):
            digest = digest_of(str(row).encode())
            site.run("INSERT INTO blob VALUES (?, ?, 1, '', 0)", 1000 + row, digest)
            site.run("INSERT INTO blob_link VALUES (2, ?, 0, 1)", 1000 + row)
            site.run("INSERT INTO damaged_blob VALUES (?, 0, '', '', '')", digest)
            site.run("INSERT INTO tag VALUES (2, ?, 9999, 0)", f"t{row}")
    return count


@pytest.mark.slow
async def test_every_page_is_checked(site: DamagedStore, wrong_row_count: int) -> None:
    """All pages of each table are checked. Meanwhile the event loop is not blocked for long."""
    async with watch_loop() as held:
        reported = await findings(site.store)
    assert held.longest < MAX_LOOP_SECONDS
    for code in (ProblemCode.LINK_NOT_QUEUED, ProblemCode.TAG_WITHOUT_MANIFEST):
        items = [finding.problem.item for finding in reported if finding.problem.code is code]
        assert len(items) == len(set(items)) == wrong_row_count
