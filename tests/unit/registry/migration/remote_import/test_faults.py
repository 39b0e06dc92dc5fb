"""Faults of the old registry during an import over the network: errors, broken connections, long pauses, content that
cannot be imported, and lists of repositories without an end."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path

import pytest

from registry.migration.remote_import import KIND, import_remote
from registry.migration.request_retries import FAILURES_TO_END
from registry.router import Router
from storage.imports import ImportInvalid, OldRegistryDown
from storage.jobs import JSON, JobStopped
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.job_runner import JobContext
from tests.fakes.client_images import MIB
from tests.fakes.hub.hub import Hub, union
from tests.fakes.import_run import ImportRun, assert_complete
from tests.fakes.upstream_content import ImageTree, UpstreamContent, noise_image
from tests.fakes.upstream_source import scripted_server
from tests.unit.registry.migration.remote_import.conftest import APP, Pauses


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


async def test_other_blobs_of_a_broken_image_leave_no_files(
    store: StoredRegistry, old_registry: Hub, content: UpstreamContent, tmp_path: Path
) -> None:
    """While the config of an image is downloaded, its layer turns out to be missing. The download of the config ends
    and leaves no files, because only few bytes have arrived."""
    image = content.add(APP, noise_image("gone", 10), "1")
    layer, config = image.layers[0].digest, image.config.digest
    old_registry.put(content)
    old_registry.remove(APP, layer)
    old_registry.fault(on="blob", match=layer, hangup=True)
    old_registry.fault(on="blob", match=config, stall_after=10, times=None)

    async def pause(seconds: float) -> None:
        """Ends when the config was requested. The second request for the layer then shows that it is missing."""
        await old_registry.arrival(1, "blob", method="GET", digest=config)

    run_import = ImportRun(
        store,
        KIND,
        lambda store, router, context: import_remote(store, router, context, pause=pause),
        url=old_registry.url,
        repositories=[str(APP)],
    )
    async with asyncio.timeout(20):
        await run_import()
    assert run_import.reports() == [("team/app:1", f"{old_registry.address} does not have the blob {layer}")]
    assert list((tmp_path / "data/partials").iterdir()) == []


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


@pytest.mark.slow
async def test_the_import_ends_if_the_old_registry_does_not_answer(
    store: StoredRegistry, old_registry: Hub, run_import: ImportRun, content: UpstreamContent
) -> None:
    """After many failed requests in a row, and if GET /v2/ fails as well, the import ends with an error. When the old
    registry answers again, the next import adds the missing tags."""
    for number in range(2 * FAILURES_TO_END):
        content.add(APP, noise_image(f"image {number}", 10), f"{number:02}")
    old_registry.put(content)
    # The first six requests for manifests succeed.
    old_registry.fault(on="manifest", method="", skip=6, status=502, times=None)
    old_registry.fault(on="ping", status=502, times=None)
    with pytest.raises(OldRegistryDown, match="the old registry does not answer; run the import again later"):
        await run_import(jobs=1)
    imported = len((await store.tags(APP, None, 100)).items)
    assert 1 <= imported < 8

    old_registry.clear()
    result = await run_import()
    assert (result["present"], result["tags"]) == (imported, 2 * FAILURES_TO_END - imported)


@pytest.mark.slow
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
    pause_began = asyncio.Event()

    async def pause(seconds: float) -> None:
        pause_began.set()
        await asyncio.sleep(seconds)

    async def work(store: StoredRegistry, router: Router, context: JobContext) -> JSON:
        return await import_remote(store, router, context, pause=pause)

    def reply(head: str) -> bytes:
        return b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 600\r\nContent-Length: 0\r\n\r\n"

    async def stop() -> None:
        await pause_began.wait()
        [job] = await store.jobs.active()
        await store.jobs.request_stop(job.id)

    run_import.work = work
    async with scripted_server(reply) as script, asyncio.timeout(20):
        stopping = asyncio.create_task(stop())
        with pytest.raises(JobStopped):
            await run_import(url=script.url, repositories=None)
        await stopping
