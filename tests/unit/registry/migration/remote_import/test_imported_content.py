"""What an import over the network adds to this registry: images with all their manifests and blobs, referrers and tags.
A second import fetches only what has changed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor
from storage.errors import ManifestUnknown
from storage.metadata.sqlite.database import connect
from storage.names import Digest, Tag
from storage.patterns import NamePattern
from storage.retention import RETENTION_ACTOR
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import Hub
from tests.fakes.import_run import ImportRun, assert_complete
from tests.fakes.second_connection import second_connection
from tests.fakes.upstream_content import (
    UpstreamBlob,
    UpstreamContent,
    fallback_index,
    fallback_tag,
    index_of,
    manifest_of,
    noise_image,
)
from tests.unit.registry.migration.remote_import.conftest import APP, Pauses, import_into


async def test_images_are_imported_with_all_platforms_and_signatures(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """An index is imported with all manifests that it lists. Their referrers (such as signatures), and the referrers of
    these referrers, are found by the referrers API and imported as well."""
    amd64, arm64 = noise_image("amd64", 1000), noise_image("arm64", 3 * MIB)
    image = content.add(APP, index_of((amd64, "amd64"), (arm64, "arm64")), "1", "latest")
    docker = content.add(APP, noise_image("docker", 10, docker=True), "docker")
    signature = content.add(APP, noise_image("signature", 10, subject=image))
    sbom = content.add(APP, noise_image("sbom", 10, subject=arm64))
    signed_sbom = content.add(APP, noise_image("signed sbom", 10, subject=sbom))
    old_registry.put(content)

    result = await run_import()

    for each in (image, docker, signature, sbom, signed_sbom):
        await assert_complete(store, APP, each)
    assert (result["tags"], result["manifests"], run_import.reports()) == (3, 7, [])
    assert (await store.tags(APP, None, 10)).items == ["1", "docker", "latest"]
    referrers = (await store.referrers(APP, Digest(arm64.digest), None, None, 10)).items
    assert [each.digest for each in referrers] == [sbom.digest]


async def test_referrers_are_imported_by_fallback_tags(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, pauses: Pauses
) -> None:
    """If the old registry has no referrers API, referrers are imported with the fallback tags that list them. The 404
    of such a registry causes no retries with pauses."""
    image = content.add(APP, noise_image("image", 10), "1")
    signature = noise_image("signature", 10, subject=image)
    content.add(APP, fallback_index(signature), fallback_tag(image.digest))
    old_registry.put(content)
    old_registry.set(referrers=False)

    await run_import()

    referrers = (await store.referrers(APP, Digest(image.digest), None, None, 10)).items
    assert [each.digest for each in referrers] == [signature.digest]
    assert (old_registry.count("referrers"), pauses) == (2, [])  # these requests showed that there is no referrers API


async def test_foreign_layers_may_be_missing(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """An image can be imported without its foreign layers, because clients fetch these from other servers. Foreign
    layers that the old registry has are imported."""
    foreign_type = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    config = UpstreamBlob(b"{}", "application/vnd.oci.image.config.v1+json")
    available_layer, foreign_layer = UpstreamBlob(b"there", foreign_type), UpstreamBlob(b"elsewhere", foreign_type)
    image = content.add(APP, manifest_of(config, available_layer, foreign_layer), "windows")
    old_registry.put(content)
    old_registry.remove(APP, foreign_layer.digest)
    result = await run_import()
    assert (result["tags"], result["fetched"], run_import.reports()) == (1, 2, [])
    assert (await store.get_manifest(APP, Tag("windows"))).body == image.body
    assert (await store.resolve_blob(APP, Digest(available_layer.digest))).size == 5


async def test_a_shared_blob_is_downloaded_once(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """A layer of images in several repositories is downloaded once, although the images are imported at the same
    time."""
    image = noise_image("common", 2 * MIB)
    names = ["a", "b", "c"]
    for name in names:
        content.add(name, image, "1", "2")
    old_registry.put(content)

    result = await run_import(repositories=names)

    layer = image.layers[0].digest
    assert sum(stop - start for start, stop in old_registry.sent_ranges(layer)) == 2 * MIB
    assert (result["fetched"], result["shared"]) == (2, 4)
    for name in names:
        await assert_complete(store, name, image)


async def test_a_second_import_fetches_only_changes(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """A second import sends one HEAD request for each tag. It fetches only new manifests and blobs, so an unchanged tag
    causes no other request."""
    first = content.add(APP, noise_image("first", 1000), "1", "latest")
    old_registry.put(content)
    await run_import()
    second = content.add(APP, noise_image("second", 1000), "2", "latest")
    signature = content.add(APP, noise_image("signature", 10, subject=first))
    old_registry.put(content)
    old_registry.forget()  # the requests so far

    result = await run_import()

    # `present`: the number of tags that were unchanged
    assert (result["tags"], result["present"], result["manifests"], result["fetched"]) == (2, 1, 2, 4)
    assert old_registry.count("manifest", "GET") == 2
    assert old_registry.count("manifest", "HEAD") == 3
    assert all(not old_registry.sent_ranges(digest) for digest in first.blobs)
    for image in (second, signature):
        await assert_complete(store, APP, image)


async def test_a_tag_that_was_deleted_after_the_import_stays_deleted(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """If a user has deleted an imported tag, the next import does not set it again, and reports this as a note. An
    import with the argument `overwrite` sets the tag again."""
    image = content.add(APP, noise_image("image", 10), "1")
    old_registry.put(content)
    await run_import()
    await store.delete_tag(APP, Tag("1"), by=Actor("ann"))

    result = await run_import()
    assert run_import.reports("note") == [("team/app:1", "the tag stays as it is: ann has deleted it here")]
    assert result["tags"] == 0
    await run_import(overwrite=True)
    assert (await store.resolve_manifest(APP, Tag("1"))).digest == image.digest


async def test_an_image_that_retention_has_deleted_does_not_come_back(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """An import brings neither an image that retention has deleted here nor its signatures, until its tag points at
    another image at the old registry."""
    image = content.add(APP, noise_image("image", 10), "1")
    signature = content.add(APP, noise_image("signature", 10, subject=image))
    old_registry.put(content)
    await run_import()
    await store.delete_tag(APP, Tag("1"), by=RETENTION_ACTOR)
    await run_import()
    assert (await store.referrers(APP, Digest(image.digest), None, None, 10)).items  # the manifest is still there
    for digest in (image.digest, signature.digest):
        await store.delete_manifest(APP, Digest(digest), by=RETENTION_ACTOR)

    result = await run_import()
    assert (result["tags"], result["manifests"]) == (0, 0)
    reason = (
        "the tag stays deleted: entrepot retention has deleted it here after it had pointed at the same image as at "
        "the old registry"
    )
    assert run_import.reports("note") == [("team/app:1", reason)]
    moved = content.add(APP, noise_image("another image", 10), "1")
    old_registry.put(content)
    result = await run_import()
    assert (result["tags"], result["manifests"]) == (1, 1)
    assert (await store.resolve_manifest(APP, Tag("1"))).digest == moved.digest


async def test_an_immutable_tag_is_reported_as_a_problem(
    tmp_path: Path, old_registry: Hub, content: UpstreamContent, pauses: Pauses
) -> None:
    """If an immutable tag of this registry points at another manifest than the old registry's tag, the tag is reported
    and the other manifest is not fetched. The import continues with the other tags."""
    first = content.add(APP, noise_image("first", 10), "v1")
    old_registry.put(content)
    rules = ImmutableTags([TagRule((NamePattern("team/**"),), (TagPattern("v*"),))])
    prepare_data_dir(tmp_path / "fixed")
    async with open_registry(tmp_path / "fixed", immutable_tags=rules) as store:
        run_import = import_into(store, old_registry, pauses)
        await run_import()
        second = content.add(APP, noise_image("second", 10), "v1")
        third = content.add(APP, noise_image("third", 10), "v2")
        old_registry.put(content)
        old_registry.forget()  # the requests so far
        result = await run_import()
        assert run_import.reports() == [
            ("team/app:v1", f"team/app:v1 is immutable and points at {first.digest}; push another tag")
        ]
        assert (result["problems"], result["tags"]) == (1, 1)
        await assert_complete(store, APP, third)
        assert {request.digest for request in old_registry.requests("blob", "GET")} == set(third.blobs) - set(
            first.blobs
        )
        assert (await store.resolve_manifest(APP, Tag("v1"))).digest == first.digest != second.digest


@pytest.mark.parametrize("set_by", ["import", "ann"])
async def test_a_damaged_manifest_is_healed(
    store: StoredRegistry,
    old_registry: Hub,
    run_import: ImportRun,
    content: UpstreamContent,
    tmp_path: Path,
    set_by: str,
) -> None:
    """The stored manifest of a tag is damaged, and the old registry's tag points at the same manifest. The next import
    stores the manifest again, also if a user has pushed the tag, because the tag does not change, nor does the time at
    which it was set."""
    image = content.add(APP, noise_image("image", 1000), "1")
    old_registry.put(content)
    await run_import()
    if set_by == "ann":
        await store.delete_tag(APP, Tag("1"), by=Actor("ann"))
        manifest = await store.get_manifest(APP, Digest(image.digest))
        await store.put_manifest(APP, manifest, [Tag("1")], by=Actor("ann"))
    damage_manifest(tmp_path / "data", image.digest)
    with pytest.raises(ManifestUnknown):
        await store.get_manifest(APP, Tag("1"))
    with closing(second_connection(tmp_path / "data" / "entrepot.db")) as db:
        db.execute("UPDATE tag SET updated = 7.5")

        result = await run_import()

        assert db.execute("SELECT updated FROM tag").get == 7.5

    assert (result["tags"], run_import.reports("note")) == (1, [])
    await assert_complete(store, APP, image)
    assert (await store.resolve_manifest(APP, Tag("1"))).digest == image.digest


async def test_a_tag_of_a_damaged_manifest_is_moved(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, tmp_path: Path
) -> None:
    """The old registry's tag has moved since the last import, and the manifest that this registry's tag points at is
    damaged. The next import moves the tag, but not if a user has set it in this registry."""
    first = content.add(APP, noise_image("first", 1000), "1", "ours")
    old_registry.put(content)
    await run_import()
    other = content.add(APP, noise_image("other", 1000), "other")
    old_registry.put(content)
    await run_import()
    manifest = await store.get_manifest(APP, Digest(other.digest))
    await store.put_manifest(APP, manifest, [Tag("ours")], by=Actor("ann"))
    second = content.add(APP, noise_image("second", 1000), "1", "ours")
    old_registry.put(content)
    for image in (first, other):
        damage_manifest(tmp_path / "data", image.digest)

    await run_import()

    assert (await store.resolve_manifest(APP, Tag("1"))).digest == second.digest
    assert run_import.reports("note") == [("team/app:ours", "the tag stays as it is: ann has set it here")]


def damage_manifest(data: Path, digest: str) -> None:
    """Changes the row of a manifest as the server does when it finds that the stored bytes are damaged."""
    db = connect(data / "entrepot.db")
    db.execute("UPDATE manifest SET size = 0, body = X'' WHERE digest = ?", (digest,))
    db.close()
