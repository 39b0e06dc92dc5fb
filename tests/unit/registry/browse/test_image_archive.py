"""The API that sends an image as a tar archive."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import tarfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry.admin import archive_response
from registry.admin.archive_response import ResponseCutOff, RunningDownloads
from registry.asgi import Message
from registry.browse import image_archive
from registry.browse.image_archive import ImageArchive
from registry.log_output import was_logged
from storage.content import Manifest
from storage.errors import StorageFailed, TooManyRequests
from storage.names import Digest, Tag
from tests.fakes.app_in_process import running_app
from tests.fakes.asgi_client import AsgiAnswer, scope_of
from tests.fakes.registry_content import BY, index_of
from tests.fakes.store_accounts import add_grant
from tests.unit.registry.browse.conftest import APP, Site

LAYERS = [b"first layer", b"x" * 700_000, b""]


async def download(
    site: Site, reference: str = "v1", query: str = "", account: str | None = "puller", **headers: str
) -> AsgiAnswer:
    login = {} if account is None else {"authorization": site.logins[account]}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    path = f"/api/v1/repositories/{APP}/manifests/{reference}/archive{query}"
    return await site.app.client("GET", path, login | named)


def files_of(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def blob_path(digest: Digest) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def check_archive(archive: bytes, image: Manifest, name: str | None) -> None:
    """Checks that the archive has exactly the image, as a docker archive and as an OCI layout."""
    files = files_of(archive)
    assert image.config is not None
    assert files[blob_path(image.digest)] == image.body
    [docker] = json.loads(files["manifest.json"])
    assert docker["RepoTags"] == ([name] if name else None)
    assert docker["Config"] == blob_path(image.config.digest)
    assert docker["Layers"] == [blob_path(layer.digest) for layer in image.layers]
    [entry] = json.loads(files["index.json"])["manifests"]
    assert (entry["digest"], entry["size"]) == (image.digest, len(image.body))
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    blobs = {blob_path(part.digest): part.size for part in image.blobs}
    assert {name: len(files[name]) for name in blobs} == blobs
    assert len(files) == 4 + len(blobs)


async def test_the_archive_of_an_image(site: Site) -> None:
    """The archive of a tag has the tag's name. The archive of a digest has no name."""
    image = await site.image("v1", layers=[*LAYERS, LAYERS[0]])
    answer = await download(site)
    assert (answer.status, answer["content-type"]) == (200, "application/x-tar")
    assert int(answer["content-length"]) == len(answer.body)
    assert answer["content-disposition"] == 'attachment; filename="app_v1.tar"'
    check_archive(answer.body, image, f"{APP}:v1")
    check_archive((await download(site, image.digest)).body, image, None)


async def test_a_download_can_be_continued(site: Site) -> None:
    """The archive has the same bytes each time, so a client can continue a download at any offset. The test tries each
    border between parts of the archive, and one byte before and after it."""
    await site.image("v1", layers=LAYERS)
    complete = await download(site)
    borders = {0, 1, 511, 512, 513, len(complete.body) - 1}
    position = 0
    with tarfile.open(fileobj=io.BytesIO(complete.body)) as tar:
        for member in tar:
            position = member.offset_data
            borders |= {position - 1, position, position + 1, position + member.size}
    for start in sorted(borders):
        answer = await download(site, range=f"bytes={start}-", if_range=complete["etag"])
        assert (answer.status, answer["etag"]) == (206, complete["etag"])
        assert answer["content-range"] == f"bytes {start}-{len(complete.body) - 1}/{len(complete.body)}"
        assert answer.body == complete.body[start:]
    part = await download(site, range=f"bytes={position - 700}-{position + 9}")
    assert part.body == complete.body[position - 700 : position + 10]
    assert (await download(site, range="bytes=-600")).body == complete.body[-600:]


async def test_a_download_starts_again_after_the_tag_moved(site: Site) -> None:
    """If the tag has moved since the download began, the archive is a different one. The client gets all of it. Ranges
    with bad syntax are ignored, and ranges outside of the archive get 416."""
    await site.image("v1", layers=[b"old"])
    old = await download(site)
    await site.image("v1", layers=[b"new"])
    new = await download(site, range="bytes=5-", if_range=old["etag"])
    assert (new.status, new["etag"] != old["etag"]) == (200, True)
    assert (await download(site, if_none_match=f'"x", {new["etag"]}')).status == 304
    for ignored_range in ("bytes=0-1,3-4", "bytes=", "bytes=-", "items=0-1", "bytes=1-x", "bytes=" + "9" * 30):
        assert (await download(site, range=ignored_range)).status == 200
    for outside_range in (f"bytes={len(new.body)}-", "bytes=5-4", "bytes=-0"):
        answer = await download(site, range=outside_range)
        assert (answer.status, answer["content-range"]) == (416, f"bytes */{len(new.body)}")


async def test_the_archive_of_a_platform(site: Site) -> None:
    """If the tag is an index, the request has to name the platform, unless the index has only one."""
    images = [await site.image(config={"os": "linux", "architecture": each}) for each in ("amd64", "arm64")]
    entries = [
        replace(image.descriptor, platform={"os": "linux", "architecture": each})
        for image, each in zip(images, ("amd64", "arm64"), strict=True)
    ]
    await site.registry.put_manifest(APP, index_of(entries), [Tag("v1")], by=BY)
    await site.registry.put_manifest(APP, index_of(entries[:1]), [Tag("one")], by=BY)
    answer = await download(site)
    assert (answer.status, "linux/amd64, linux/arm64" in answer.json["errors"][0]["message"]) == (400, True)
    check_archive((await download(site, query="?platform=linux/arm64")).body, images[1], f"{APP}:v1")
    check_archive((await download(site, query=f"?platform={images[0].digest}")).body, images[0], f"{APP}:v1")
    check_archive((await download(site, "one")).body, images[0], f"{APP}:one")
    assert (await download(site, query="?platform=linux/s390x")).status == 404


async def test_manifests_without_an_archive(site: Site) -> None:
    """An index without images gets 404. So does an image with a layer whose size differs from the size in the
    manifest."""
    image = await site.image()
    body_with_wrong_size = image.body.replace(b'"size": 5', b'"size": 6')
    assert body_with_wrong_size != image.body
    await site.registry.put_manifest(APP, Manifest.parse(body_with_wrong_size, image.media_type), [Tag("wrong")], by=BY)
    await site.registry.put_manifest(APP, index_of([]), [Tag("empty")], by=BY)
    for reference in ("wrong", "empty", "none"):
        assert (await download(site, reference)).status == 404


async def test_an_archive_needs_the_right_to_pull(site: Site) -> None:
    """For a client without the right to pull, the image does not exist."""
    await site.image("v1")
    assert (await download(site, account="other")).status == 404
    assert (await download(site, account=None)).status == 401


@pytest.fixture(params=["everyone", "accounts", "nobody"])
async def setting(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[str, Site]]:
    """Yields a value of `downloads.allow`, and a registry with this setting."""
    value: Any = request.param
    async with running_app(tmp_path / "other", downloads={"allow": value}) as app:
        running_site = Site(app)
        await running_site.image("v1")
        yield value, running_site


async def test_the_setting_for_downloads(setting: tuple[str, Site]) -> None:
    """A client needs the right to pull to download an archive. The setting `downloads.allow` limits downloads further:
    `everyone` means all clients with this right, `accounts` only those with a login, `nobody` none. While the registry
    has no accounts, every client counts as an account."""
    allow, site = setting
    assert (await download(site, account=None)).status == (405 if allow == "nobody" else 200)
    site.logins["someone"] = await site.app.user("someone")
    await add_grant(site.app.accounts, "everyone", "**", "pull")
    expected = {"everyone": (200, 200), "accounts": (401, 200), "nobody": (405, 405)}[allow]
    assert tuple([(await download(site, account=account)).status for account in (None, "someone")]) == expected


async def test_the_number_of_downloads_is_limited() -> None:
    """One visitor gets at most two of the three slots. A slot is free again after the download has ended, even with an
    error."""
    downloads = RunningDownloads(3)
    async with downloads.slot("alice"), downloads.slot("alice"):
        with pytest.raises(TooManyRequests):
            await take_slot(downloads, "alice")
        async with downloads.slot("bob"):
            with pytest.raises(TooManyRequests):
                await take_slot(downloads, "carol")
    with pytest.raises(ValueError, match="broken"):
        async with downloads.slot("alice"):
            raise ValueError("broken")
    for visitor in ("alice", "bob", "carol"):
        await take_slot(downloads, visitor)


async def take_slot(downloads: RunningDownloads, visitor: str) -> None:
    """Takes a slot for a download, and gives it back."""
    async with downloads.slot(visitor):
        pass


async def test_a_stalled_download_is_ended_when_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a download is refused because all slots are taken, the registry ends a download whose client has received
    too little for too long. A download continues if its client receives bytes, or if the registry itself has none to
    send."""
    monkeypatch.setattr(archive_response, "_SLOW_SECONDS", 0.0)
    downloads, started, finish = RunningDownloads(2), [asyncio.Event(), asyncio.Event()], asyncio.Event()
    ended: list[str] = []

    async def stalled() -> None:
        async with downloads.slot("slow") as download:
            with download.sending(1):
                started[0].set()
                await asyncio.Event().wait()
            ended.append("sent")  # this line is not reached
        ended.append("stalled")

    async def healthy() -> None:
        async with downloads.slot("healthy") as download:
            with download.sending(1 << 20):
                pass
            started[1].set()
            await finish.wait()
        ended.append("healthy")

    async with asyncio.TaskGroup() as tasks:
        slow = tasks.create_task(stalled())
        tasks.create_task(healthy())
        for event in started:
            await event.wait()
        for _ in range(2):
            with pytest.raises(TooManyRequests):
                await take_slot(downloads, "other")
        await slow
        await take_slot(downloads, "other")
        finish.set()
    assert ended == ["stalled", "healthy"]


async def test_a_download_that_the_registry_ends_is_logged_in_one_line(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A slow download that the registry ends is logged in one line of the level INFO. The error that ends its response
    is marked as logged, so that the server does not log it again."""
    monkeypatch.setattr(archive_response, "_SLOW_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    await site.image("v1")
    downloads, is_sending = downloads_of(site), asyncio.Event()

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            is_sending.set()
            await asyncio.Event().wait()

    path = f"/api/v1/repositories/{APP}/manifests/v1/archive"
    scope = scope_of("GET", path, {"authorization": site.logins["puller"]})
    request = asyncio.ensure_future(site.app.app(scope, receive, send))
    await is_sending.wait()
    async with downloads.slot("account puller"):
        with pytest.raises(TooManyRequests):
            await take_slot(downloads, "account puller")
    with pytest.raises(ResponseCutOff) as cut_off:
        await request
    assert was_logged(cut_off.value)
    (record,) = [each for each in caplog.records if each.levelno >= logging.INFO]
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    assert "too slowly" in record.getMessage()


async def test_a_download_that_breaks_off_is_logged_in_one_line(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A download whose blob cannot be read is logged in one line of the level WARNING, which gives the reason. The
    error that ends its response is marked as logged."""
    caplog.set_level(logging.INFO)
    await site.image("v1")

    async def read(archive: ImageArchive, start: int, stop: int) -> AsyncIterator[bytes]:
        yield b"x"
        raise StorageFailed("the disk is gone")

    monkeypatch.setattr(ImageArchive, "read", read)
    answer = await download(site)
    assert isinstance(answer.cut, ResponseCutOff)
    assert was_logged(answer.cut)
    (record,) = [each for each in caplog.records if each.levelno >= logging.INFO]
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)
    assert "the disk is gone" in record.getMessage()


def downloads_of(site: Site) -> RunningDownloads:
    """Returns the downloads of the running application."""
    assert site.app.app.service.access is not None
    return site.app.app.service.access.management.downloads


async def test_a_download_needs_a_slot_before_it_is_planned(site: Site) -> None:
    """A download that is refused for lack of a slot causes no work, even for an unknown tag. If planning fails, the
    slot becomes free again."""
    await site.image("v1")
    downloads = downloads_of(site)
    async with downloads.slot("account puller"), downloads.slot("account puller"):
        for reference in ("v1", "none"):
            assert (await download(site, reference)).status == 429
    for _ in range(5):
        assert (await download(site, "none")).status == 404
    assert (await download(site)).status == 200


async def test_an_image_with_too_many_layers_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image with too many layers is refused. A blob that the manifest lists several times is in the archive once."""
    monkeypatch.setattr(image_archive, "MAX_LAYERS", 3)
    image = await site.image("v1", layers=[b"same"] * 3)
    changed = image.body.replace(b"layer.v1.tar", b"layer.v1.tar+gzip", 1)
    await site.registry.put_manifest(APP, Manifest.parse(changed, image.media_type), [Tag("two-types")], by=BY)
    await site.image("large", layers=[b"same"] * 4)
    check_archive((await download(site)).body, image, f"{APP}:v1")
    with tarfile.open(fileobj=io.BytesIO((await download(site, "two-types")).body)) as tar:
        assert len(tar.getnames()) == len(set(tar.getnames())) == 4 + 2
    assert (await download(site, "large")).status == 404
