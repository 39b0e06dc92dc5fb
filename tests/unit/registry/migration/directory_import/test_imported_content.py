"""What an import of a directory adds to this registry: manifests, the blobs to which they refer, and tags, with their
times. A second import adds only what has changed or is missing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from registry.migration.directory_import import KIND, import_directory
from registry.naming import NamingRules
from registry.router import Router
from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor
from storage.errors import ManifestUnknown
from storage.imports import IMPORT_PROGRAM
from storage.jobs import JSON, JobStopped
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import NamePattern
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from storage.upkeep.job_runner import JobContext, run_in_command
from tests.fakes.import_run import ImportRun, assert_complete
from tests.fakes.old_directory import OldDirectory
from tests.fakes.upstream_content import (
    ImageTree,
    UpstreamBlob,
    fallback_index,
    fallback_tag,
    index_of,
    manifest_of,
    noise_image,
)
from tests.unit.registry.conftest import wait_until
from tests.unit.registry.migration.directory_import.conftest import APP, import_of


async def tag_digest(store: StoredRegistry, tag: str, repo: RepositoryName = APP) -> str:
    return (await store.resolve_manifest(repo, Tag(tag))).digest


async def test_all_content_of_a_repository_is_imported(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """The import copies tags, an index with the manifests that it lists, untagged manifests, and signatures with their
    fallback tags. It does not change the old registry."""
    docker = old_registry.push(APP, noise_image("docker", 1000, 200_000, docker=True), "1", "latest")
    index = old_registry.push(
        APP, index_of((noise_image("a", 500), "amd64"), (noise_image("b", 500), "arm64")), "multi"
    )
    untagged = old_registry.push(APP, noise_image("untagged", 700))
    signature = noise_image("signature", 10, subject=docker)
    old_registry.push(APP, fallback_index(signature), fallback_tag(docker.digest))
    files_before = old_registry.snapshot()

    result = await run_import()

    for image in (docker, index, untagged, signature):
        await assert_complete(store, APP, image)
    tags = (await store.tags(APP, None, 10)).items
    assert set(tags) == {"1", "latest", "multi", fallback_tag(docker.digest)}
    assert await tag_digest(store, "latest") == docker.digest
    referrers = (await store.referrers(APP, Digest(docker.digest), None, None, 10)).items
    assert [each.digest for each in referrers] == [signature.digest]
    blobs = len({**docker.blobs, **index.blobs, **untagged.blobs, **signature.blobs})
    assert (result["tags"], result["manifests"], result["linked"], result["copied"]) == (4, 7, blobs, 0)
    assert (run_import.reports(), run_import.reports("note")) == ([], [])
    assert old_registry.snapshot() == files_before


async def test_only_referenced_blobs_are_imported(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """Only blobs to which an imported manifest refers are imported. These include blobs that the index of a build cache
    lists. The import reports how many blobs it left out."""
    stray = UpstreamBlob(b"stray", "application/octet-stream")
    cached = UpstreamBlob(b"cached", "application/vnd.buildkit.cacheconfig.v0")
    for blob in (stray, cached):
        old_registry.write_data(blob.digest, blob.read())
        old_registry.write_link(old_registry.layer(APP, blob.digest), blob.digest)
    cache = index_of((manifest_of(cached), "amd64"))
    listed = b'{"schemaVersion": 2, "mediaType": "%b", "manifests": [%b]}' % (
        cache.media_type.encode(),
        str(cached.descriptor()).replace("'", '"').encode(),
    )
    old_registry.push(APP, ImageTree(listed, cache.media_type, {cached.digest: cached}), "cache")
    result = await run_import()

    assert (result["linked"], result["problems"]) == (1, 0)
    assert run_import.reports("note") == [("team/app:", "blobs to which no imported manifest refers are left out: 1")]
    assert (await store.resolve_blob(APP, Digest(cached.digest))).size == 6


async def test_a_shared_blob_is_linked_once(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """A blob in two repositories is linked once. The second repository counts it as shared."""
    image = noise_image("common", 1000)
    for repo in ("a", "b"):
        old_registry.push(repo, image, "1")
    result = await run_import()

    assert (result["linked"], result["shared"]) == (2, 2)
    for name in ("a", "b"):
        await assert_complete(store, RepositoryName(name), image)


async def test_times_are_imported(store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun) -> None:
    """Imported tags have the times at which they were set at the old registry, so that they keep their order. Manifests
    have the time of the import. The history of a tag names the import as the program."""
    image = old_registry.push(APP, noise_image("aged", 10))
    old_registry.write_link(old_registry.revision(APP, image.digest), image.digest, at=1_000_000.0)
    old_registry.write_link(old_registry.tag(APP, "1"), image.digest, at=2_000_000.0)
    started = time.time()
    await run_import()

    change = await store.imports.last_tag_change(APP, Tag("1"))
    assert change is not None
    assert (change.digest, change.actor, change.program) == (image.digest, "cli:ann", IMPORT_PROGRAM)
    db: Any = store.metadata._db  # type: ignore[attr-defined]
    assert started <= db.execute("SELECT pushed FROM manifest").get <= time.time()
    assert db.execute("SELECT updated FROM tag").get == 2_000_000.0


async def test_a_second_import_adds_only_changes(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """A second import adds only what has changed in the old registry. Content that was imported before is not read
    again."""
    first = old_registry.push(APP, noise_image("first", 1000), "1", "latest")
    await run_import()
    second = old_registry.push(APP, noise_image("second", 1000), "2", "latest")
    old_registry.data(first.layers[0].digest).unlink()  # the imported blob is not read again

    result = await run_import()

    assert (result["tags"], result["present"], result["manifests"], result["linked"]) == (2, 1, 1, 2)
    assert await tag_digest(store, "latest") == second.digest
    assert run_import.reports() == []


async def test_a_tag_that_was_changed_after_the_import_stays(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """An import moves only tags that an earlier import has set. Tags that a user has pushed or deleted since then stay
    as they are, unless the import has the argument `overwrite`."""
    old_registry.push(APP, noise_image("first", 10), "pushed", "deleted", "left")
    await run_import()
    second = old_registry.push(APP, noise_image("second", 10), "pushed", "deleted", "left")
    pushed_image = noise_image("mine", 10)
    other = OldDirectory(old_registry.path.parent / "other")
    other.push(APP, pushed_image, "x")
    await import_of(store, other)()
    manifest = await store.get_manifest(APP, Digest(pushed_image.digest))
    ci = Actor("robot:ci")
    await store.put_manifest(APP, manifest, (Tag("pushed"),), by=ci)
    await store.delete_tag(APP, Tag("deleted"), by=ci)

    await run_import()

    assert await tag_digest(store, "pushed") == pushed_image.digest
    assert await tag_digest(store, "left") == second.digest
    with pytest.raises(ManifestUnknown):
        await tag_digest(store, "deleted")
    assert run_import.reports("note") == [
        ("team/app:deleted", "the tag stays as it is: robot:ci has deleted it here"),
        ("team/app:pushed", "the tag stays as it is: robot:ci has set it here"),
    ]
    await run_import(overwrite=True)
    assert await tag_digest(store, "pushed") == await tag_digest(store, "deleted") == second.digest


async def test_an_immutable_tag_is_reported_as_a_problem(tmp_path: Path, old_registry: OldDirectory) -> None:
    """If an immutable tag points at another manifest here than in the old registry, the tag is reported with the error
    that a push would get, and the import continues. The manifest is imported without the tag."""
    first = old_registry.push(APP, noise_image("first", 10), "v1", "latest")
    prepare_data_dir(tmp_path / "data")
    rules = ImmutableTags([TagRule((NamePattern("team/**"),), (TagPattern("v*"),))])
    async with open_registry(tmp_path / "data", immutable_tags=rules) as store:
        run_import = import_of(store, old_registry)
        await run_import()
        second = old_registry.push(APP, noise_image("second", 10), "v1", "v2", "latest")
        result = await run_import()
        denied = f"team/app:v1 is immutable and points at {first.digest}; push another tag"
        assert run_import.reports() == [("team/app:v1", denied)]
        assert (result["problems"], result["tags"]) == (1, 2)
        assert [await tag_digest(store, tag) for tag in ("v1", "v2", "latest")] == [first.digest, *[second.digest] * 2]
        untagged = old_registry.push(APP, noise_image("third", 10), "v1")
        await run_import(overwrite=True)
        assert run_import.reports() == [("team/app:v1", denied)]
        assert await tag_digest(store, "v1") == first.digest
        await assert_complete(store, APP, untagged)


async def test_a_stopped_import_can_be_continued(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import that is stopped ends between two tags, and the imported content stays. The next import adds the missing
    tags."""
    images = [old_registry.push(APP, noise_image(f"image {number}", 10), str(number)) for number in range(5)]
    monkeypatch.setattr("storage.upkeep.job_runner.SAVE_SECONDS", 0.0)
    router = Router(store, {}, store.is_known_repository, NamingRules())

    async def stop_after_two_tags(context: JobContext) -> JSON:
        report = context.report

        async def stop_at_two(done: int | None = None, **more: Any) -> None:
            if done == 2:
                await store.jobs.request_stop(context.job.id)
            await report(done, **more)

        context.report = stop_at_two  # type: ignore[method-assign]
        return await import_directory(store, router, context)

    with pytest.raises(JobStopped):
        await run_in_command(
            store.jobs, store.leases, KIND, {"path": str(old_registry.path)}, stop_after_two_tags, actor="cli:ann"
        )
    assert (await store.tags(APP, None, 10)).items == ["0", "1"]

    result = await run_import()
    assert (result["tags"], result["present"]) == (3, 2)
    for image in images:
        await assert_complete(store, APP, image)


@pytest.mark.slow
async def test_garbage_collection_during_an_import_removes_nothing(tmp_path: Path, old_registry: OldDirectory) -> None:
    """Garbage collection without a grace period runs during the whole import. At the end, every imported image is
    complete."""
    images = [old_registry.push(APP, noise_image(f"image {number}", 10, 20, 30), str(number)) for number in range(30)]
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", grace=0) as store:
        rounds = 0

        async def collect() -> None:
            nonlocal rounds
            while True:
                await store.collector.collect()
                rounds += 1

        async def import_between_rounds(store: StoredRegistry, router: Router, context: JobContext) -> JSON:
            report = context.report

            async def wait_for_a_round(done: int | None = None, **more: Any) -> None:
                rounds_before = rounds
                if done in (10, 20):
                    await wait_until(lambda: rounds > rounds_before or collecting.done())
                await report(done, **more)

            context.report = wait_for_a_round  # type: ignore[method-assign]
            return await import_directory(store, router, context)

        collecting = asyncio.create_task(collect())
        run_import = import_of(store, old_registry)
        run_import.work = import_between_rounds
        result = await run_import()
        assert not collecting.done(), collecting.exception()
        collecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await collecting
        assert rounds > 1
        assert (result["tags"], run_import.reports()) == (30, [])
        for image in images:
            await assert_complete(store, APP, image)
