"""Import of the directory of a registry:2. Broken content is reported and left out."""

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
from storage.errors import ManifestUnknown, StorageFull
from storage.imports import ImportInvalid
from storage.jobs import JSON, JobStopped
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import NamePattern
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from storage.upkeep.job_runner import JobContext, run_in_command
from tests.fakes.import_run import ImportRun, assert_whole
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
def old(tmp_path: Path) -> OldDirectory:
    return OldDirectory(tmp_path / "old")


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    data = tmp_path / "data"
    prepare_data_dir(data)
    async with open_registry(data) as opened:
        yield opened


@pytest.fixture
def run(store: StoredRegistry, old: OldDirectory) -> ImportRun:
    return import_of(store, old)


def import_of(store: StoredRegistry, old: OldDirectory) -> ImportRun:
    return ImportRun(store, KIND, import_directory, path=str(old.path))


async def tag_digest(store: StoredRegistry, tag: str, repo: RepositoryName = APP) -> str:
    return (await store.resolve_manifest(repo, Tag(tag))).digest


async def test_all_of_a_repository_comes_over(store: StoredRegistry, old: OldDirectory, run: ImportRun) -> None:
    """The import takes over tags, an index with its children, untagged manifests, and signatures under their fallback
    tags."""
    docker = old.push(APP, noise_image("docker", 1000, 200_000, docker=True), "1", "latest")
    index = old.push(APP, index_of((noise_image("a", 500), "amd64"), (noise_image("b", 500), "arm64")), "multi")
    untagged = old.push(APP, noise_image("untagged", 700))
    signature = noise_image("signature", 10, subject=docker)
    old.push(APP, fallback_index(signature), fallback_tag(docker.digest))
    before = old.snapshot()

    result = await run()

    for image in (docker, index, untagged, signature):
        await assert_whole(store, APP, image)
    tags = (await store.tags(APP, None, 10)).items
    assert set(tags) == {"1", "latest", "multi", fallback_tag(docker.digest)}
    assert await tag_digest(store, "latest") == docker.digest
    referrers = (await store.referrers(APP, Digest(docker.digest), None, None, 10)).items
    assert [each.digest for each in referrers] == [signature.digest]
    blobs = len({**docker.blobs, **index.blobs, **untagged.blobs, **signature.blobs})
    assert (result["tags"], result["manifests"], result["linked"], result["copied"]) == (4, 7, blobs, 0)
    assert (run.told(), run.told("note")) == ([], [])
    assert old.snapshot() == before


async def test_files_are_linked(store: StoredRegistry, old: OldDirectory, run: ImportRun, tmp_path: Path) -> None:
    """A blob is a hard link to the file of the old registry, and stays when the old file is deleted."""
    image = old.push(APP, noise_image("linked", 300_000), "1")
    layer = image.layers[0].digest
    await run()

    here = tmp_path / "data" / "blobs" / "sha256" / layer[7:9] / layer[7:]
    assert here.samefile(old.data(layer))
    old.data(layer).unlink()
    await assert_whole(store, APP, image)
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


async def test_copies(store: StoredRegistry, old: OldDirectory, run: ImportRun, tmp_path: Path) -> None:
    """With `copy`, the file of a blob is a copy."""
    image = old.push(APP, noise_image("copied", 5_000_000), "1")
    result = await run(copy=True)

    assert (result["copied"], result["linked"]) == (2, 0)
    for blob in image.blobs.values():
        here = tmp_path / "data" / "blobs" / "sha256" / blob.digest[7:9] / blob.digest[7:]
        assert not here.samefile(old.data(blob.digest))
    await assert_whole(store, APP, image)
    assert list((tmp_path / "data" / "uploads").iterdir()) == []


async def test_files_that_others_may_write_are_copied(store: StoredRegistry, old: OldDirectory, run: ImportRun) -> None:
    image = old.push(APP, noise_image("shared", 1000), "1")
    for digest in image.blobs:
        old.data(digest).chmod(0o666)
    result = await run()

    assert (result["copied"], result["linked"]) == (2, 0)
    [(_, note)] = run.told("note")
    assert note == "such files are copied, because they cannot be linked: other users may write to it"
    await assert_whole(store, APP, image)


async def test_a_second_run_brings_what_changed(store: StoredRegistry, old: OldDirectory, run: ImportRun) -> None:
    first = old.push(APP, noise_image("first", 1000), "1", "latest")
    await run()
    second = old.push(APP, noise_image("second", 1000), "2", "latest")
    old.data(first.layers[0].digest).unlink()  # what is here already is not read again

    result = await run()

    assert (result["tags"], result["present"], result["manifests"], result["linked"]) == (2, 1, 1, 2)
    assert await tag_digest(store, "latest") == second.digest
    assert run.told() == []


async def test_a_tag_that_was_changed_here_stays(store: StoredRegistry, old: OldDirectory, run: ImportRun) -> None:
    """An import moves only tags that an earlier import has set, unless it is told to overwrite others."""
    old.push(APP, noise_image("first", 10), "pushed", "deleted", "left")
    await run()
    second = old.push(APP, noise_image("second", 10), "pushed", "deleted", "left")
    mine = noise_image("mine", 10)
    other = OldDirectory(old.path.parent / "other")
    other.push(APP, mine, "x")
    await import_of(store, other)()
    manifest = await store.get_manifest(APP, Digest(mine.digest))
    ci = Actor("robot:ci")
    await store.put_manifest(APP, manifest, (Tag("pushed"),), by=ci)
    await store.delete_tag(APP, Tag("deleted"), by=ci)

    await run()

    assert await tag_digest(store, "pushed") == mine.digest
    assert await tag_digest(store, "left") == second.digest
    with pytest.raises(ManifestUnknown):
        await tag_digest(store, "deleted")
    assert run.told("note") == [
        ("team/app:deleted", "the tag stays as it is: robot:ci has deleted it here"),
        ("team/app:pushed", "the tag stays as it is: robot:ci has set it here"),
    ]
    await run(overwrite=True)
    assert await tag_digest(store, "pushed") == await tag_digest(store, "deleted") == second.digest


async def test_an_immutable_tag_is_a_problem_of_that_tag(tmp_path: Path, old: OldDirectory) -> None:
    """An immutable tag that points at another manifest is reported with the error of a push, and the import continues.
    The manifest for this tag is imported without a tag."""
    first = old.push(APP, noise_image("first", 10), "v1", "latest")
    prepare_data_dir(tmp_path / "data")
    rules = ImmutableTags([TagRule((NamePattern("team/**"),), (TagPattern("v*"),))])
    async with open_registry(tmp_path / "data", immutable_tags=rules) as store:
        run = import_of(store, old)
        await run()
        second = old.push(APP, noise_image("second", 10), "v1", "v2", "latest")
        result = await run()
        denied = f"team/app:v1 is immutable and points at {first.digest}; push another tag"
        assert run.told() == [("team/app:v1", denied)]
        assert (result["problems"], result["tags"]) == (1, 2)
        assert [await tag_digest(store, tag) for tag in ("v1", "v2", "latest")] == [first.digest, *[second.digest] * 2]
        await run(overwrite=True)
        assert run.told() == [("team/app:v1", denied)]


async def test_times_come_over(store: StoredRegistry, old: OldDirectory, run: ImportRun) -> None:
    """An imported tag has the time at which it was set in the old registry. The history of the tag names the import."""
    image = old.push(APP, noise_image("aged", 10))
    old.write_link(old.revision(APP, image.digest), image.digest, at=1_000_000.0)
    old.write_link(old.tag(APP, "1"), image.digest, at=2_000_000.0)
    await run()

    change = await store.imports.last_tag_change(APP, Tag("1"))
    assert change is not None
    assert (change.digest, change.actor, change.program) == (image.digest, "cli:ann", IMPORT_PROGRAM)
    db: Any = store.metadata._db  # type: ignore[attr-defined]
    assert db.execute("SELECT pushed FROM manifest").get == 1_000_000.0
    assert db.execute("SELECT updated FROM tag").get == 2_000_000.0


async def test_blobs_come_once(store: StoredRegistry, old: OldDirectory, run: ImportRun) -> None:
    """A layer in two repositories is linked once and counted once."""
    image = noise_image("common", 1000)
    for repo in ("a", "b"):
        old.push(repo, image, "1")
    result = await run()

    assert (result["linked"], result["shared"]) == (2, 2)
    for name in ("a", "b"):
        await assert_whole(store, RepositoryName(name), image)


async def test_broken_content_is_told(store: StoredRegistry, old: OldDirectory, run: ImportRun) -> None:
    """Each broken tag, manifest or blob is reported with its reason. All other content is imported, and no image is
    incomplete."""
    sound = old.push(APP, noise_image("sound", 10), "sound")
    missing = old.push(APP, noise_image("missing", 10), "missing")
    old.data(missing.layers[0].digest).unlink()
    rotten = old.push(APP, noise_image("rotten", 10), "rotten")
    old.data(rotten.config.digest).write_bytes(b"{}")
    no_manifest = old.push(APP, noise_image("no manifest", 10), "no-manifest")
    old.data(no_manifest.digest).unlink()
    bad_manifest = old.push(APP, noise_image("bad manifest", 10), "bad-manifest")
    old.data(bad_manifest.digest).write_bytes(bad_manifest.body[:-1])
    deleted = old.push(APP, noise_image("deleted", 10), "dangling")
    old.revision(APP, deleted.digest).unlink()
    half = index_of((noise_image("half", 10), "amd64"), (missing, "arm64"))
    old.push(APP, half, "half")
    old.data(missing.layers[0].digest).unlink()
    old.write_link(old.tag(APP, "nonsense"), "sha256:12")
    old.tag(APP, "empty").parent.mkdir(parents=True)
    schema_1 = ImageTree(SCHEMA_1, "application/vnd.docker.distribution.manifest.v1+json")
    old.push(APP, schema_1, "schema-1")
    unknown = ImageTree(b'{"schemaVersion": 2, "mediaType": "application/x-odd"}', "application/x-odd")
    old.push(APP, unknown, "odd")
    (old.root / "repositories" / "UPPER" / "_manifests").mkdir(parents=True)
    (old.root / "repositories" / APP / "_uploads" / "0").mkdir(parents=True)

    result = await run()

    layer = missing.layers[0].digest
    assert dict(run.told()) == {
        "UPPER:": "'UPPER' is not a repository name; a name has lower-case letters and digits, and between them "
        "'.', '_', '__', '-' or '/'",
        "team/app:missing": f"the file of the blob {layer} is missing",
        "team/app:rotten": f"the bytes of the blob {rotten.config.digest} have another digest",
        "team/app:no-manifest": "its file is missing",
        "team/app:bad-manifest": "the bytes of its file have another digest",
        "team/app:dangling": f"it points at {deleted.digest}, which was deleted",
        "team/app:half": f"its child {missing.digest}: the file of the blob {layer} is missing",
        "team/app:nonsense": "its link contains 'sha256:12', which is not a digest",
        "team/app:empty": "its link is missing",
        "team/app:schema-1": "schema 1 manifests are not accepted here; push with Docker 1.10 or newer",
        "team/app:odd": "manifests of type 'application/x-odd' are not taken here",
    }
    assert result["problems"] == len(run.told())
    assert ("team/app:", "unfinished pushes are left out: 1") in run.told("note")
    assert (await store.tags(APP, None, 20)).items == ["sound"]
    await assert_whole(store, APP, sound)

    for image in (missing, rotten, no_manifest, bad_manifest):  # repaired from a backup
        old.push(APP, image)
    result = await run()
    assert {name.rpartition(":")[2] for name, _ in run.told()} >= {"dangling", "nonsense", "empty", "schema-1", "odd"}
    assert result["tags"] == 5
    await assert_whole(store, APP, half)


@pytest.mark.parametrize("tag", ["multi", None], ids=["tagged", "untagged"])
async def test_a_broken_child_is_one_problem(
    store: StoredRegistry, old: OldDirectory, run: ImportRun, tag: str | None
) -> None:
    """A broken child of an index is one problem: that of the index, which names the child and the reason. This does not
    depend on the order in which the manifests are read. A tag that points at the child is a problem of its own."""
    problems = {}
    for number in range(6):
        child = noise_image(f"broken {number}", 10)
        index = index_of((noise_image(f"sound {number}", 10), "amd64"), (child, "arm64"))
        outer = index_of((index, "linux"))
        old.push(APP, outer, *([f"{tag}-{number}"] if tag else []))
        old.data(child.layers[0].digest).unlink()
        name = f"{APP}:{tag}-{number}" if tag else f"{APP}:{outer.digest}"
        reason = f"the file of the blob {child.layers[0].digest} is missing"
        problems[name] = f"its child {index.digest}: its child {child.digest}: {reason}"
    tagged = noise_image("broken with a tag", 10)
    old.push(APP, index_of((tagged, "arm64")), "around")
    old.push(APP, tagged, "alone")
    old.data(tagged.layers[0].digest).unlink()
    reason = f"the file of the blob {tagged.layers[0].digest} is missing"
    problems |= {f"{APP}:alone": reason, f"{APP}:around": f"its child {tagged.digest}: {reason}"}

    result = await run()

    assert sorted(run.told()) == sorted(problems.items())
    assert result["problems"] == len(problems)


async def test_chosen_repositories(store: StoredRegistry, old: OldDirectory, run: ImportRun) -> None:
    for number, name in enumerate(("team/app", "team/tmp-1", "other", "ghcr.io/x")):
        old.push(name, noise_image(str(number), 10), "1")

    await run(include=["team/**", "none/**"], exclude=["team/tmp-*"], upstreams=("ghcr.io",))
    assert (await store.repositories(None, 10)).items == ["team/app"]
    assert run.told("note") == [(":", "the pattern none/** matches no repository of the old registry")]

    await run(upstreams=("ghcr.io",))
    assert run.told() == [("ghcr.io/x:", "its name belongs to the mirror of ghcr.io here")]
    assert (await store.repositories(None, 10)).items == ["other", "team/app", "team/tmp-1"]


@pytest.mark.parametrize("below", ["", "docker", "docker/registry", "docker/registry/v2"])
async def test_any_part_of_the_path(store: StoredRegistry, old: OldDirectory, run: ImportRun, below: str) -> None:
    old.push(APP, noise_image("found", 10), "1")
    assert (await run(path=str(old.path / below)))["tags"] == 1


async def test_no_registry(store: StoredRegistry, run: ImportRun, tmp_path: Path) -> None:
    with pytest.raises(ImportInvalid, match="is no registry: name the directory that contains docker/registry/v2"):
        await run(path=str(tmp_path / "data"))
    with pytest.raises(ImportInvalid, match="is no directory"):
        await run(path=str(tmp_path / "none"))
    with pytest.raises(ImportInvalid, match="is not a pattern of names"):
        await run(include=["a b"])


async def test_blobs_without_a_manifest_stay(store: StoredRegistry, old: OldDirectory, run: ImportRun) -> None:
    """Only blobs to which a manifest refers are imported. These include the blobs that the index of a build cache
    lists."""
    stray = UpstreamBlob(b"stray", "application/octet-stream")
    cached = UpstreamBlob(b"cached", "application/vnd.buildkit.cacheconfig.v0")
    for blob in (stray, cached):
        old.write_data(blob.digest, blob.read())
        old.write_link(old.layer(APP, blob.digest), blob.digest)
    cache = index_of((manifest_of(cached), "amd64"))
    listed = b'{"schemaVersion": 2, "mediaType": "%b", "manifests": [%b]}' % (
        cache.media_type.encode(),
        str(cached.descriptor()).replace("'", '"').encode(),
    )
    old.push(APP, ImageTree(listed, cache.media_type, {cached.digest: cached}), "cache")
    result = await run()

    assert (result["linked"], result["problems"]) == (1, 0)
    assert run.told("note") == [("team/app:", "blobs to which no imported manifest refers are left out: 1")]
    assert (await store.resolve_blob(APP, Digest(cached.digest))).size == 6


async def test_a_stop_keeps_what_was_done(
    store: StoredRegistry, old: OldDirectory, run: ImportRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stopped import ends between two tags and keeps what it has imported. The next import continues."""
    images = [old.push(APP, noise_image(f"image {number}", 10), str(number)) for number in range(5)]
    monkeypatch.setattr("storage.upkeep.job_runner.SAVE_SECONDS", 0.0)
    router = Router(store, {}, store.is_known_repository, NamingRules())

    async def stopping(context: JobContext) -> JSON:
        report = context.report

        async def stop_at_two(done: int | None = None, **more: Any) -> None:
            if done == 2:
                await store.jobs.request_stop(context.job.id)
            await report(done, **more)

        context.report = stop_at_two  # type: ignore[method-assign]
        return await import_directory(store, router, context)

    with pytest.raises(JobStopped):
        await run_in_command(store.jobs, store.leases, KIND, {"path": str(old.path)}, stopping, actor="cli:ann")
    assert (await store.tags(APP, None, 10)).items == ["0", "1"]

    result = await run()
    assert (result["tags"], result["present"]) == (3, 2)
    for image in images:
        await assert_whole(store, APP, image)


async def test_a_collection_in_between_removes_nothing(tmp_path: Path, old: OldDirectory) -> None:
    """While garbage collection without a grace period runs all the time, every image is complete at the end of the
    import."""
    images = [old.push(APP, noise_image(f"image {number}", 10, 20, 30), str(number)) for number in range(30)]
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", grace=0) as store:

        async def collect() -> None:
            while True:
                await store.collector.collect()

        collecting = asyncio.create_task(collect())
        run = import_of(store, old)
        result = await run()
        collecting.cancel()
        assert (result["tags"], run.told()) == (30, [])
        for image in images:
            await assert_whole(store, APP, image)


class WeakSystem(System):
    """Refuses hard links. After `writes` writes of blobs, the disk is full."""

    writes = 1 << 30

    def link(self, fd: int, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        if sum(map(len, chunks)) >= 1000:
            self.writes -= 1
            if self.writes < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(fd, chunks, offset)


async def test_a_system_that_refuses_links(tmp_path: Path, old: OldDirectory) -> None:
    """If the system refuses hard links, files are copied, and this is reported once."""
    images = [old.push(APP, noise_image(f"image {number}", 1000), str(number)) for number in range(3)]
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", system=WeakSystem()) as store:
        run = import_of(store, old)
        result = await run()
        assert (result["linked"], result["copied"], result["problems"]) == (0, 6, 0)
        [(_, told)] = run.told("note")
        assert told.endswith("the system does not link it: Operation not permitted")
        for image in images:
            await assert_whole(store, APP, image)


async def test_a_full_disk_ends_the_import(tmp_path: Path, old: OldDirectory) -> None:
    """A full disk ends the import. What was imported stays, and after space was freed, the next import adds the
    rest."""
    images = [old.push(APP, noise_image(f"image {number}", 100_000), str(number)) for number in range(4)]
    prepare_data_dir(tmp_path / "data")
    system = WeakSystem()
    system.writes = 2
    async with open_registry(tmp_path / "data", system=system) as store:
        run = import_of(store, old)
        with pytest.raises(StorageFull):
            await run()
        assert (await store.tags(APP, None, 10)).items == ["0", "1"]
        system.writes = 1 << 30
        assert (await run())["tags"] == 2
        for image in images:
            await assert_whole(store, APP, image)
    assert list((tmp_path / "data" / "uploads").iterdir()) == []
