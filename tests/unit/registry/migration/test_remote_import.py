"""Import of content over the network, from registries with various faults. A second run fetches only what has
changed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from registry.config import Upstream
from registry.migration.remote_import import KIND, import_remote
from registry.migration.remote_registry import FAILURES_TO_END
from registry.router import Router
from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor
from storage.imports import ImportInvalid, SourceDown
from storage.jobs import JSON
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import NamePattern
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from storage.upkeep.job_runner import JobContext
from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import Hub, hub, union
from tests.fakes.import_run import ImportRun, assert_whole
from tests.fakes.upstream_content import (
    ImageTree,
    UpstreamBlob,
    UpstreamContent,
    fallback_index,
    fallback_tag,
    index_of,
    manifest_of,
    noise_image,
)
from tests.fakes.upstream_source import ScriptedServer

APP = RepositoryName("team/app")
CONFIGURED: list[Upstream] = []
"""The upstreams in the settings."""


@pytest.fixture
def content() -> UpstreamContent:
    return UpstreamContent()


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Hub]:
    """A registry without content that lists no repositories."""
    with hub(tmp_path, UpstreamContent()) as running:
        yield running


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as opened:
        yield opened


class Pauses(list[float]):
    """Records the pauses before retries, and ends them at once."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def run(store: StoredRegistry, old: Hub, pauses: Pauses) -> ImportRun:
    return import_into(store, old, pauses)


def import_into(store: StoredRegistry, old: Hub, pauses: Pauses) -> ImportRun:
    async def work(store: StoredRegistry, router: Router, context: JobContext) -> JSON:
        return await import_remote(store, router, context, CONFIGURED, pauses)

    return ImportRun(store, KIND, work, url=old.url, repositories=[str(APP)])


async def test_images_come_with_all_platforms_and_signatures(
    store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent
) -> None:
    """Referrers of the index and of its children, and their referrers, come through the referrers API."""
    amd64, arm64 = noise_image("amd64", 1000), noise_image("arm64", 3 * MIB)
    image = content.add(APP, index_of((amd64, "amd64"), (arm64, "arm64")), "1", "latest")
    docker = content.add(APP, noise_image("docker", 10, docker=True), "docker")
    signature = content.add(APP, noise_image("signature", 10, subject=image))
    sbom = content.add(APP, noise_image("sbom", 10, subject=arm64))
    signed_sbom = content.add(APP, noise_image("signed sbom", 10, subject=sbom))
    old.put(content)

    result = await run()

    for each in (image, docker, signature, sbom, signed_sbom):
        await assert_whole(store, APP, each)
    assert (result["tags"], result["manifests"], run.told()) == (3, 7, [])
    assert (await store.tags(APP, None, 10)).items == ["1", "docker", "latest"]
    referrers = (await store.referrers(APP, Digest(arm64.digest), None, None, 10)).items
    assert [each.digest for each in referrers] == [sbom.digest]


async def test_an_immutable_tag_is_a_problem_of_that_tag(
    tmp_path: Path, old: Hub, content: UpstreamContent, pauses: Pauses
) -> None:
    """An immutable tag is reported and its content is not fetched. The import continues with the other tags."""
    first = content.add(APP, noise_image("first", 10), "v1")
    old.put(content)
    rules = ImmutableTags([TagRule((NamePattern("team/**"),), (TagPattern("v*"),))])
    prepare_data_dir(tmp_path / "fixed")
    async with open_registry(tmp_path / "fixed", immutable_tags=rules) as store:
        run = import_into(store, old, pauses)
        await run()
        second = content.add(APP, noise_image("second", 10), "v1")
        third = content.add(APP, noise_image("third", 10), "v2")
        old.put(content)
        old.forget()
        result = await run()
        assert run.told() == [
            ("team/app:v1", f"team/app:v1 is immutable and points at {first.digest}; push another tag")
        ]
        assert (result["problems"], result["tags"]) == (1, 1)
        await assert_whole(store, APP, third)
        assert {seen.digest for seen in old.requests("blob", "GET")} == set(third.blobs) - set(first.blobs)
        assert (await store.resolve_manifest(APP, Tag("v1"))).digest == first.digest != second.digest


async def test_fallback_tags_are_tags(
    store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent
) -> None:
    """From a registry without the referrers API, referrers are imported with the fallback tags."""
    image = content.add(APP, noise_image("image", 10), "1")
    signature = noise_image("signature", 10, subject=image)
    content.add(APP, fallback_index(signature), fallback_tag(image.digest))
    old.put(content)
    old.set(referrers=False)

    await run()

    referrers = (await store.referrers(APP, Digest(image.digest), None, None, 10)).items
    assert [each.digest for each in referrers] == [signature.digest]
    assert old.count("referrers") == 1  # which showed that there is no such API


async def test_a_second_run_fetches_what_changed(
    store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent
) -> None:
    first = content.add(APP, noise_image("first", 1000), "1", "latest")
    old.put(content)
    await run()
    second = content.add(APP, noise_image("second", 1000), "2", "latest")
    signature = content.add(APP, noise_image("signature", 10, subject=first))
    old.put(content)
    old.forget()

    result = await run()

    assert (result["tags"], result["present"], result["manifests"], result["fetched"]) == (2, 1, 2, 4)
    assert old.count("manifest", "GET") == 2
    assert old.count("manifest", "HEAD") == 3
    assert all(not old.sent(digest) for digest in first.blobs)
    for image in (second, signature):
        await assert_whole(store, APP, image)


async def test_a_tag_that_was_changed_here_stays(
    store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent
) -> None:
    image = content.add(APP, noise_image("image", 10), "1")
    old.put(content)
    await run()
    await store.delete_tag(APP, Tag("1"), by=Actor("ann"))

    result = await run()
    assert run.told("note") == [("team/app:1", "the tag stays as it is: ann has deleted it here")]
    assert result["tags"] == 0
    await run(overwrite=True)
    assert (await store.resolve_manifest(APP, Tag("1"))).digest == image.digest


async def test_blobs_come_once(store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent) -> None:
    """A layer of several images in several repositories is downloaded once, although the images are imported at the
    same time."""
    image = noise_image("common", 2 * MIB)
    names = ["a", "b", "c"]
    for name in names:
        content.add(name, image, "1", "2")
    old.put(content)

    result = await run(repositories=names)

    layer = image.layers[0].digest
    assert sum(stop - start for start, stop in old.sent(layer)) == 2 * MIB
    assert (result["fetched"], result["shared"]) == (2, 4)
    for name in names:
        await assert_whole(store, name, image)


async def test_faults_are_retried(
    store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent, pauses: Pauses
) -> None:
    """Requests with temporary errors, broken connections or wrong bytes are repeated after pauses. An interrupted
    download continues where it stopped."""
    image = content.add(APP, noise_image("image", 9 * MIB), "1")
    layer = image.layers[0].digest
    old.put(content)
    old.fault(on="tags", status=503)
    old.fault(on="manifest", method="HEAD", status=500)
    old.fault(on="manifest", method="GET", hangup=True, times=3)
    old.fault(on="blob", match=layer, drop_after=500_000, times=3)

    result = await run()

    assert (result["tags"], run.told()) == (1, [])
    assert pauses
    assert union(old.sent(layer)) == [(0, 9 * MIB)]
    await assert_whole(store, APP, image)


async def test_what_does_not_pass_is_told(
    store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent
) -> None:
    """A permanent error is reported, the rest is imported, and the next run fetches what is missing."""
    sound = content.add(APP, noise_image("sound", 10), "sound")
    broken = content.add(APP, noise_image("broken", 10), "broken")
    gone = content.add(APP, noise_image("gone", 10), "gone")
    wrong = content.add(APP, noise_image("wrong", 1000), "wrong")
    failing = content.add(APP, noise_image("failing", 10), "failing")
    old.put(content)
    old.remove(APP, gone.layers[0].digest)
    old.fault(on="manifest", match=broken.digest, status=500, times=None)
    old.fault(on="manifest", match="/failing", method="", status=500, times=None)
    old.fault(on="blob", match=wrong.layers[0].digest, corrupt=5, times=None)

    await run(jobs=1)

    told = dict(run.told())
    assert set(told) == {"team/app:broken", "team/app:gone", "team/app:wrong", "team/app:failing"}
    assert told["team/app:gone"] == f"{old.address} does not have the blob {gone.layers[0].digest}"
    assert told["team/app:wrong"] == f"{old.address} sends other bytes for the blob {wrong.layers[0].digest}"
    assert told["team/app:broken"] == f"the upstream registry {old.url} answers 500"
    assert (await store.tags(APP, None, 10)).items == ["sound"]

    old.clear()
    old.put(content)
    result = await run()
    assert (result["tags"], result["present"], run.told()) == (4, 1, [])
    for image in (sound, broken, gone, wrong, failing):
        await assert_whole(store, APP, image)


@pytest.mark.slow
async def test_manifests_that_are_not_accepted(
    store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent, pauses: Pauses
) -> None:
    """A schema 1 manifest is reported without a retry, because a retry cannot help."""
    body = b'{"schemaVersion": 1, "name": "team/app", "tag": "old", "fsLayers": [], "history": []}'
    content.add(APP, ImageTree(body, "application/vnd.docker.distribution.manifest.v1+json"), "old")
    old.put(content)
    result = await run()
    [(name, reason)] = run.told()
    assert (name, result["tags"], pauses) == ("team/app:old", 0, [])
    assert "schema 1 manifests are not accepted here" in reason


async def test_foreign_layers_may_be_missing(
    store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent
) -> None:
    """Foreign layers need not be imported, because clients fetch them from other servers. Those that the old registry
    has are imported."""
    foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    config = UpstreamBlob(b"{}", "application/vnd.oci.image.config.v1+json")
    there, elsewhere = UpstreamBlob(b"there", foreign), UpstreamBlob(b"elsewhere", foreign)
    image = content.add(APP, manifest_of(config, there, elsewhere), "windows")
    old.put(content)
    old.remove(APP, elsewhere.digest)
    result = await run()
    assert (result["tags"], result["fetched"], run.told()) == (1, 2, [])
    assert (await store.get_manifest(APP, Tag("windows"))).body == image.body
    assert (await store.resolve_blob(APP, Digest(there.digest))).size == 5


@pytest.mark.slow
async def test_a_dead_registry_ends_the_import(
    store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent
) -> None:
    """After many failed requests in a row, the import ends with an error. The next import continues."""
    for number in range(2 * FAILURES_TO_END):
        content.add(APP, noise_image(f"image {number}", 10), f"{number:02}")
    old.put(content)
    old.fault(on="manifest", method="", skip=6, status=502, times=None)
    with pytest.raises(SourceDown, match="the old registry does not answer; run the import again later"):
        await run(jobs=1)
    imported = len((await store.tags(APP, None, 100)).items)
    assert 1 <= imported < 8

    old.clear()
    result = await run()
    assert (result["present"], result["tags"]) == (imported, 2 * FAILURES_TO_END - imported)


async def test_repositories_that_are_not_listed(run: ImportRun, old: Hub) -> None:
    """If the old registry does not list its repositories, the error says what to do. An unknown repository is reported
    and does not end the import."""
    with pytest.raises(ImportInvalid, match=r"does not give out the list .* pass it with --repositories FILE"):
        await run(repositories=None)
    result = await run(repositories=["team/none", "UPPER"])
    assert result["problems"] == 2
    assert [name for name, _ in run.told()] == ["team/none:", "UPPER:"]


async def test_a_list_that_leads_in_a_circle(run: ImportRun) -> None:
    """If the pages of the list lead in a circle, its repositories are imported once. Then the import ends with an error
    that says what to do."""
    body = b'{"repositories": ["UPPER"]}'

    def reply(head: str) -> bytes:
        link = "" if "/_catalog" not in head else 'Link: </v2/_catalog?last=x>; rel="next"\r\n'
        return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{link}\r\n".encode() + body

    old = ScriptedServer(reply)
    server = await asyncio.start_server(old.serve, "127.0.0.1", 0)
    try:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ImportInvalid, match="leads in a circle"):
            await run(url=f"http://127.0.0.1:{port}", repositories=None)
    finally:
        server.close()
        await old.stop()
    assert len(run.told()) == 2


async def test_login(
    store: StoredRegistry, old: Hub, run: ImportRun, content: UpstreamContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private repository is imported with a login, by tokens. A wrong login is reported."""
    image = content.add(APP, noise_image("image", 1000), "1")
    old.put(content)
    old.set(auth="bearer", username="ann", password="right", private=(str(APP),), redirects=True)
    login: dict[str, Any] = {"username": "ann", "password_env": "OLD_PASSWORD"}

    monkeypatch.setenv("OLD_PASSWORD", "wrong")
    result = await run(**login)
    assert (result["tags"], result["problems"]) == (0, 1)
    assert "refuses the login" in run.told()[0][1]

    monkeypatch.setenv("OLD_PASSWORD", "right")
    await run(**login)
    await assert_whole(store, APP, image)


async def test_the_login_of_an_upstream_in_the_settings(
    store: StoredRegistry,
    old: Hub,
    run: ImportRun,
    content: UpstreamContent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the URL is an endpoint of an upstream, its login is used."""
    image = content.add(APP, noise_image("image", 1000), "1")
    old.put(content)
    old.set(auth="basic", username="ann", password="right")
    monkeypatch.setenv("OLD_PASSWORD", "right")
    upstream = {"name": "old.test", "endpoints": [old.url], "username": "ann", "password_env": "OLD_PASSWORD"}
    monkeypatch.setattr(f"{__name__}.CONFIGURED", [Upstream.model_validate(upstream)])
    await run()
    await assert_whole(store, APP, image)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"url": "http://ann:pw@old:5000"}, "must not contain a user name or password"),
        ({"url": "http://old:5000/v2/"}, "must end after the host and port"),
        ({"username": "ann"}, "has no password"),
    ],
)
async def test_bad_arguments(run: ImportRun, arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ImportInvalid, match=reason):
        await run(**arguments)
