"""A manifest whose stored body is damaged is not served. A push of the same manifest heals it: the manifest is stored
and served again."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.composition import open_registry
from storage.content import Descriptor
from storage.errors import ManifestBlobUnknown, ManifestUnknown
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.collection_report import RemovalKind
from storage.upkeep.tag_changes import TagChanger
from tests.fakes.blob_files import layout_behind
from tests.fakes.registry_content import BY, index_of, push_image
from tests.fakes.scrub_runs import scrub
from tests.fakes.second_connection import second_connection

APP = RepositoryName("team/app")


def change_body(registry: StoredRegistry, digest: Digest, body: bytes) -> None:
    """Changes the stored body of a manifest directly in the database."""
    db = second_connection(layout_behind(registry).metadata)
    db.execute("UPDATE manifest SET body = ? WHERE digest = ?", (body, digest))
    assert db.changes()
    db.close()


async def test_a_damaged_manifest_is_healed_by_a_push(registry: StoredRegistry) -> None:
    """After a scrub, a damaged manifest is unknown by tag and by digest and is not listed as a referrer. An index that
    lists it is refused. Its tags stay. After a push of the manifest, it is served and listed again, and the index is
    accepted."""
    base = await push_image(registry, APP, "base", "base")
    signature = await push_image(registry, APP, "signature", "latest", subject=base.digest)
    change_body(registry, signature.digest, signature.body.replace(b"layer", b"lawyer"))
    index = index_of([Descriptor(signature.media_type, signature.digest, len(signature.body))])

    result, [step] = await scrub(registry)

    assert (result["manifests"], result["damaged"]) == (2, 1)
    assert (step["kind"], step["digest"], step["repositories"]) == ("manifest", signature.digest, [APP])
    for reference in (Tag("latest"), signature.digest):
        with pytest.raises(ManifestUnknown, match="push the image again"):
            await registry.get_manifest(APP, reference)
        with pytest.raises(ManifestUnknown, match="push the image again"):
            await registry.resolve_manifest(APP, reference)
    assert not (await registry.referrers(APP, base.digest, None, None, 10)).items
    with pytest.raises(ManifestBlobUnknown):
        await registry.put_manifest(APP, index, by=BY)
    [damaged] = await registry.damage.damaged_manifests(10)
    assert (damaged.repository, damaged.digest) == (APP, signature.digest)
    assert (await scrub(registry))[0]["damaged"] == 0  # the damage was reported before

    await registry.put_manifest(APP, signature, by=BY)

    assert (await registry.get_manifest(APP, Tag("latest"))).body == signature.body
    assert (await registry.resolve_manifest(APP, Tag("latest"))).size == len(signature.body)
    [referrer] = (await registry.referrers(APP, base.digest, None, None, 10)).items
    assert referrer.size == len(signature.body)
    assert not await registry.damage.damaged_manifests(10)
    await registry.put_manifest(APP, index, by=BY)


async def test_a_damaged_manifest_can_be_deleted(data: Path) -> None:
    """When a damaged manifest is deleted, the record of its damage is deleted as well. Its blobs are collected, and it
    cannot be restored."""
    async with open_registry(data, grace=0) as registry:
        image = await push_image(registry, APP, "one", "latest")
        change_body(registry, image.digest, b"{}")
        await scrub(registry)
        await registry.delete_manifest(APP, image.digest, by=BY)
        assert not await registry.damage.damaged_manifests(10)
        planned = await registry.collector.collect(dry_run=True)
        report = await registry.collector.collect()
        assert planned == report
        # A damaged body is not stored for a restore.
        assert (report.blobs, report.count_of(RemovalKind.MANIFEST)) == (2, 0)
        with pytest.raises(ManifestUnknown):
            await TagChanger(registry.tag_history, registry.immutable_tags).restore(APP, Tag("latest"), by=BY)


async def test_no_tag_is_pointed_at_a_damaged_manifest(registry: StoredRegistry) -> None:
    """A move or restore of a tag to a damaged manifest is refused with the error that a pull of the manifest gets.
    After a push of the manifest, both work."""
    first = await push_image(registry, APP, "one", "latest")
    second = await push_image(registry, APP, "two", "latest")
    change_body(registry, first.digest, b"{}")
    await scrub(registry)
    changes = TagChanger(registry.tag_history, registry.immutable_tags)

    with pytest.raises(ManifestUnknown, match=f"{first.digest} was damaged .* push the image again"):
        await changes.restore(APP, Tag("latest"), by=BY)
    with pytest.raises(ManifestUnknown, match=f"{first.digest} was damaged .* push the image again"):
        await changes.move(APP, Tag("old"), first.digest, by=BY)
    assert (await registry.resolve_manifest(APP, Tag("latest"))).digest == second.digest

    await registry.put_manifest(APP, first, by=BY)
    assert (await changes.restore(APP, Tag("latest"), by=BY)).digest == first.digest
    assert (await changes.move(APP, Tag("old"), first.digest, by=BY)).digest == first.digest


async def test_a_manifest_with_the_right_body_is_served_again(registry: StoredRegistry) -> None:
    """A scrub may mark a manifest as damaged although its stored body is right, because of faulty memory. The next
    scrub finds that the body is right, and the manifest is served again."""
    image = await push_image(registry, APP, "one", "latest")
    change_body(registry, image.digest, b"{}")
    await scrub(registry)
    db = second_connection(layout_behind(registry).metadata)
    db.execute("UPDATE damaged_manifest SET body = ?", (image.body,))
    db.close()
    assert (await scrub(registry))[0]["healed"] == 1
    assert (await registry.get_manifest(APP, Tag("latest"))).body == image.body
