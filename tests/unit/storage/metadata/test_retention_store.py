"""How retention (the rules that delete old tags and manifests) reads and deletes in the store. An *orphan* is a
manifest that has no tag, that no index lists, and whose subject, if it names one, does not exist."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest

from storage.access import AuditQuery
from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor, Manifest, digest_of
from storage.data_dir.system import System, boot_id
from storage.errors import ManifestUnknown
from storage.metadata.sqlite.upkeep import sqlite_retention
from storage.names import Digest, Reference, RepositoryName, Tag
from storage.retention import LostTags, TagFacts, TagPosition, UnusedSince
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import nothing_immutable
from tests.fakes import written_data_dir as previous_release
from tests.fakes.registry_content import BY, all_tags, index_of, push_image
from tests.fakes.upkeep_store import APP, DAY, START, Clock, clocked_store, pull

RETENTION = Actor("entrepot retention")
OTHER = RepositoryName("team/other")


class FullDisk(System):
    """A disk that has no space while `is_full` is true."""

    is_full = False

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        if self.is_full:
            raise apsw.FullError
        super().commit(commit, durable=durable)


async def push_index(store: StoredRegistry, children: list[Manifest], *tags: str) -> Manifest:
    index = index_of([child.descriptor for child in children])
    await store.put_manifest(APP, index, [Tag(tag) for tag in tags], by=BY)
    return index


async def tag_facts(store: StoredRegistry, name: str) -> TagFacts:
    return next(tag for tag in await store.retention.tag_facts(APP, None) if tag.name == name)


async def unused_orphans(store: StoredRegistry, since: float) -> list[Digest]:
    """Returns the orphans that have not been pushed, tagged or pulled since this time."""
    page = await store.retention.unused_orphans(APP, UnusedSince(since, since, since), None, LostTags())
    assert page.next_after is None
    return [manifest.digest for manifest in page.items]


async def has_manifest(store: StoredRegistry, reference: Reference) -> bool:
    try:
        await store.resolve_manifest(APP, reference)
    except ManifestUnknown:
        return False
    return True


async def test_the_newest_tags(store: StoredRegistry, clock: Clock) -> None:
    """Tags are ordered by the time of their last push, then by name. A push of the same content counts."""
    await push_image(store, APP, "a", "b", "a")
    clock.pass_days(1)
    await push_image(store, APP, "c", "c")
    tags = {tag.name: tag for tag in await store.retention.tag_facts(APP, None)}

    async def newest(count: int) -> list[str]:
        position = await store.retention.nth_newest(APP, count)
        return sorted(name for name, tag in tags.items() if position is None or position.is_same_or_older_than(tag))

    assert [await newest(count) for count in (1, 2, 3, 4)] == [["c"], ["a", "c"], ["a", "b", "c"], ["a", "b", "c"]]
    clock.pass_days(1)
    await push_image(store, APP, "a", "b")
    assert await store.retention.nth_newest(APP, 1) == TagPosition(START + 2 * DAY, "b")


async def test_tags_are_listed_in_pages(store: StoredRegistry) -> None:
    """Tags are listed in pages, in the order of their names."""
    await push_image(store, APP, "a", *(f"{number:02}" for number in range(5)))
    pages, after = [], None
    while page := await store.retention.tag_facts(APP, after, limit=2):
        pages.append([tag.name for tag in page])
        after = page[-1].name
    assert pages == [["00", "01"], ["02", "03"], ["04"]]
    assert await store.retention.tag_facts(OTHER, None) == []


async def test_a_pull_of_a_child_counts_for_its_indexes(store: StoredRegistry, clock: Clock) -> None:
    """A pull of a manifest also counts for the indexes that list it, directly or through other indexes. A pull of an
    index does not count for a listed manifest with its own tag."""
    child = await push_image(store, APP, "child", "child")
    index = await push_index(store, [child], "index")
    outer = await push_index(store, [index], "outer")
    clock.pass_days(1)
    await pull(store, APP, child.digest, clock)
    assert [(await tag_facts(store, name)).pulled for name in ("child", "index", "outer")] == [clock()] * 3
    clock.pass_days(1)
    await pull(store, APP, outer.digest, clock)
    assert (await tag_facts(store, "child")).pulled == clock() - DAY
    assert (await tag_facts(store, "outer")).pulled == clock()


async def test_an_unchanged_tag_is_deleted(store: StoredRegistry) -> None:
    """Retention deletes a tag that has not changed since the decision. The tag's manifest stays."""
    image = await push_image(store, APP, "a", "old", "new")
    assert await store.retention.delete_tag(APP, await tag_facts(store, "old"), RETENTION)
    assert await all_tags(store, APP) == ["new"]
    assert await has_manifest(store, image.digest)
    [line] = store.accounts.audit(AuditQuery(actor=RETENTION.name), 10).items
    assert (line.action, line.target) == ("tag.delete", f"{APP}:old")


async def test_an_immutable_tag_is_not_deleted(store: StoredRegistry) -> None:
    """Retention does not delete an immutable tag."""
    await push_image(store, APP, "a", "v1", "old")
    for name in ("v1", "old"):
        judged_tag = await tag_facts(store, name)
        await store.retention.delete_tag(APP, judged_tag, RETENTION, is_immutable=lambda tag: tag.startswith("v"))
    assert await all_tags(store, APP) == ["v1"]


@pytest.mark.parametrize("change", ["moved", "pushed again", "pulled", "deleted"])
async def test_a_tag_in_use_stays(store: StoredRegistry, clock: Clock, change: str) -> None:
    """A tag that is pushed or pulled after the decision to delete it stays."""
    image = await push_image(store, APP, "a", "tag")
    judged_tag = await tag_facts(store, "tag")
    clock.now += 1
    match change:
        case "moved":
            await push_image(store, APP, "b", "tag")
        case "pushed again":
            await push_image(store, APP, "a", "tag")
        case "pulled":
            await pull(store, APP, image.digest, clock)
        case "deleted":
            await store.delete_tag(APP, Tag("tag"), by=BY)
    assert not await store.retention.delete_tag(APP, judged_tag, RETENTION)
    assert await all_tags(store, APP) == ([] if change == "deleted" else ["tag"])


async def test_listed_manifests_and_referrers_are_no_orphans(store: StoredRegistry, clock: Clock) -> None:
    """A manifest that an index lists is no orphan. A referrer is one only if its subject does not exist."""
    child = await push_image(store, APP, "child")
    index = await push_index(store, [child])
    await push_image(store, APP, "signature", subject=index.digest)
    orphan = await push_image(store, APP, "orphan", subject=digest_of(b"never pushed"))
    await push_image(store, APP, "tagged", "tag")
    clock.pass_days(1)
    assert sorted(await unused_orphans(store, clock())) == sorted([index.digest, orphan.digest])


async def test_how_long_a_manifest_has_been_unused(store: StoredRegistry, clock: Clock) -> None:
    """A manifest is unused since the latest of these times: its push, the loss of its last tag, and its last pull."""
    pushed = await push_image(store, APP, "pushed")
    moved = await push_image(store, APP, "moved", "a")
    deleted = await push_image(store, APP, "deleted", "b")
    pulled = await push_image(store, APP, "pulled")
    clock.pass_days(10)
    await push_image(store, APP, "newer", "a")
    await store.delete_tag(APP, Tag("b"), by=BY)
    await pull(store, APP, pulled.digest, clock)
    assert await unused_orphans(store, clock() - DAY) == [pushed.digest]
    clock.pass_days(2)
    unused = await unused_orphans(store, clock() - DAY)
    assert sorted(unused) == sorted([pushed.digest, moved.digest, deleted.digest, pulled.digest])


async def test_orphans_are_listed_in_pages(store: StoredRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Orphans are listed in pages. A page may be empty although more pages follow."""
    monkeypatch.setattr("storage.metadata.sqlite.upkeep.sqlite_retention.MAX_PAGE_ROWS", 2)
    tagged = [(await push_image(store, APP, f"tagged {n}", f"t{n}")).digest for n in range(4)]
    untagged = [(await push_image(store, APP, f"untagged {n}")).digest for n in range(3)]
    lost_tags = LostTags()
    listed: list[Digest] = []
    after: Digest | None = None
    while True:
        page = await store.retention.unused_orphans(APP, UnusedSince(START, START, START), after, lost_tags)
        listed += [manifest.digest for manifest in page.items]
        if page.next_after is None:
            break
        after = page.next_after
    assert listed == sorted(untagged)
    assert not set(listed) & set(tagged)


async def test_each_entry_of_the_tag_history_is_read_once(store: StoredRegistry, clock: Clock) -> None:
    """Listing the orphans reads each entry of the tag history only once."""
    first, second = [(await push_image(store, APP, name, name)).digest for name in ("first", "second")]
    clock.pass_days(1)
    unused_since = UnusedSince(pushed=clock(), untagged=clock() - DAY / 2, pulled=clock())
    lost_tags = LostTags()
    await store.delete_tag(APP, Tag("first"), by=BY)
    assert (await store.retention.unused_orphans(APP, unused_since, None, lost_tags)).items == []
    assert lost_tags.manifest_digests == {first}
    # If the history entry of the first deleted tag were read again, the digest would come back. Then `first` would not
    # be listed.
    lost_tags.manifest_digests.clear()
    await store.delete_tag(APP, Tag("second"), by=BY)
    listed = (await store.retention.unused_orphans(APP, unused_since, None, lost_tags)).items
    assert [manifest.digest for manifest in listed] == [first]
    assert lost_tags.manifest_digests == {second}


async def test_an_untagged_index_is_deleted_with_its_manifests(store: StoredRegistry, clock: Clock) -> None:
    """An untagged index is deleted with its referrers and the manifests that it lists. A listed manifest stays if it
    has a tag or if another index lists it."""
    exclusive = await push_image(store, APP, "exclusive")
    tagged = await push_image(store, APP, "tagged", "tag")
    shared = await push_image(store, APP, "shared")
    index = await push_index(store, [exclusive, tagged, shared])
    await push_index(store, [shared], "other")
    signature = await push_image(store, APP, "signature", subject=index.digest)
    clock.pass_days(1)
    dependents = await store.retention.delete_unused_orphan(
        APP, index.digest, UnusedSince(clock(), clock(), clock()), clock(), RETENTION
    )
    assert dependents is not None
    assert set(dependents) == {exclusive.digest, tagged.digest, shared.digest, signature.digest}
    orphans = await store.retention.delete_orphans(APP, dependents, RETENTION, unused_since=clock())
    assert set(orphans.deleted) == {exclusive.digest, signature.digest}
    assert (orphans.dependents, orphans.is_restorable) == ([], True)
    assert [await has_manifest(store, image.digest) for image in (index, exclusive, signature)] == [False] * 3
    assert [await has_manifest(store, image.digest) for image in (tagged, shared)] == [True] * 2


@pytest.mark.parametrize("change", ["tagged", "listed", "pulled", "untagged again"])
async def test_a_manifest_in_use_stays(store: StoredRegistry, clock: Clock, change: str) -> None:
    """A manifest that is tagged, listed or pulled after the decision to delete it stays."""
    image = await push_image(store, APP, "a")
    clock.pass_days(2)
    judged_at, unused_since = clock(), UnusedSince(*[clock() - DAY] * 3)
    assert await unused_orphans(store, unused_since.untagged) == [image.digest]
    clock.now += 1
    match change:
        case "tagged":
            await store.put_manifest(APP, image, [Tag("tag")], by=BY)
        case "listed":
            await push_index(store, [image], "index")
        case "pulled":
            await pull(store, APP, image.digest, clock)
        case "untagged again":
            await store.put_manifest(APP, image, [Tag("tag")], by=BY)
            await store.delete_tag(APP, Tag("tag"), by=BY)
    assert await store.retention.delete_unused_orphan(APP, image.digest, unused_since, judged_at, RETENTION) is None
    assert await has_manifest(store, image.digest)


async def test_manifests_are_deleted_on_a_full_disk(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk, a manifest is deleted without the data for putting it back: retention has to free space."""
    disk = FullDisk()
    # The disk gets space when the warning is logged, so the second attempt succeeds.
    monkeypatch.setattr(sqlite_retention.log, "warning", lambda *_: setattr(disk, "is_full", False))
    prepare_data_dir(tmp_path / "full")
    async with open_registry(tmp_path / "full", clock=clock, system=disk) as store:
        image = await push_image(store, APP, "a")
        clock.pass_days(1)
        unused_since = UnusedSince(clock(), clock(), clock())
        disk.is_full = True
        assert await store.retention.delete_unused_orphan(APP, image.digest, unused_since, clock(), RETENTION) == []
        assert not await has_manifest(store, image.digest)
        with pytest.raises(ManifestUnknown, match="put back"):
            await store.tag_history.move(APP, Tag("tag"), image.digest, by=BY, is_immutable=nothing_immutable)
        other = await push_image(store, APP, "b")
        disk.is_full = True
        orphans = await store.retention.delete_orphans(APP, [other.digest], RETENTION, unused_since=clock())
        assert orphans == ([other.digest], [], False)


async def test_freed_bytes_count_shared_blobs_once(store: StoredRegistry) -> None:
    """A blob is freed only if all manifests that refer to it are deleted, in all repositories. Its bytes count once."""
    first = await push_image(store, APP, "same", "1")
    second = await push_image(store, OTHER, "same", "1")
    size = sum(blob.size for blob in first.blobs)
    assert first.digest == second.digest
    keys = [(await store.retention.tag_facts(repo, None))[0].manifest for repo in (APP, OTHER)]
    assert await store.retention.freed_bytes(keys[:1]) == 0
    assert await store.retention.freed_bytes(keys) == size
    assert await store.retention.freed_bytes([]) == 0


async def test_manifests_that_are_orphans_without_some_tags(store: StoredRegistry) -> None:
    """An index with two tags is an orphan only without both. Then the manifests that it lists are orphans too."""
    child = await push_image(store, APP, "child")
    await push_index(store, [child], "1", "2")
    index = (await tag_facts(store, "1")).manifest
    unused: set[int] = set()
    await store.retention.add_orphans(APP, [index], {Tag("1")}, unused)
    assert unused == set()
    await store.retention.add_orphans(APP, [index], {Tag("1"), Tag("2")}, unused)
    assert len(unused) == 2
    limited: set[int] = set()
    await store.retention.add_orphans(APP, [index], {Tag("1"), Tag("2")}, limited, 1)
    assert limited == {index}
    assert await store.retention.freed_bytes(unused) == sum(blob.size for blob in child.blobs)


@pytest.mark.slow
async def test_content_of_an_earlier_version_may_have_been_pulled(tmp_path: Path) -> None:
    """An earlier version did not record pulls. Retention treats its content as if it had been pulled just before the
    migration."""
    previous_release.write_data_dir(tmp_path / "data", boot_id())
    started = time.time()
    clock = Clock()
    async with clocked_store(tmp_path / "data", clock) as store:
        [old_tag, *_] = [tag for tag in await store.retention.tag_facts(APP, None) if tag.pushed < started]
        assert old_tag.pulled is None
        assert old_tag.unrecorded_until is not None
        assert started <= old_tag.unrecorded_until <= time.time()
        clock.now = started + DAY
        new = await push_image(store, APP, "new", "new")
        assert (await tag_facts(store, "new")).unrecorded_until is None
        untagged = await push_image(store, APP, "untagged")
        for tag in await store.retention.tag_facts(APP, None):
            await store.delete_tag(APP, tag.name, by=BY)
        clock.pass_days(10)
        since = clock() - 5 * DAY
        assert {new.digest, untagged.digest} <= set(await unused_orphans(store, since))
        unused_since = UnusedSince(pushed=since, untagged=since, pulled=started - DAY)
        page = await store.retention.unused_orphans(APP, unused_since, None, LostTags())
        listed = {manifest.digest for manifest in page.items}
        assert old_tag.digest not in listed
        assert old_tag.digest in await unused_orphans(store, since)


async def test_tags_of_signatures_belong_to_their_manifest(store: StoredRegistry, clock: Clock) -> None:
    """Tags of cosign and fallback tags of the distribution spec contain the digest of another manifest. While this
    manifest exists, retention does not delete such a tag. The tag does not count as one of the newest."""
    signed = await push_image(store, APP, "signed", "v1")
    for suffix in (".sig", ".att", ""):
        clock.now += 1
        await push_image(store, APP, f"about{suffix}", f"sha256-{signed.digest.encoded}{suffix}")
    assert await store.retention.nth_newest(APP, 1) == TagPosition(START, "v1")
    assert await store.retention.nth_newest(APP, 2) is None
    signature = await tag_facts(store, f"sha256-{signed.digest.encoded}.sig")
    assert (signature.subject, signature.is_referrer) == (signed.digest, True)
    assert (await tag_facts(store, "v1")).subject is None
    assert not await store.retention.delete_tag(APP, signature, RETENTION)

    await store.delete_manifest(APP, signed.digest, by=BY)
    signature = await tag_facts(store, signature.name)
    assert (signature.subject, signature.is_referrer) == (None, True)
    assert await store.retention.delete_tag(APP, signature, RETENTION)
