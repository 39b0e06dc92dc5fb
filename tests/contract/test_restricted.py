"""Tests of `Restricted`, a registry that refuses writes or deletes if they are switched off, and passes all other calls
on to another registry."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from registry.restrict import Restricted
from storage.errors import Unsupported
from storage.interface import Registry
from storage.memory_registry import MemoryRegistry
from storage.names import RepositoryName, Tag, UploadID
from storage.patterns import ALL_NAMES
from tests.fakes.registry_content import (
    BY,
    all_tags,
    descriptor_of,
    image_of,
    names_of,
    push_blob,
    push_image,
    read_blob,
)

REPO = RepositoryName("team/app")
LATEST = Tag("latest")
BLOB = descriptor_of(b"{}")
BLOB_DIGEST = BLOB.digest

WRITES: dict[str, Callable[[Registry, UploadID], Awaitable[object]]] = {
    "start_upload": lambda registry, upload: registry.start_upload(REPO),
    "resume_upload": lambda registry, upload: registry.resume_upload(REPO, upload),
    "mount_blob": lambda registry, upload: registry.mount_blob(REPO, BLOB_DIGEST, ALL_NAMES, BY),
    "put_manifest": lambda registry, upload: registry.put_manifest(REPO, image_of(BLOB), [LATEST], by=BY),
}
DELETES: dict[str, Callable[[Registry], Awaitable[object]]] = {
    "delete_blob": lambda registry: registry.delete_blob(REPO, BLOB_DIGEST, by=BY, even_if_referenced=True),
    "delete_tag": lambda registry: registry.delete_tag(REPO, LATEST, by=BY),
    "delete_manifest": lambda registry: registry.delete_manifest(REPO, image_of(BLOB).digest, by=BY),
}
"""Deletes, in an order in which each finds the content that it deletes."""


async def make_filled_registry() -> tuple[MemoryRegistry, UploadID]:
    """Returns a registry with an image, and the id of an open session."""
    registry = MemoryRegistry()
    await push_blob(registry, REPO, b"{}")
    await registry.put_manifest(REPO, image_of(BLOB), [LATEST], by=BY)
    return registry, (await registry.start_upload(REPO)).id


async def assert_readable(registry: Registry) -> None:
    assert await read_blob(registry, REPO, BLOB_DIGEST) == b"{}"
    assert (await registry.resolve_blob(REPO, BLOB_DIGEST)).size == 2
    assert (await registry.get_manifest(REPO, LATEST)).digest == image_of(BLOB).digest
    assert (await registry.resolve_manifest(REPO, LATEST)).digest == image_of(BLOB).digest
    assert await all_tags(registry, REPO) == ["latest"]
    assert list((await registry.repositories(None, 10)).items) == [REPO]
    assert names_of(await registry.referrers(REPO, BLOB_DIGEST, None, None, 10)) == []


@pytest.mark.parametrize("call", WRITES)
async def test_read_only_refuses_writes(call: str) -> None:
    """With `read_only`, each write raises Unsupported and changes nothing; without it, writes are passed on."""
    inner, upload = await make_filled_registry()
    with pytest.raises(Unsupported):
        await WRITES[call](Restricted(inner, read_only=True), upload)
    await assert_readable(inner)
    await WRITES[call](Restricted(inner, delete=False), upload)


@pytest.mark.parametrize("switches", [{"read_only": True}, {"delete": False}, {"read_only": True, "delete": False}])
async def test_deletes_switched_off(switches: dict[str, bool]) -> None:
    """With `read_only`, or without `delete`, each delete raises Unsupported and changes nothing."""
    inner, _ = await make_filled_registry()
    for call in DELETES.values():
        with pytest.raises(Unsupported):
            await call(Restricted(inner, **switches))
    await assert_readable(inner)


async def test_deletes_switched_on() -> None:
    """By default deletes are passed on."""
    inner, _ = await make_filled_registry()
    for call in DELETES.values():
        await call(Restricted(inner))
    assert await all_tags(inner, REPO) == []


async def test_reading_is_never_switched_off() -> None:
    """Everything can be read and listed with all switches off."""
    inner, _ = await make_filled_registry()
    await assert_readable(Restricted(inner, read_only=True, delete=False))


async def test_an_upload_can_be_cancelled_without_delete() -> None:
    """With `delete=False`, a client can still cancel an upload, because this deletes no content."""
    inner, upload = await make_filled_registry()
    registry = Restricted(inner, delete=False)
    await (await registry.resume_upload(REPO, upload)).cancel()
    await push_image(registry, REPO, "one more", "v2")
    assert await all_tags(inner, REPO) == ["latest", "v2"]
