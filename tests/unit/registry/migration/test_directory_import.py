"""The import of the directory of a CNCF Distribution registry (the image registry:2), which the tests call the old
registry. Broken content is reported and not imported."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from registry.migration.directory_import import KIND, import_directory
from registry.migration.image_writer import IMPORT_PROGRAM
from registry.naming import NamingRules
from registry.router import Router
from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor
from storage.data_dir.system import System
from storage.errors import BlobUnknown, ManifestUnknown, StorageFull
from storage.imports import ImportInvalid
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

APP = RepositoryName("team/app")
SCHEMA_1 = b'{"schemaVersion": 1, "name": "team/app", "tag": "old", "fsLayers": [], "history": [], "signatures": []}'


@pytest.fixture
def old_registry(tmp_path: Path) -> OldDirectory:
    return OldDirectory(tmp_path / "old")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    data = tmp_path / "data"
    prepare_data_dir(data)
    async with open_registry(data) as opened:
        yield opened


@pytest.fixture
def run_import(store: StoredRegistry, old_registry: OldDirectory) -> ImportRun:
    return import_of(store, old_registry)


def import_of(store: StoredRegistry, old_registry: OldDirectory) -> ImportRun:
    return ImportRun(store, KIND, import_directory, path=str(old_registry.path))


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


async def test_files_are_linked(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, tmp_path: Path
) -> None:
    """The file of an imported blob is a hard link to the file of the old registry. It stays if the old file is
    deleted."""
    image = old_registry.push(APP, noise_image("linked", 300_000), "1")
    layer = image.layers[0].digest
    await run_import()

    blob_path = tmp_path / "data" / "blobs" / "sha256" / layer[7:9] / layer[7:]
    assert blob_path.samefile(old_registry.data(layer))
    old_registry.data(layer).unlink()
    await assert_complete(store, APP, image)
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


async def test_files_are_copied_on_request(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, tmp_path: Path
) -> None:
    """With `copy`, the file of a blob is a copy."""
    image = old_registry.push(APP, noise_image("copied", 5_000_000), "1")
    result = await run_import(copy=True)

    assert (result["copied"], result["linked"]) == (2, 0)
    for blob in image.blobs.values():
        blob_path = tmp_path / "data" / "blobs" / "sha256" / blob.digest[7:9] / blob.digest[7:]
        assert not blob_path.samefile(old_registry.data(blob.digest))
    await assert_complete(store, APP, image)
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


async def test_files_that_other_users_may_write_are_copied(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """A file of the old registry that other users may write is copied instead of linked, and this is reported."""
    image = old_registry.push(APP, noise_image("shared", 1000), "1")
    for digest in image.blobs:
        old_registry.data(digest).chmod(0o666)
    result = await run_import()

    assert (result["copied"], result["linked"]) == (2, 0)
    [(_, note)] = run_import.reports("note")
    assert note == "such files are copied, because they cannot be linked: other users may write to it"
    await assert_complete(store, APP, image)


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
    """If an immutable tag points at another manifest, the tag is reported with the error that a push would get, and the
    import continues. The manifest of this tag in the old registry is imported without the tag."""
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
        await run_import(overwrite=True)
        assert run_import.reports() == [("team/app:v1", denied)]


async def test_times_are_imported(store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun) -> None:
    """Imported manifests and tags have the times at which they were pushed to the old registry. The history of a tag
    names the import as the program."""
    image = old_registry.push(APP, noise_image("aged", 10))
    old_registry.write_link(old_registry.revision(APP, image.digest), image.digest, at=1_000_000.0)
    old_registry.write_link(old_registry.tag(APP, "1"), image.digest, at=2_000_000.0)
    await run_import()

    change = await store.imports.last_tag_change(APP, Tag("1"))
    assert change is not None
    assert (change.digest, change.actor, change.program) == (image.digest, "cli:ann", IMPORT_PROGRAM)
    db: Any = store.metadata._db  # type: ignore[attr-defined]
    assert db.execute("SELECT pushed FROM manifest").get == 1_000_000.0
    assert db.execute("SELECT updated FROM tag").get == 2_000_000.0


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


async def test_known_digest_gives_no_content_of_another_repository(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """Manifests name a layer and a child manifest that the old registry serves only from another repository: their
    links are missing. The import does not take them from that repository, neither before nor after they are stored."""
    secret = old_registry.push("bob/secret", noise_image("secret", 10), "1")
    config = UpstreamBlob(b"{}", "application/vnd.oci.image.config.v1+json")
    old_registry.push("evil/app", manifest_of(config, secret.layers[0]), "layer")
    old_registry.layer("evil/app", secret.layers[0].digest).unlink()
    old_registry.push("evil/app", index_of((secret, "amd64")), "index")
    old_registry.revision("evil/app", secret.digest).unlink()
    old_registry.layer("evil/app", secret.layers[0].digest).unlink()
    reason = "the old registry does not serve it from this repository: its link is missing"
    expected = {
        "evil/app:layer": f"the blob {secret.layers[0].digest}: {reason}",
        "evil/app:index": f"its child {secret.digest}: {reason}",
    }

    await run_import(include=["evil/**"])
    assert dict(run_import.reports()) == expected
    await run_import()
    assert dict(run_import.reports()) == expected
    await run_import()
    assert dict(run_import.reports()) == expected
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(RepositoryName("evil/app"), Digest(secret.layers[0].digest))
    await assert_complete(store, RepositoryName("bob/secret"), secret)


async def test_broken_content_is_reported(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """Each broken tag, manifest or blob is reported with a reason. All other content is imported, and no imported image
    is incomplete. After the old registry was repaired, a second import adds the rest."""
    sound_image = old_registry.push(APP, noise_image("sound", 10), "sound")
    incomplete_image = old_registry.push(APP, noise_image("missing", 10), "missing")
    old_registry.data(incomplete_image.layers[0].digest).unlink()
    corrupt_config = old_registry.push(APP, noise_image("rotten", 10), "rotten")
    old_registry.data(corrupt_config.config.digest).write_bytes(b"{}")
    missing_manifest = old_registry.push(APP, noise_image("no manifest", 10), "no-manifest")
    old_registry.data(missing_manifest.digest).unlink()
    corrupt_manifest = old_registry.push(APP, noise_image("bad manifest", 10), "bad-manifest")
    old_registry.data(corrupt_manifest.digest).write_bytes(corrupt_manifest.body[:-1])
    deleted_manifest = old_registry.push(APP, noise_image("deleted", 10), "dangling")
    old_registry.revision(APP, deleted_manifest.digest).unlink()
    incomplete_index = index_of((noise_image("half", 10), "amd64"), (incomplete_image, "arm64"))
    old_registry.push(APP, incomplete_index, "half")
    old_registry.data(incomplete_image.layers[0].digest).unlink()
    old_registry.write_link(old_registry.tag(APP, "nonsense"), "sha256:12")
    old_registry.tag(APP, "empty").parent.mkdir(parents=True)
    schema_1 = ImageTree(SCHEMA_1, "application/vnd.docker.distribution.manifest.v1+json")
    old_registry.push(APP, schema_1, "schema-1")
    unknown_type = ImageTree(b'{"schemaVersion": 2, "mediaType": "application/x-odd"}', "application/x-odd")
    old_registry.push(APP, unknown_type, "odd")
    (old_registry.root / "repositories" / "UPPER" / "_manifests").mkdir(parents=True)
    (old_registry.root / "repositories" / APP / "_uploads" / "0").mkdir(parents=True)

    result = await run_import()

    layer = incomplete_image.layers[0].digest
    assert dict(run_import.reports()) == {
        "UPPER:": "'UPPER' is not a repository name; a name has lower-case letters and digits, and between them "
        "'.', '_', '__', '-' or '/'",
        "team/app:missing": f"the file of the blob {layer} is missing",
        "team/app:rotten": f"the bytes of the blob {corrupt_config.config.digest} have another digest",
        "team/app:no-manifest": "its file is missing",
        "team/app:bad-manifest": "the bytes of its file have another digest",
        "team/app:dangling": f"it points at {deleted_manifest.digest}, which was deleted",
        "team/app:half": f"its child {incomplete_image.digest}: the file of the blob {layer} is missing",
        "team/app:nonsense": "its link contains 'sha256:12', which is not a digest",
        "team/app:empty": "its link is missing",
        "team/app:schema-1": "schema 1 manifests are not accepted here; push with Docker 1.10 or newer",
        "team/app:odd": "manifests of type 'application/x-odd' are not taken here",
    }
    assert result["problems"] == len(run_import.reports())
    assert ("team/app:", "unfinished pushes are left out: 1") in run_import.reports("note")
    assert (await store.tags(APP, None, 20)).items == ["sound"]
    await assert_complete(store, APP, sound_image)

    # The old registry is repaired from a backup.
    for image in (incomplete_image, corrupt_config, missing_manifest, corrupt_manifest):
        old_registry.push(APP, image)
    result = await run_import()
    assert {name.rpartition(":")[2] for name, _ in run_import.reports()} >= {
        "dangling",
        "nonsense",
        "empty",
        "schema-1",
        "odd",
    }
    assert result["tags"] == 5
    await assert_complete(store, APP, incomplete_index)


@pytest.mark.parametrize("tag", ["multi", None], ids=["tagged", "untagged"])
async def test_a_broken_child_is_one_problem(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, tag: str | None
) -> None:
    """If an index lists a broken manifest, one problem is reported, for the index. It names the broken manifest and the
    reason, whatever the order in which the manifests are read. If a tag points at the broken manifest, the tag is a
    second problem."""
    problems = {}
    for number in range(6):
        child = noise_image(f"broken {number}", 10)
        index = index_of((noise_image(f"sound {number}", 10), "amd64"), (child, "arm64"))
        outer = index_of((index, "linux"))
        old_registry.push(APP, outer, *([f"{tag}-{number}"] if tag else []))
        old_registry.data(child.layers[0].digest).unlink()
        name = f"{APP}:{tag}-{number}" if tag else f"{APP}:{outer.digest}"
        reason = f"the file of the blob {child.layers[0].digest} is missing"
        problems[name] = f"its child {index.digest}: its child {child.digest}: {reason}"
    tagged = noise_image("broken with a tag", 10)
    old_registry.push(APP, index_of((tagged, "arm64")), "around")
    old_registry.push(APP, tagged, "alone")
    old_registry.data(tagged.layers[0].digest).unlink()
    reason = f"the file of the blob {tagged.layers[0].digest} is missing"
    problems |= {f"{APP}:alone": reason, f"{APP}:around": f"its child {tagged.digest}: {reason}"}

    result = await run_import()

    assert sorted(run_import.reports()) == sorted(problems.items())
    assert result["problems"] == len(problems)


async def test_chosen_repositories(store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun) -> None:
    """The arguments `include` and `exclude` choose repositories by patterns. A repository whose name belongs to a
    mirror is reported and not imported."""
    for number, name in enumerate(("team/app", "team/tmp-1", "other", "ghcr.io/x")):
        old_registry.push(name, noise_image(str(number), 10), "1")

    await run_import(include=["team/**", "none/**"], exclude=["team/tmp-*"], upstreams=("ghcr.io",))
    assert (await store.repositories(None, 10)).items == ["team/app"]
    assert run_import.reports("note") == [(":", "the pattern none/** matches no repository of the old registry")]

    await run_import(upstreams=("ghcr.io",))
    assert run_import.reports() == [("ghcr.io/x:", "its name belongs to the mirror of ghcr.io here")]
    assert (await store.repositories(None, 10)).items == ["other", "team/app", "team/tmp-1"]


@pytest.mark.parametrize("below", ["", "docker", "docker/registry", "docker/registry/v2"])
async def test_the_path_may_name_any_directory_of_the_layout(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, below: str
) -> None:
    """The path may be the root directory of the old registry or any of the directories `docker/registry/v2` below
    it."""
    old_registry.push(APP, noise_image("found", 10), "1")
    assert (await run_import(path=str(old_registry.path / below)))["tags"] == 1


async def test_invalid_paths_and_patterns_are_refused(
    store: StoredRegistry, run_import: ImportRun, tmp_path: Path
) -> None:
    """A path that is not the directory of a registry is refused, and so is a malformed pattern."""
    with pytest.raises(ImportInvalid, match="is no registry: name the directory that contains docker/registry/v2"):
        await run_import(path=str(tmp_path / "data"))
    with pytest.raises(ImportInvalid, match="is no directory"):
        await run_import(path=str(tmp_path / "none"))
    with pytest.raises(ImportInvalid, match="is not a pattern of names"):
        await run_import(include=["a b"])


async def test_only_referenced_blobs_are_imported(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun
) -> None:
    """Only blobs to which an imported manifest refers are imported. These include blobs that the index of a build cache
    lists. The number of the other blobs is reported."""
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


async def test_a_stopped_import_can_be_continued(
    store: StoredRegistry, old_registry: OldDirectory, run_import: ImportRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An import that is stopped ends between two tags, and the imported content stays. The next import adds the
    rest."""
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


async def test_garbage_collection_during_an_import_removes_nothing(tmp_path: Path, old_registry: OldDirectory) -> None:
    """Garbage collection without a grace period runs during the whole import. At the end, every imported image is
    complete."""
    images = [old_registry.push(APP, noise_image(f"image {number}", 10, 20, 30), str(number)) for number in range(30)]
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", grace=0) as store:

        async def collect() -> None:
            while True:
                await store.collector.collect()

        collecting = asyncio.create_task(collect())
        run_import = import_of(store, old_registry)
        result = await run_import()
        collecting.cancel()
        assert (result["tags"], run_import.reports()) == (30, [])
        for image in images:
            await assert_complete(store, APP, image)


class LimitedSystem(System):
    """A system that refuses hard links, and whose disk is full after `writes` writes of large blobs."""

    writes = 1 << 30

    def link(self, fd: int, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        if sum(map(len, chunks)) >= 1000:
            self.writes -= 1
            if self.writes < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, chunks, offset)


async def test_a_system_that_refuses_links(tmp_path: Path, old_registry: OldDirectory) -> None:
    """If the system refuses hard links, the files are copied. This is reported once."""
    images = [old_registry.push(APP, noise_image(f"image {number}", 1000), str(number)) for number in range(3)]
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", system=LimitedSystem()) as store:
        run_import = import_of(store, old_registry)
        result = await run_import()
        assert (result["linked"], result["copied"], result["problems"]) == (0, 6, 0)
        [(_, note)] = run_import.reports("note")
        assert note.endswith("the system does not link it: Operation not permitted")
        for image in images:
            await assert_complete(store, APP, image)


async def test_a_full_disk_ends_the_import(tmp_path: Path, old_registry: OldDirectory) -> None:
    """If the disk becomes full, the import ends with an error, and the imported content stays. After space was freed,
    the next import adds the rest."""
    images = [old_registry.push(APP, noise_image(f"image {number}", 100_000), str(number)) for number in range(4)]
    prepare_data_dir(tmp_path / "data")
    system = LimitedSystem()
    system.writes = 2
    async with open_registry(tmp_path / "data", system=system) as store:
        run_import = import_of(store, old_registry)
        with pytest.raises(StorageFull):
            await run_import()
        assert (await store.tags(APP, None, 10)).items == ["0", "1"]
        system.writes = 1 << 30
        assert (await run_import())["tags"] == 2
        for image in images:
            await assert_complete(store, APP, image)
    assert list((tmp_path / "data" / "uploads").iterdir()) == []
