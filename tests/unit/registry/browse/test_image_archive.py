"""Images as tar archives, over the API."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry.admin import archive_response
from registry.admin.archive_response import HeldResponse, RunningDownloads
from registry.browse import image_archive
from registry.memory_budget import MemoryBudget
from storage.content import Manifest
from storage.errors import TooManyRequests
from storage.names import Digest, Tag
from tests.fakes.app_in_process import running_app
from tests.fakes.asgi_client import AsgiAnswer
from tests.fakes.registry_content import BY, index_of
from tests.fakes.store_accounts import add_grant
from tests.unit.registry.browse.conftest import APP, Site

LAYERS = [b"first layer", b"x" * 700_000, b""]


async def download(
    site: Site, reference: str = "v1", query: str = "", who: str | None = "puller", **headers: str
) -> AsgiAnswer:
    login = {} if who is None else {"authorization": site.logins[who]}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    path = f"/api/v1/repositories/{APP}/manifests/{reference}/archive{query}"
    return await site.app.client("GET", path, login | named)


def files_of(archive: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def blob(digest: Digest) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def check(archive: bytes, image: Manifest, name: str | None) -> None:
    """Checks that the archive has exactly the image, as a docker archive and as an OCI layout."""
    files = files_of(archive)
    assert image.config is not None
    assert files[blob(image.digest)] == image.body
    [docker] = json.loads(files["manifest.json"])
    assert docker["RepoTags"] == ([name] if name else None)
    assert docker["Config"] == blob(image.config.digest)
    assert docker["Layers"] == [blob(layer.digest) for layer in image.layers]
    [entry] = json.loads(files["index.json"])["manifests"]
    assert (entry["digest"], entry["size"]) == (image.digest, len(image.body))
    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    blobs = {blob(part.digest): part.size for part in image.blobs}
    assert {name: len(files[name]) for name in blobs} == blobs
    assert len(files) == 4 + len(blobs)


async def test_an_image(site: Site) -> None:
    image = await site.image("v1", layers=[*LAYERS, LAYERS[0]])
    answer = await download(site)
    assert (answer.status, answer["content-type"]) == (200, "application/x-tar")
    assert int(answer["content-length"]) == len(answer.body)
    assert answer["content-disposition"] == 'attachment; filename="app_v1.tar"'
    check(answer.body, image, f"{APP}:v1")
    check((await download(site, image.digest)).body, image, None)


async def test_the_rest_of_a_download(site: Site) -> None:
    """The archive has the same bytes each time, so a download can be continued at any offset: at each border of a part,
    and a byte before and after it."""
    await site.image("v1", layers=LAYERS)
    whole = await download(site)
    borders = {0, 1, 511, 512, 513, len(whole.body) - 1}
    position = 0
    with tarfile.open(fileobj=io.BytesIO(whole.body)) as tar:
        for member in tar:
            position = member.offset_data
            borders |= {position - 1, position, position + 1, position + member.size}
    for start in sorted(borders):
        answer = await download(site, range=f"bytes={start}-", if_range=whole["etag"])
        assert (answer.status, answer["etag"]) == (206, whole["etag"])
        assert answer["content-range"] == f"bytes {start}-{len(whole.body) - 1}/{len(whole.body)}"
        assert answer.body == whole.body[start:]
    part = await download(site, range=f"bytes={position - 700}-{position + 9}")
    assert part.body == whole.body[position - 700 : position + 10]
    assert (await download(site, range="bytes=-600")).body == whole.body[-600:]


async def test_ranges_of_another_archive(site: Site) -> None:
    """After the tag has moved, the archive is another one, so the client gets all of it."""
    await site.image("v1", layers=[b"old"])
    old = await download(site)
    await site.image("v1", layers=[b"new"])
    new = await download(site, range="bytes=5-", if_range=old["etag"])
    assert (new.status, new["etag"] != old["etag"]) == (200, True)
    assert (await download(site, if_none_match=f'"x", {new["etag"]}')).status == 304
    for odd in ("bytes=0-1,3-4", "bytes=", "bytes=-", "items=0-1", "bytes=1-x", "bytes=" + "9" * 30):
        assert (await download(site, range=odd)).status == 200
    for beyond in (f"bytes={len(new.body)}-", "bytes=5-4", "bytes=-0"):
        answer = await download(site, range=beyond)
        assert (answer.status, answer["content-range"]) == (416, f"bytes */{len(new.body)}")


async def test_an_index(site: Site) -> None:
    """Of an index, the request has to name the platform, unless the index has only one."""
    images = [await site.image(config={"os": "linux", "architecture": each}) for each in ("amd64", "arm64")]
    entries = [
        replace(image.descriptor, platform={"os": "linux", "architecture": each})
        for image, each in zip(images, ("amd64", "arm64"), strict=True)
    ]
    await site.registry.put_manifest(APP, index_of(entries), [Tag("v1")], by=BY)
    await site.registry.put_manifest(APP, index_of(entries[:1]), [Tag("one")], by=BY)
    answer = await download(site)
    assert (answer.status, "linux/amd64, linux/arm64" in answer.json["errors"][0]["message"]) == (400, True)
    check((await download(site, query="?platform=linux/arm64")).body, images[1], f"{APP}:v1")
    check((await download(site, query=f"?platform={images[0].digest}")).body, images[0], f"{APP}:v1")
    check((await download(site, "one")).body, images[0], f"{APP}:one")
    assert (await download(site, query="?platform=linux/s390x")).status == 404


async def test_what_cannot_be_sent(site: Site) -> None:
    """An artifact is refused, and so is an image with a layer that has another size than its manifest states."""
    image = await site.image()
    wrong = image.body.replace(b'"size": 5', b'"size": 6')
    assert wrong != image.body
    await site.registry.put_manifest(APP, Manifest.parse(wrong, image.media_type), [Tag("wrong")], by=BY)
    await site.registry.put_manifest(APP, index_of([]), [Tag("empty")], by=BY)
    for reference in ("wrong", "empty", "none"):
        assert (await download(site, reference)).status == 404


async def test_rights(site: Site) -> None:
    """For a client without the right to pull, the image does not exist."""
    await site.image("v1")
    assert (await download(site, who="other")).status == 404
    assert (await download(site, who=None)).status == 401


@pytest.fixture(params=["everyone", "accounts", "nobody"])
async def setting(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[str, Site]]:
    """The value of `downloads.allow`, for a registry from which everyone may pull."""
    value: Any = request.param
    async with running_app(tmp_path / "other", downloads={"allow": value}) as app:
        made = Site(app)
        await made.image("v1")
        yield value, made


async def test_who_may_download(setting: tuple[str, Site]) -> None:
    """Of the clients that may pull, the setting says which may download. While there are no accounts, every client
    counts as an account."""
    value, site = setting
    assert (await download(site, who=None)).status == (405 if value == "nobody" else 200)
    site.logins["someone"] = await site.app.user("someone")
    await add_grant(site.app.accounts, "everyone", "**", "pull")
    expected = {"everyone": (200, 200), "accounts": (401, 200), "nobody": (405, 405)}[value]
    assert tuple([(await download(site, who=who)).status for who in (None, "someone")]) == expected


async def test_a_limited_number_at_once() -> None:
    """One visitor gets half of the slots. A slot is free again after the download has ended, also by an error."""
    downloads = RunningDownloads(3)
    async with downloads.slot("alice"), downloads.slot("alice"):
        with pytest.raises(TooManyRequests):
            await enter(downloads, "alice")
        async with downloads.slot("bob"):
            with pytest.raises(TooManyRequests):
                await enter(downloads, "carol")
    with pytest.raises(ValueError, match="broken"):
        async with downloads.slot("alice"):
            raise ValueError("broken")
    for visitor in ("alice", "bob", "carol"):
        await enter(downloads, visitor)


async def enter(downloads: RunningDownloads, visitor: str) -> None:
    async with downloads.slot(visitor):
        pass


async def test_a_client_that_takes_nothing_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """When another download is refused, the download of a client that has received too little for too long ends. A
    download goes on if its client receives the bytes, or if the registry itself waits for them."""
    monkeypatch.setattr(archive_response, "_SLOW_SECONDS", 0.0)
    downloads, started, gate = RunningDownloads(2), [asyncio.Event(), asyncio.Event()], asyncio.Event()
    ended: list[str] = []

    async def stalled() -> None:
        async with downloads.slot("slow") as download:
            with download.sending(1):
                started[0].set()
                await asyncio.Event().wait()
            ended.append("sent")  # is not reached
        ended.append("stalled")

    async def healthy() -> None:
        async with downloads.slot("healthy") as download:
            with download.sending(1 << 20):
                pass
            started[1].set()
            await gate.wait()
        ended.append("healthy")

    async with asyncio.TaskGroup() as tasks:
        slow = tasks.create_task(stalled())
        tasks.create_task(healthy())
        for event in started:
            await event.wait()
        for _ in range(2):
            with pytest.raises(TooManyRequests):
                await enter(downloads, "other")
        await slow
        await enter(downloads, "other")
        gate.set()
    assert ended == ["stalled", "healthy"]


async def test_a_download_needs_a_slot_before_it_is_planned(site: Site) -> None:
    """A download that is refused causes no work, and its client gets an error response. If planning fails, the slot
    becomes free again."""
    await site.image("v1")
    downloads = site.app.app.service.access.management.downloads  # type: ignore[union-attr]
    async with downloads.slot("account puller"), downloads.slot("account puller"):
        for reference in ("v1", "none"):
            assert (await download(site, reference)).status == 429
    for _ in range(5):
        assert (await download(site, "none")).status == 404
    assert (await download(site)).status == 200


async def test_large_images_cannot_be_sent(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image with too many layers is refused. A blob that the manifest lists several times is in the archive once."""
    monkeypatch.setattr(image_archive, "MAX_LAYERS", 3)
    image = await site.image("v1", layers=[b"same"] * 3)
    changed = image.body.replace(b"layer.v1.tar", b"layer.v1.tar+gzip", 1)
    await site.registry.put_manifest(APP, Manifest.parse(changed, image.media_type), [Tag("two-types")], by=BY)
    await site.image("large", layers=[b"same"] * 4)
    check((await download(site)).body, image, f"{APP}:v1")
    with tarfile.open(fileobj=io.BytesIO((await download(site, "two-types")).body)) as tar:
        assert len(tar.getnames()) == len(set(tar.getnames())) == 4 + 2
    assert (await download(site, "large")).status == 404


async def test_memory_of_documents_that_are_sent() -> None:
    """A manifest or config for which the memory budget has no room is refused. After a response was sent, its memory is
    released."""
    memory, sent = MemoryBudget(1 << 20, "documents"), asyncio.Queue[Any]()
    body, gate = b"x" * (600 << 10), asyncio.Event()

    async def slow_send(message: Any) -> None:
        await sent.put(message)
        await gate.wait()

    async def receive() -> Any:
        raise AssertionError

    scope = {"type": "http"}
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(HeldResponse(body, memory)(scope, receive, slow_send))
        await sent.get()
        with pytest.raises(TooManyRequests):
            await HeldResponse(body, memory)(scope, receive, slow_send)
        gate.set()
    assert memory.used == 0
    await HeldResponse(body, memory)(scope, receive, slow_send)
