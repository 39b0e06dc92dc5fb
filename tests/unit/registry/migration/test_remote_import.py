"""The import of content over the network from another registry, which the tests call the old registry. It may have
faults. A second import fetches only what has changed."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from registry.config import Upstream
from registry.migration.remote_import import KIND, import_remote
from registry.migration.remote_registry import FAILURES_TO_END
from registry.router import Router
from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor
from storage.errors import BlobUnknown
from storage.imports import ImportInvalid, SourceDown
from storage.jobs import JSON, JobStopped
from storage.names import Digest, RepositoryName, Tag
from storage.patterns import NamePattern
from storage.store.stored_registry import StoredRegistry
from storage.tag_rules import ImmutableTags, TagPattern, TagRule
from storage.upkeep.job_runner import JobContext
from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import Hub, hub, union
from tests.fakes.import_run import ImportRun, assert_complete
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
from tests.fakes.upstream_source import scripted_server

APP = RepositoryName("team/app")
CONFIGURED: list[Upstream] = []
"""The upstreams in the settings of this registry."""


@pytest.fixture
def content() -> UpstreamContent:
    return UpstreamContent()


@pytest.fixture
def old_registry(tmp_path: Path) -> Iterator[Hub]:
    """An old registry without content, which does not list its repositories."""
    with hub(tmp_path, UpstreamContent()) as running:
        yield running


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data") as opened:
        yield opened


class Pauses(list[float]):
    """Records the lengths of the pauses before retries, in seconds, and ends each pause at once."""

    async def __call__(self, seconds: float) -> None:
        self.append(seconds)
        await asyncio.sleep(0)


@pytest.fixture
def pauses() -> Pauses:
    return Pauses()


@pytest.fixture
def run_import(store: StoredRegistry, old_registry: Hub, pauses: Pauses) -> ImportRun:
    return import_into(store, old_registry, pauses)


def import_into(store: StoredRegistry, old_registry: Hub, pauses: Pauses) -> ImportRun:
    async def work(store: StoredRegistry, router: Router, context: JobContext) -> JSON:
        return await import_remote(store, router, context, CONFIGURED, pauses)

    return ImportRun(store, KIND, work, url=old_registry.url, repositories=[str(APP)])


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


async def test_an_immutable_tag_is_reported_as_a_problem(
    tmp_path: Path, old_registry: Hub, content: UpstreamContent, pauses: Pauses
) -> None:
    """If an immutable tag points at another manifest, the tag is reported and its content is not fetched. The import
    continues with the other tags."""
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
        old_registry.forget()
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


async def test_referrers_are_imported_by_fallback_tags(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """If the old registry has no referrers API, referrers are imported with the fallback tags that list them."""
    image = content.add(APP, noise_image("image", 10), "1")
    signature = noise_image("signature", 10, subject=image)
    content.add(APP, fallback_index(signature), fallback_tag(image.digest))
    old_registry.put(content)
    old_registry.set(referrers=False)

    await run_import()

    referrers = (await store.referrers(APP, Digest(image.digest), None, None, 10)).items
    assert [each.digest for each in referrers] == [signature.digest]
    assert old_registry.count("referrers") == 1  # this request showed that there is no referrers API


async def test_a_second_import_fetches_only_changes(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """A second import fetches only new manifests and blobs. Unchanged tags cost one HEAD request each."""
    first = content.add(APP, noise_image("first", 1000), "1", "latest")
    old_registry.put(content)
    await run_import()
    second = content.add(APP, noise_image("second", 1000), "2", "latest")
    signature = content.add(APP, noise_image("signature", 10, subject=first))
    old_registry.put(content)
    old_registry.forget()

    result = await run_import()

    assert (result["tags"], result["present"], result["manifests"], result["fetched"]) == (2, 1, 2, 4)
    assert old_registry.count("manifest", "GET") == 2
    assert old_registry.count("manifest", "HEAD") == 3
    assert all(not old_registry.sent_ranges(digest) for digest in first.blobs)
    for image in (second, signature):
        await assert_complete(store, APP, image)


async def test_a_tag_that_was_deleted_after_the_import_stays_deleted(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """If a user has deleted an imported tag, the next import does not set it again, unless it has the argument
    `overwrite`."""
    image = content.add(APP, noise_image("image", 10), "1")
    old_registry.put(content)
    await run_import()
    await store.delete_tag(APP, Tag("1"), by=Actor("ann"))

    result = await run_import()
    assert run_import.reports("note") == [("team/app:1", "the tag stays as it is: ann has deleted it here")]
    assert result["tags"] == 0
    await run_import(overwrite=True)
    assert (await store.resolve_manifest(APP, Tag("1"))).digest == image.digest


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


@pytest.mark.parametrize("names", [["bob/secret", "evil/app"], ["evil/app"]], ids=["together", "afterwards"])
async def test_known_digest_gives_no_blob_of_another_repository(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, names: list[str]
) -> None:
    """Two images in `evil/app` name layers that the old registry has only in `bob/secret`. One image names its layer as
    a foreign layer, which clients download from another server. This registry has stored both layers for `bob/secret`,
    but the import adds neither to `evil/app`. So it imports the image with the foreign layer without this layer, and
    cannot import the other image."""
    secret = content.add("bob/secret", noise_image("secret", 1000, 2000), "1")
    foreign_type = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    configs = [UpstreamBlob(body, "application/vnd.oci.image.config.v1+json") for body in (b"{}", b"{ }")]
    foreign_layer = UpstreamBlob(secret.layers[1].body, foreign_type)
    plain = content.add("evil/app", manifest_of(configs[0], secret.layers[0]), "plain")
    content.add("evil/app", manifest_of(configs[1], foreign_layer), "foreign")
    old_registry.put(content)
    for layer in secret.layers:
        old_registry.remove("evil/app", layer.digest)
    await run_import(repositories=["bob/secret"])
    old_registry.forget()

    await run_import(repositories=names)

    reason = f"{old_registry.address} does not have the blob {plain.layers[0].digest}"
    assert run_import.reports() == [("evil/app:plain", reason)]
    assert (await store.tags(RepositoryName("evil/app"), None, 10)).items == ["foreign"]
    for layer in secret.layers:
        with pytest.raises(BlobUnknown):
            await store.resolve_blob(RepositoryName("evil/app"), Digest(layer.digest))
    await assert_complete(store, "bob/secret", secret)
    assert old_registry.count("blob", digest=secret.config.digest) == 0  # an unchanged image costs no blob request


LOGIN_PAGE = b"<html>login</html>"


def login_page_replies(manifest: bytes, media_type: str, config: UpstreamBlob) -> Callable[[str], bytes]:
    """Returns the replies of an old registry that has the image `evil/app:1` with this manifest and config. It answers
    requests for all other blobs with a login page."""

    def reply(head: str) -> bytes:
        kind, body = "application/json", b'{"name": "evil/app", "tags": ["1"]}'
        if "/manifests/" in head:
            kind, body = media_type, manifest
        elif config.digest in head:
            body = config.read()
        elif "/blobs/" in head:
            kind, body = "text/html", LOGIN_PAGE
        headers = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        return f"HTTP/1.1 200 OK\r\n{headers}".encode() + (b"" if head.startswith("HEAD") else body)

    return reply


async def test_head_response_with_another_size_gives_no_blob(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """This registry has stored a blob for `bob/secret`. A manifest in `evil/app` names the digest of this blob, but the
    size of a login page. The old registry answers each request for the blob with this login page. The import would add
    the stored blob to `evil/app` only if the old registry stated the size of this blob. It states the size of the login
    page, so the import does not add the blob."""
    secret = content.add("bob/secret", noise_image("secret", 1000), "1")
    layer = secret.layers[0]
    config = UpstreamBlob(b"{}", "application/vnd.oci.image.config.v1+json")
    page = UpstreamBlob(LOGIN_PAGE, layer.media_type)
    tree = manifest_of(config, page)
    body = tree.body.replace(page.digest.encode(), layer.digest.encode())
    content.add("evil/app", ImageTree(body, tree.media_type, {config.digest: config}), "1")
    old_registry.put(content)
    await run_import(repositories=["bob/secret"])

    async with scripted_server(login_page_replies(body, tree.media_type, config)) as script:
        await run_import(url=script.url, repositories=["evil/app"])
    [(name, _)] = run_import.reports()
    assert name == "evil/app:1"
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(RepositoryName("evil/app"), Digest(layer.digest))


async def test_complete_download_of_another_repository_gives_no_blob(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """An import was killed after all bytes of a blob had arrived, and before it stored the blob. The next import does
    not store the blob in a repository in which the old registry does not have it."""
    image = content.add("evil/app", noise_image("image", 1000), "1")
    layer = image.layers[0]
    old_registry.put(content)
    old_registry.remove("evil/app", layer.digest)
    name = "-".join(["import", *re.findall("[a-z0-9]+", old_registry.address)])
    with closing(await store.partials.claim(Digest(layer.digest), layer.size, name)) as partial:
        await asyncio.to_thread(partial.write_at, 0, layer.read())

    await run_import(repositories=["evil/app"])

    reason = f"{old_registry.address} does not have the blob {layer.digest}"
    assert run_import.reports() == [("evil/app:1", reason)]


async def test_complete_download_is_not_confirmed_by_another_size(store: StoredRegistry, run_import: ImportRun) -> None:
    """An earlier import downloaded all bytes of a blob, but did not store the blob. Before the next import stores it in
    a repository, it asks the old registry for the size of the blob in this repository. The old registry answers with a
    login page, which has another size. So the import does not store the blob."""
    image = noise_image("image", 1000)
    layer = image.layers[0]
    async with scripted_server(login_page_replies(image.body, image.media_type, image.config)) as script:
        name = "-".join(["import", *re.findall("[a-z0-9]+", urlsplit(script.url).netloc)])
        with closing(await store.partials.claim(Digest(layer.digest), layer.size, name)) as partial:
            await asyncio.to_thread(partial.write_at, 0, layer.read())
        await run_import(url=script.url, repositories=["evil/app"])
    with pytest.raises(BlobUnknown):
        await store.resolve_blob(RepositoryName("evil/app"), Digest(layer.digest))
    [(image_name, reason)] = run_import.reports()
    assert image_name == "evil/app:1"
    assert f"{layer.digest} does not have the size" in reason


async def test_faults_are_retried(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, pauses: Pauses
) -> None:
    """After temporary errors and broken connections, requests are repeated after a pause. An interrupted download
    continues where it stopped."""
    image = content.add(APP, noise_image("image", 9 * MIB), "1")
    layer = image.layers[0].digest
    old_registry.put(content)
    old_registry.fault(on="tags", status=503)
    old_registry.fault(on="manifest", method="HEAD", status=500)
    old_registry.fault(on="manifest", method="GET", hangup=True, times=3)
    old_registry.fault(on="blob", match=layer, drop_after=500_000, times=3)

    result = await run_import()

    assert (result["tags"], run_import.reports()) == (1, [])
    assert pauses
    assert union(old_registry.sent_ranges(layer)) == [(0, 9 * MIB)]
    await assert_complete(store, APP, image)


async def test_permanent_errors_are_reported(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, tmp_path: Path
) -> None:
    """If an image cannot be imported because of a permanent error, it is reported, and all other images are imported.
    The failed download leaves no files. After the error is repaired, the next import adds the missing images."""
    sound_image = content.add(APP, noise_image("sound", 10), "sound")
    broken_manifest = content.add(APP, noise_image("broken", 10), "broken")
    incomplete_image = content.add(APP, noise_image("gone", 10), "gone")
    corrupt_image = content.add(APP, noise_image("wrong", 1000), "wrong")
    failing_tag = content.add(APP, noise_image("failing", 10), "failing")
    old_registry.put(content)
    old_registry.remove(APP, incomplete_image.layers[0].digest)
    old_registry.fault(on="manifest", match=broken_manifest.digest, status=500, times=None)
    old_registry.fault(on="manifest", match="/failing", method="", status=500, times=None)
    old_registry.fault(on="blob", match=corrupt_image.layers[0].digest, corrupt=5, times=None)

    await run_import(jobs=1)

    problems = dict(run_import.reports())
    assert set(problems) == {"team/app:broken", "team/app:gone", "team/app:wrong", "team/app:failing"}
    missing_layer, corrupt_layer = incomplete_image.layers[0].digest, corrupt_image.layers[0].digest
    assert problems["team/app:gone"] == f"{old_registry.address} does not have the blob {missing_layer}"
    assert problems["team/app:wrong"] == f"{old_registry.address} sends other bytes for the blob {corrupt_layer}"
    assert problems["team/app:broken"] == f"the upstream registry {old_registry.url} answers 500"
    assert (await store.tags(APP, None, 10)).items == ["sound"]
    assert list((tmp_path / "data/partials").glob(f"*{missing_layer.partition(':')[2]}*")) == []

    old_registry.clear()
    old_registry.put(content)
    result = await run_import()
    assert (result["tags"], result["present"], run_import.reports()) == (4, 1, [])
    for image in (sound_image, broken_manifest, incomplete_image, corrupt_image, failing_tag):
        await assert_complete(store, APP, image)


@pytest.mark.slow
async def test_manifests_that_are_not_accepted(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent, pauses: Pauses
) -> None:
    """A schema 1 manifest is reported without a retry, because a retry cannot help."""
    body = b'{"schemaVersion": 1, "name": "team/app", "tag": "old", "fsLayers": [], "history": []}'
    content.add(APP, ImageTree(body, "application/vnd.docker.distribution.manifest.v1+json"), "old")
    old_registry.put(content)
    result = await run_import()
    [(name, reason)] = run_import.reports()
    assert (name, result["tags"], pauses) == ("team/app:old", 0, [])
    assert "schema 1 manifests are not accepted here" in reason


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


@pytest.mark.slow
async def test_the_import_ends_if_the_old_registry_does_not_answer(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """After many failed requests in a row, the import ends with an error. When the old registry answers again, the next
    import adds the rest."""
    for number in range(2 * FAILURES_TO_END):
        content.add(APP, noise_image(f"image {number}", 10), f"{number:02}")
    old_registry.put(content)
    old_registry.fault(on="manifest", method="", skip=6, status=502, times=None)
    with pytest.raises(SourceDown, match="the old registry does not answer; run the import again later"):
        await run_import(jobs=1)
    imported = len((await store.tags(APP, None, 100)).items)
    assert 1 <= imported < 8

    old_registry.clear()
    result = await run_import()
    assert (result["present"], result["tags"]) == (imported, 2 * FAILURES_TO_END - imported)


async def test_repositories_that_are_not_listed(run_import: ImportRun, old_registry: Hub) -> None:
    """If the old registry does not list its repositories, the import fails with an error that states what to do. If the
    operator names an unknown repository, it is reported and the import continues."""
    with pytest.raises(ImportInvalid, match=r"does not give out the list .* pass it with --repositories FILE"):
        await run_import(repositories=None)
    result = await run_import(repositories=["team/none", "UPPER"])
    assert result["problems"] == 2
    assert [name for name, _ in run_import.reports()] == ["team/none:", "UPPER:"]


async def test_a_list_that_leads_in_a_circle(run_import: ImportRun) -> None:
    """The old registry lists its repositories in pages. If the link to the next page leads back to an earlier page, the
    repositories are imported once, and the import ends with an error."""
    body = b'{"repositories": ["UPPER"]}'

    def reply(head: str) -> bytes:
        link = "" if "/_catalog" not in head else 'Link: </v2/_catalog?last=x>; rel="next"\r\n'
        return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{link}\r\n".encode() + body

    async with scripted_server(reply) as script:
        with pytest.raises(ImportInvalid, match="leads in a circle"):
            await run_import(url=script.url, repositories=None)
    assert len(run_import.reports()) == 2


async def test_a_list_without_an_end(run_import: ImportRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old registry lists its repositories in pages, and each page links to another one. After MAX_CATALOG_PAGES
    pages, the import ends with an error that states what to do."""
    monkeypatch.setattr("registry.migration.remote_registry.MAX_CATALOG_PAGES", 5)
    pages = count()

    def reply(head: str) -> bytes:
        link = "" if "/_catalog" not in head else f'Link: </v2/_catalog?last={next(pages)}>; rel="next"\r\n'
        return f"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n{link}\r\n".encode() + b'{"repositories": []}'

    async with scripted_server(reply) as script, asyncio.timeout(20):
        with pytest.raises(ImportInvalid, match=r"more than 5 pages; .* pass it with --repositories FILE"):
            await run_import(url=script.url, repositories=None)
    assert next(pages) == 5


async def test_import_can_be_stopped_while_it_waits(
    store: StoredRegistry, run_import: ImportRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old registry asks for a pause of ten minutes. An import that waits for the end of the pause can be
    stopped."""
    monkeypatch.setattr("storage.upkeep.job_runner.STOP_CHECK_SECONDS", 0.01)
    monkeypatch.setattr("storage.upkeep.job_runner.STOP_GRACE_SECONDS", 0.01)
    asked = asyncio.Event()

    async def pause(seconds: float) -> None:
        asked.set()
        await asyncio.sleep(seconds)

    async def work(store: StoredRegistry, router: Router, context: JobContext) -> JSON:
        return await import_remote(store, router, context, CONFIGURED, pause)

    def reply(head: str) -> bytes:
        return b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 600\r\nContent-Length: 0\r\n\r\n"

    async def stop() -> None:
        await asked.wait()
        [job] = await store.jobs.active()
        await store.jobs.request_stop(job.id)

    run_import.work = work
    async with scripted_server(reply) as script, asyncio.timeout(20):
        stopping = asyncio.create_task(stop())
        with pytest.raises(JobStopped):
            await run_import(url=script.url, repositories=None)
        await stopping


async def test_login(
    store: StoredRegistry,
    old_registry: Hub,
    run_import: ImportRun,
    content: UpstreamContent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A private repository is imported with a login, for which the old registry issues a token. A wrong login is
    reported."""
    image = content.add(APP, noise_image("image", 1000), "1")
    old_registry.put(content)
    old_registry.set(auth="bearer", username="ann", password="right", private=(str(APP),), redirects=True)
    login: dict[str, Any] = {"username": "ann", "password_env": "OLD_PASSWORD"}

    monkeypatch.setenv("OLD_PASSWORD", "wrong")
    result = await run_import(**login)
    assert (result["tags"], result["problems"]) == (0, 1)
    assert "refuses the login" in run_import.reports()[0][1]

    monkeypatch.setenv("OLD_PASSWORD", "right")
    await run_import(**login)
    await assert_complete(store, APP, image)


async def test_the_login_of_an_upstream_in_the_settings(
    store: StoredRegistry,
    old_registry: Hub,
    run_import: ImportRun,
    content: UpstreamContent,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the URL of the old registry is an endpoint of an upstream in the settings, the login of this upstream is
    used."""
    image = content.add(APP, noise_image("image", 1000), "1")
    old_registry.put(content)
    old_registry.set(auth="basic", username="ann", password="right")
    monkeypatch.setenv("OLD_PASSWORD", "right")
    upstream = {"name": "old.test", "endpoints": [old_registry.url], "username": "ann", "password_env": "OLD_PASSWORD"}
    monkeypatch.setattr(f"{__name__}.CONFIGURED", [Upstream.model_validate(upstream)])
    await run_import()
    await assert_complete(store, APP, image)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"url": "http://ann:pw@old:5000"}, "must not contain a user name or password"),
        ({"url": "http://old:5000/v2/"}, "must end after the host and port"),
        ({"username": "ann"}, "has no password"),
    ],
)
async def test_invalid_arguments_are_refused(run_import: ImportRun, arguments: dict[str, Any], reason: str) -> None:
    """A URL with a login or a path is refused, and so is a user name without a password."""
    with pytest.raises(ImportInvalid, match=reason):
        await run_import(**arguments)
