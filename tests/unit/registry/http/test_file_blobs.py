"""Pulling blobs that are stored in files. The tests run with a server that can send files (zero copy), and with a
server that has to get the bytes."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from registry.http import DistributionAPI
from storage.composition import open_registry, prepare_data_dir
from storage.content import Descriptor, digest_of
from storage.names import RepositoryName
from storage.store.stored_registry import StoredRegistry
from tests.fakes.asgi_client import AsgiClient
from tests.fakes.blob_files import layout_behind
from tests.fakes.open_files import open_files_below
from tests.unit.registry.conftest import REPO, V2

SMALL = os.urandom(4096)
LARGE = os.urandom(3 * 1024 * 1024 + 5)


@pytest.fixture
async def stored(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path) as registry:
        yield registry


@pytest.fixture(params=[True, False], ids=["files", "bytes"])
def client(request: pytest.FixtureRequest, stored: StoredRegistry) -> AsgiClient:
    return AsgiClient(DistributionAPI(stored), zero_copy=request.param)


async def push(stored: StoredRegistry, data: bytes) -> Descriptor:
    writer = await stored.start_upload(RepositoryName(REPO))
    if data:
        await writer.write(data)
    return await writer.commit(digest_of(data))


def file_of(stored: StoredRegistry, blob: Descriptor) -> Path:
    return layout_behind(stored).blob(blob.digest)


@pytest.mark.parametrize("size", [0, 1, 4096, 65536, 65537, 1 << 20, len(LARGE)])
async def test_a_whole_blob(client: AsgiClient, stored: StoredRegistry, size: int) -> None:
    """The response has every byte, whatever the blob's size. A blob of up to 64 KiB is sent as bytes. A larger blob is
    sent as a file if the server can send files. `client.sent` counts all messages, and those that send a file."""
    blob = await push(stored, LARGE[:size])
    answer = await client("GET", f"{V2}/blobs/{blob.digest}")
    assert answer.body == LARGE[:size]
    if size <= 65536:
        assert client.sent == [1, 0]
    elif client.zero_copy:
        assert client.sent == [1, 1]


@pytest.mark.parametrize(("first", "last"), [(0, 0), (5, 99), (70_000, 2_000_000), (1_000_000, len(LARGE) - 1)])
async def test_a_range(client: AsgiClient, stored: StoredRegistry, first: int, last: int) -> None:
    """The response to a range has exactly the bytes of the range."""
    blob = await push(stored, LARGE)
    answer = await client("GET", f"{V2}/blobs/{blob.digest}", {"Range": f"bytes={first}-{last}"})
    assert (answer.status, answer.body) == (206, LARGE[first : last + 1])


async def test_ranges(client: AsgiClient, stored: StoredRegistry) -> None:
    """Several ranges, small and large, are sent as the parts of a multipart body."""
    blob = await push(stored, LARGE)
    answer = await client("GET", f"{V2}/blobs/{blob.digest}", {"Range": "bytes=1-2,100000-900000,7-7,1000000-1100000"})
    contents = [
        part.partition(b"\r\n\r\n")[2] for part in answer.body.split(b"\r\n--" + boundary(answer["content-type"]))
    ]
    assert contents[1:-1] == [LARGE[1:3], LARGE[100_000:900_001], LARGE[7:8], LARGE[1_000_000:1_100_001]]
    assert client.sent[1] == (2 if client.zero_copy else 0)


def boundary(content_type: str) -> bytes:
    return content_type.partition("boundary=")[2].encode()


async def test_pulls_leave_no_file_open(client: AsgiClient, stored: StoredRegistry) -> None:
    """No pull leaves a file descriptor open: neither for the whole blob, nor for ranges, nor a refused one."""
    small, large = await push(stored, SMALL), await push(stored, LARGE)
    for blob in (small, large):
        path = f"{V2}/blobs/{blob.digest}"
        for headers in ({}, {"Range": "bytes=0-0"}, {"Range": "bytes=0-1,5-100000"}, {"Range": "bytes=99999999-"}):
            await client("GET", path, headers)
        await client("GET", path, {"If-None-Match": f'"{blob.digest}"'})
        await client("HEAD", path)
    assert not open_files_below(layout_behind(stored).root / "blobs")


async def test_a_small_blob_whose_file_is_too_short(client: AsgiClient, stored: StoredRegistry) -> None:
    """A small blob is read before the status is sent. So if its file is too short, the client gets a 500 instead of a
    broken connection."""
    blob = await push(stored, SMALL)
    os.truncate(file_of(stored, blob), 100)
    answer = await client("GET", f"{V2}/blobs/{blob.digest}")
    assert (answer.status, answer.code) == (500, "STORAGE_FAILED")


async def test_a_large_blob_whose_file_is_too_short(stored: StoredRegistry) -> None:
    """If the file of a large blob is too short, the response breaks off where the file ends."""
    blob = await push(stored, LARGE)
    os.truncate(file_of(stored, blob), 2_000_000)
    answer = await AsgiClient(DistributionAPI(stored))("GET", f"{V2}/blobs/{blob.digest}")
    assert (answer.status, len(answer.body)) == (200, 2_000_000)
    assert answer.cut is not None


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_a_blob_whose_file_is_missing(client: AsgiClient, stored: StoredRegistry, data: bytes) -> None:
    """If the file of a blob is missing, a GET gets 404 with advice. A HEAD gets 404 too, so that a client that checks
    before a push uploads the blob again."""
    blob = await push(stored, data)
    file_of(stored, blob).unlink()
    answer = await client("GET", f"{V2}/blobs/{blob.digest}")
    assert (answer.status, answer.code) == (404, "BLOB_UNKNOWN")
    assert "push the image again" in answer.json["errors"][0]["message"]
    assert (await client("HEAD", f"{V2}/blobs/{blob.digest}")).status == 404


async def test_a_blob_deleted_while_it_is_read(stored: StoredRegistry) -> None:
    """A reader gets the whole blob even if its file is deleted meanwhile. When the reader is closed, no descriptor
    stays open, so the disk space is freed."""
    blob = await push(stored, LARGE)
    reader = await stored.open_blob(RepositoryName(REPO), blob.digest)
    assert open_files_below(layout_behind(stored).root / "blobs")
    file_of(stored, blob).unlink()
    chunks = [chunk async for chunk in reader]
    assert b"".join(chunks) == LARGE
    await reader.aclose()
    await reader.aclose()
    assert not open_files_below(layout_behind(stored).root / "blobs")
