"""The history of tags, and restores of tags that were moved or deleted, with their deleted manifests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from storage.access import AuditQuery
from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor, Condition, Manifest
from storage.errors import (
    Denied,
    ManifestBlobUnknown,
    ManifestTooLarge,
    ManifestUnknown,
    NameUnknown,
    PreconditionFailed,
)
from storage.metadata.sqlite.upkeep import restore_plan, sqlite_tag_history
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import NamePattern
from storage.store.stored_registry import StoredRegistry
from storage.tag_history import Availability, TagChange, TagMove
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from storage.upkeep.tag_changes import TagChanger
from tests.fakes.registry_content import BY, NOWHERE, all_tags, index_of, names_of, push_image, read_blob

APP = RepositoryName("team/app")
V1, LATEST = Tag("v1"), Tag("latest")
ALICE = Actor("alice", "192.0.2.1", "r1", "docker/29")
GRACE = 100.0
"""The grace period in seconds."""
RULES = ImmutableTags([TagRule((NamePattern("team/**"),), (TagPattern("fixed*"),))])


class Clock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path, grace=GRACE, clock=clock, immutable_tags=RULES) as opened:
        yield opened


@pytest.fixture
def changes(store: StoredRegistry) -> TagChanger:
    return TagChanger(store.tag_history, store.immutable_tags)


async def history(store: StoredRegistry, tag: Tag | None = V1) -> list[TagChange]:
    return list((await store.tag_history.changes(APP, tag, None, 1000)).items)


async def digest_of_tag(store: StoredRegistry, tag: Tag = V1) -> Digest:
    return (await store.resolve_manifest(APP, tag)).digest


async def assert_complete(store: StoredRegistry, *manifests: Manifest) -> None:
    """Checks that the repository has the manifests byte for byte, and all of their blobs."""
    for manifest in manifests:
        assert (await store.get_manifest(APP, manifest.digest)).body == manifest.body
        for blob in manifest.blobs:
            assert await read_blob(store, APP, blob.digest)


async def test_every_change_has_an_entry(store: StoredRegistry, clock: Clock) -> None:
    """Each change of a tag has an entry in its history: the digests before and after it, the time and the actor."""
    first = await push_image(store, APP, "first", "latest")
    await store.put_manifest(APP, first, [V1], by=ALICE)
    clock.now += 1
    await store.put_manifest(APP, first, [V1], by=BY)  # this push changes nothing, so it has no entry
    second = await push_image(store, APP, "second", "v1")
    clock.now += 1
    await store.delete_tag(APP, V1, by=ALICE)

    deleted, moved, created = await history(store)
    assert (created.digest, created.previous, created.at, created.by) == (first.digest, None, 1_000_000.0, ALICE)
    assert (moved.digest, moved.previous, moved.at, moved.by) == (second.digest, first.digest, 1_000_001.0, BY)
    assert (deleted.digest, deleted.previous, deleted.at, deleted.by) == (None, second.digest, 1_000_002.0, ALICE)
    assert [entry.availability for entry in (deleted, moved, created)] == [
        None,
        Availability.STORED,
        Availability.STORED,
    ]


async def test_the_history_is_listed_in_pages(store: StoredRegistry, clock: Clock) -> None:
    """The pages of a history have each entry once, even if several changes have the same time."""
    for number in range(12):
        await push_image(store, APP, str(number), "v1", "latest")
        clock.now += number % 3
    for tag in (V1, None):
        all_entries = await history(store, tag)
        assert len(all_entries) == (12 if tag else 24)
        entries: list[TagChange] = []
        while True:
            page = await store.tag_history.changes(APP, tag, entries[-1].id if entries else None, 5)
            entries += page.items
            if not page.more:
                break
        assert entries == all_entries
        assert [entry.at for entry in entries] == sorted((entry.at for entry in entries), reverse=True)


async def test_restore_of_a_moved_tag(store: StoredRegistry, changes: TagChanger) -> None:
    """A restore moves a tag back to its previous digest. A second restore undoes the first one."""
    first = await push_image(store, APP, "first", "v1")
    second = await push_image(store, APP, "second", "v1")
    assert await changes.restore(APP, V1, by=ALICE) == TagMove(V1, first.digest, second.digest, [])
    assert await digest_of_tag(store) == first.digest
    assert (await history(store))[0].by == ALICE
    await changes.restore(APP, V1, by=ALICE)
    assert await digest_of_tag(store) == second.digest


async def test_restore_of_a_deleted_tag(store: StoredRegistry, changes: TagChanger) -> None:
    """A restore creates a deleted tag again, with the digest that it had."""
    first = await push_image(store, APP, "first", "v1")
    await store.delete_tag(APP, V1, by=BY)
    assert await changes.restore(APP, V1, by=ALICE) == TagMove(V1, first.digest, None, [])
    assert await digest_of_tag(store) == first.digest


async def test_restore_of_a_tag_that_was_deleted_and_pushed_again(store: StoredRegistry, changes: TagChanger) -> None:
    """A restore moves the tag to the digest that it had before it was deleted."""
    first = await push_image(store, APP, "first", "v1")
    await store.delete_tag(APP, V1, by=BY)
    second = await push_image(store, APP, "second", "v1")
    assert await changes.restore(APP, V1, by=ALICE) == TagMove(V1, first.digest, second.digest, [])


async def test_restore_to_a_time(store: StoredRegistry, changes: TagChanger, clock: Clock) -> None:
    """A tag can be restored to the digest that it had at a given time, unless it did not exist at that time."""
    start = clock.now
    images = []
    for number in range(3):
        images.append(await push_image(store, APP, str(number), "v1"))
        clock.now += 10
    await changes.restore(APP, V1, at=start + 19.9994, by=ALICE)  # just before the third push
    assert await digest_of_tag(store) == images[1].digest
    await changes.restore(APP, V1, at=start, by=ALICE)
    assert await digest_of_tag(store) == images[0].digest
    with pytest.raises(ManifestUnknown, match="did not exist at that time"):
        await changes.restore(APP, V1, at=start - 1, by=ALICE)


async def test_restore_to_a_digest(store: StoredRegistry, changes: TagChanger) -> None:
    """A tag can be restored to any digest of its history."""
    first = await push_image(store, APP, "first", "v1")
    await push_image(store, APP, "second", "v1")
    await push_image(store, APP, "third", "v1")
    await changes.restore(APP, V1, to=first.digest, by=ALICE)
    assert await digest_of_tag(store) == first.digest


async def test_restore_without_an_earlier_digest(store: StoredRegistry, changes: TagChanger) -> None:
    """A restore fails if the tag never had another digest, or if the tag or the repository is unknown."""
    image = await push_image(store, APP, "first", "v1")
    with pytest.raises(ManifestUnknown, match=f"team/app:v1 never pointed at anything other than {image.digest}"):
        await changes.restore(APP, V1, by=ALICE)
    with pytest.raises(ManifestUnknown, match="team/app never had a tag latest"):
        await changes.restore(APP, LATEST, by=ALICE)
    with pytest.raises(NameUnknown):
        await changes.restore(NOWHERE, V1, by=ALICE)
    with pytest.raises(NameUnknown):
        await store.tag_history.changes(NOWHERE, V1, None, 10)


async def test_a_tag_that_has_changed_meanwhile_is_not_moved(store: StoredRegistry) -> None:
    """A restore reads a tag and then moves it. If the tag has changed in between, the move fails."""
    first = await push_image(store, APP, "first", "v1")
    second = await push_image(store, APP, "second", "v1")
    with pytest.raises(PreconditionFailed, match=f"v1 points at {second.digest} now"):
        await store.tag_history.move(
            *(APP, V1, first.digest),
            by=BY,
            condition=Condition(frozenset({first.digest})),
            is_immutable=lambda _: False,
        )


async def test_a_move_creates_a_new_tag(store: StoredRegistry, changes: TagChanger) -> None:
    """If the tag does not exist, a move creates it. The target is a digest or another tag."""
    image = await push_image(store, APP, "first", "v1")
    assert await changes.move(APP, LATEST, V1, by=ALICE) == TagMove(LATEST, image.digest, None, [])
    await changes.move(APP, Tag("third"), image.digest, by=ALICE)
    assert await all_tags(store, APP) == ["latest", "third", "v1"]
    with pytest.raises(ManifestUnknown, match="team/app has no tag none"):
        await changes.move(APP, LATEST, Tag("none"), by=ALICE)


async def push_nested_index(store: StoredRegistry) -> list[Manifest]:
    """Pushes an index of an index of two images, and tags it v1. The images and the outer index have signatures, and
    one signature has an attestation. Returns the attestation, the three signatures, the two images, the inner index and
    the outer index."""
    children = [await push_image(store, APP, name) for name in ("amd64", "arm64")]
    inner = index_of([child.descriptor for child in children])
    await store.put_manifest(APP, inner, by=BY)
    outer = index_of([inner.descriptor])
    await store.put_manifest(APP, outer, [V1, LATEST], by=BY)
    signed = [*children, outer]
    signatures = [await push_image(store, APP, f"signature {m.digest}", subject=m.digest) for m in signed]
    attestation = await push_image(store, APP, "of a signature", subject=signatures[0].digest)
    return [attestation, *signatures, *children, inner, outer]


async def test_restore_of_a_deleted_nested_index(store: StoredRegistry, changes: TagChanger, clock: Clock) -> None:
    """Until the grace period ends, a restore puts back a deleted index with its manifests, signatures and blobs."""
    manifests = await push_nested_index(store)
    outer = manifests[-1]
    for manifest in manifests:
        await store.delete_manifest(APP, manifest.digest, by=BY)
    assert not (await store.repositories(None, 10)).items
    clock.now += GRACE - 0.1
    await store.collector.collect()
    newest = (await history(store))[0]
    assert (newest.digest, newest.previous) == (None, outer.digest)
    assert (await history(store))[1].availability is Availability.DELETED

    move = await changes.restore(APP, V1, by=ALICE)
    assert (move.digest, move.previous) == (outer.digest, None)
    assert sorted(move.restored) == sorted(manifest.digest for manifest in manifests)
    await assert_complete(store, *manifests)
    assert await digest_of_tag(store) == outer.digest
    assert len(names_of(await store.referrers(APP, outer.digest, None, None, 10))) == 1
    assert await all_tags(store, APP) == ["v1"]  # the other tag was not restored
    assert list((await store.repositories(None, 10)).items) == [APP]
    restored = [entry.target for entry in store.accounts.audit(AuditQuery(action="manifest.restore"), 100).items]
    assert sorted(restored) == sorted(f"{APP}@{manifest.digest}" for manifest in manifests)

    clock.now += 10 * GRACE
    await store.collector.collect()
    await assert_complete(store, *manifests)


async def test_restore_of_a_deleted_manifest_of_an_index(store: StoredRegistry, changes: TagChanger) -> None:
    """A client has deleted a manifest, but not the index that lists it. If a tag is moved to the index, the manifest is
    put back, and the index is complete again."""
    manifests = await push_nested_index(store)
    amd64, outer = manifests[4], manifests[-1]
    await store.delete_manifest(APP, amd64.digest, by=BY)
    move = await changes.move(APP, Tag("again"), outer.digest, by=ALICE)
    assert list(move.restored) == [amd64.digest]
    await assert_complete(store, *manifests)


async def test_no_restore_after_the_grace_period(store: StoredRegistry, changes: TagChanger, clock: Clock) -> None:
    """After the grace period, garbage collection deletes the manifest for good, and a restore fails."""
    first = await push_image(store, APP, "first", "v1")
    await store.delete_manifest(APP, first.digest, by=BY)
    clock.now += GRACE
    await store.collector.collect()
    assert (await history(store))[1].availability is Availability.GONE
    for _ in range(2):
        with pytest.raises(ManifestUnknown, match=r"it cannot be put back.*gc\.grace"):
            await changes.restore(APP, V1, by=ALICE)
    assert await all_tags(store, APP) == []


async def test_restore_names_a_missing_blob(store: StoredRegistry, changes: TagChanger) -> None:
    """If a client has deleted a blob of a manifest, the restore puts back no manifest. The error names the blob."""
    manifests = await push_nested_index(store)
    for manifest in manifests:
        await store.delete_manifest(APP, manifest.digest, by=BY)
    arm64 = manifests[5]
    await store.delete_blob(APP, arm64.blobs[1].digest, by=BY)
    with pytest.raises(ManifestBlobUnknown, match=f"{arm64.digest} is not complete.*{arm64.blobs[1].digest}.*push"):
        await changes.restore(APP, V1, by=ALICE)
    assert not (await store.repositories(None, 10)).items
    with pytest.raises(ManifestUnknown):
        await store.resolve_manifest(APP, V1)


async def test_restore_without_an_incomplete_signature(store: StoredRegistry, changes: TagChanger) -> None:
    """If a blob of a signature was deleted, the image is put back without the signature."""
    image = await push_image(store, APP, "image", "v1")
    signature = await push_image(store, APP, "signature", subject=image.digest)
    for manifest in (signature, image):
        await store.delete_manifest(APP, manifest.digest, by=BY)
    await store.delete_blob(APP, signature.blobs[0].digest, by=BY)
    assert list((await changes.restore(APP, V1, by=ALICE)).restored) == [image.digest]


async def test_shared_blobs_stay_until_the_last_grace_period_ends(
    store: StoredRegistry, changes: TagChanger, clock: Clock
) -> None:
    """Two images with the same layers are deleted at different times. The image that was deleted last can be put back
    completely until its own grace period ends, although the grace period of the other image has ended."""
    first = await push_image(store, APP, "same", "v1")
    second = await push_image(store, APP, "same", "latest", annotations={"n": "2"})
    await store.delete_manifest(APP, first.digest, by=BY)
    clock.now += GRACE / 2
    await store.delete_manifest(APP, second.digest, by=BY)
    clock.now += GRACE - 1
    await store.collector.collect()
    with pytest.raises(ManifestUnknown):
        await changes.restore(APP, V1, by=ALICE)
    await changes.restore(APP, LATEST, by=ALICE)
    await assert_complete(store, second)


async def test_a_deleted_manifest_is_not_restorable_without_its_links(store: StoredRegistry, clock: Clock) -> None:
    """When a repository's link to a blob is deleted, the deleted manifests that need the blob are deleted for good. So
    no manifest that lacks a blob is offered for a restore."""
    image = await push_image(store, APP, "first", "v1")
    await store.delete_manifest(APP, image.digest, by=BY)
    clock.now += GRACE
    grace_start = clock.now - GRACE
    for entry in await store.metadata.queued_links(grace_start, 100):
        assert await store.metadata.drop_link(entry, grace_start)
    assert (await history(store))[1].availability is Availability.GONE
    assert await store.metadata.drop_deleted_manifests(grace_start, 100) == []


async def test_a_manifest_that_is_pushed_again_is_no_longer_deleted(store: StoredRegistry, clock: Clock) -> None:
    """If a deleted manifest is pushed again, garbage collection does not remove it."""
    await push_image(store, APP, "first", "v1")
    image = await push_image(store, APP, "first", "v1")
    await store.delete_manifest(APP, image.digest, by=BY)
    await push_image(store, APP, "first", "v1")
    clock.now += 2 * GRACE
    assert await store.metadata.drop_deleted_manifests(clock.now, 100) == []
    await store.collector.collect()
    await assert_complete(store, image)


async def test_deletes_of_a_mirror_cannot_be_undone(store: StoredRegistry) -> None:
    """A manifest that a mirror has deleted cannot be restored, because the mirror can fetch it again."""
    image = await push_image(store, APP, "first", "v1")
    await store.delete_manifest(APP, image.digest, by=BY, restorable=False)
    assert (await history(store))[1].availability is Availability.GONE


async def test_restore_without_a_grace_period(tmp_path: Path, clock: Clock) -> None:
    """With a grace period of 0, a deleted manifest can be restored only until the next garbage collection."""
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path, grace=0, clock=clock) as store:
        image = await push_image(store, APP, "first", "v1")
        await store.delete_manifest(APP, image.digest, by=BY)
        assert (await history(store))[1].availability is Availability.DELETED
        await store.collector.collect()
        assert (await history(store))[1].availability is Availability.GONE


@pytest.mark.parametrize("limit", ["MAX_MANIFESTS", "MAX_INDEX_BYTES"])
async def test_the_work_of_one_restore_is_limited(
    store: StoredRegistry, changes: TagChanger, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """A restore that needs too many manifests or too large indexes is refused and changes nothing."""
    monkeypatch.setattr(restore_plan, limit, 3)
    manifests = await push_nested_index(store)
    for manifest in manifests:
        await store.delete_manifest(APP, manifest.digest, by=BY)
    with pytest.raises(ManifestTooLarge, match="more manifests than can be put back at once; push the image again"):
        await changes.restore(APP, V1, by=ALICE)
    assert not (await store.repositories(None, 10)).items


@pytest.mark.parametrize(("limit", "value"), [("MAX_BATCH_MANIFESTS", 2), ("FULL_BATCH_BYTES", 1)])
async def test_many_manifests_are_put_back_in_several_transactions(
    store: StoredRegistry, changes: TagChanger, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    """A restore of many manifests takes several transactions. If it is interrupted between two transactions, it can be
    repeated until all manifests and their signatures are put back."""
    monkeypatch.setattr(sqlite_tag_history, limit, value)
    manifests = await push_nested_index(store)
    for manifest in manifests:
        await store.delete_manifest(APP, manifest.digest, by=BY)
    outer = manifests[-1].digest
    attempts = 0
    while True:
        attempts += 1
        # With its digest, since the cancellation may come after the last transaction, when V1 points at it already.
        task = asyncio.create_task(changes.restore(APP, V1, to=outer, by=ALICE))
        transactions = 0
        version = store.metadata.version()
        while not task.done():
            await asyncio.sleep(0)
            if store.metadata.version() != version:
                version, transactions = store.metadata.version(), transactions + 1
            if transactions == attempts:  # attempt n is cancelled after n transactions
                task.cancel()
                break
        try:
            await task
        except asyncio.CancelledError:
            continue
        break
    assert attempts > 2
    await assert_complete(store, *manifests)
    assert await digest_of_tag(store) == outer
    assert len(names_of(await store.referrers(APP, outer, None, None, 10))) == 1


async def test_an_immutable_tag_changes_only_by_force(store: StoredRegistry, changes: TagChanger) -> None:
    """An immutable tag can be moved, restored or deleted only with `force`. The audit log has an entry for each forced
    change."""
    immutable_tag = Tag("fixed-1")
    first = await push_image(store, APP, "first", immutable_tag)
    second = await push_image(store, APP, "second", "v1")

    def forced_changes() -> list[tuple[str, str, object]]:
        lines = store.accounts.audit(AuditQuery(action="tag.force"), 10).items
        return [(line.actor, line.target, dict(line.detail or {})) for line in lines]

    refused_changes: list[Callable[[], Awaitable[object]]] = [
        lambda: changes.move(APP, immutable_tag, V1, by=ALICE),
        lambda: changes.restore(APP, immutable_tag, to=second.digest, by=ALICE),
        lambda: changes.delete(APP, immutable_tag, by=ALICE),
    ]
    for change in refused_changes:
        with pytest.raises(Denied, match="team/app:fixed-1 is immutable"):
            await change()
    await changes.move(APP, immutable_tag, first.digest, by=ALICE)  # the tag has this digest already
    assert (await digest_of_tag(store, immutable_tag), forced_changes()) == (first.digest, [])
    await changes.move(APP, immutable_tag, V1, by=ALICE, force=True)
    await changes.restore(APP, immutable_tag, by=ALICE, force=True)
    await changes.delete(APP, immutable_tag, by=ALICE, force=True)
    line = ("alice", "team/app:fixed-1", {"previous": first.digest})
    assert forced_changes() == [line, ("alice", "team/app:fixed-1", {"previous": second.digest}), line]
    # The tag does not exist, so nothing is overwritten.
    await changes.restore(APP, immutable_tag, to=second.digest, by=ALICE)
    assert await digest_of_tag(store, immutable_tag) == second.digest


async def test_delete_of_a_tag_that_is_not_immutable(store: StoredRegistry, changes: TagChanger) -> None:
    """If the tag is not immutable, a delete with `force` is an ordinary delete: it adds no entry about force to the
    audit log. The tag's manifest stays."""
    image = await push_image(store, APP, "first", "v1")
    await changes.delete(APP, V1, by=ALICE, force=True)
    assert not store.accounts.audit(AuditQuery(action="tag.force"), 10).items
    await assert_complete(store, image)
    with pytest.raises(ManifestUnknown):
        await changes.delete(APP, V1, by=ALICE)


async def test_restore_of_a_referrer_that_lists_its_subject(store: StoredRegistry, changes: TagChanger) -> None:
    """A referrer that is an index and also lists its subject is put back after the subject."""
    image = await push_image(store, APP, "image", "v1")
    listing = index_of([image.descriptor], subject=image.digest)
    await store.put_manifest(APP, listing, by=BY)
    for manifest in (listing, image):
        await store.delete_manifest(APP, manifest.digest, by=BY)
    assert list((await changes.restore(APP, V1, by=ALICE)).restored) == [image.digest, listing.digest]
