"""The collector against requests that need the content it is about to delete."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from storage.content import digest_of
from storage.errors import BlobUnknown, ManifestBlobUnknown, Unsupported
from storage.names import RepositoryName
from storage.patterns import ALL_NAMES
from storage.store.stored_registry import StoredRegistry
from tests.system.race.content_kinds import ContentKind, is_stored
from tests.system.race.gated_system import BY, GatedSystem, PeerRegistry, act, manifest_of, pull, push

APP, WEB = RepositoryName("team/app"), RepositoryName("team/web")
BODY = random.Random(1).randbytes(300_000)
DIGEST = digest_of(BODY)


async def _dropped(registry: StoredRegistry) -> None:
    """Makes a blob whose file waits for the collector."""
    await push(registry, APP, BODY)
    await registry.delete_blob(APP, DIGEST, by=BY)


@pytest.mark.parametrize("gate", ["publish", "published", "commit"])
async def test_a_push_under_way_keeps_its_blob_from_the_collector(
    gate: str, registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """A push stands before its rename, before the directory's sync, or before a commit, when a collection starts. The
    collection does not delete the blob that the push then acknowledges."""
    await _dropped(registry)
    await peer.start("push", APP, BODY, kind.steps[gate])
    collecting = asyncio.create_task(act(registry, "collect", APP, BODY))
    await asyncio.wait([collecting], timeout=0.05)
    assert await peer.finish() is None
    await collecting
    # Without a manifest and without any grace period, the blob may have been collected, but then as a whole.
    there = await is_stored(registry, DIGEST)
    try:
        assert await pull(registry, APP, DIGEST) == BODY
    except BlobUnknown:
        assert not there


@pytest.mark.parametrize("gate", ["publish", "published", "commit"])
async def test_a_pushed_blob_that_a_manifest_needs_survives_a_collection_beside_it(
    gate: str, registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """If a manifest refers to the pushed blob, the blob is served, byte for byte, after both the push and the
    collection."""
    await push(registry, APP, BODY)
    await registry.put_manifest(APP, manifest_of(BODY), by=BY)
    await registry.delete_blob(APP, DIGEST, by=BY, even_if_referenced=True)
    await peer.start("push", APP, BODY, kind.steps[gate])
    collecting = asyncio.create_task(act(registry, "collect", APP, BODY))
    await asyncio.wait([collecting], timeout=0.05)
    assert await peer.finish() is None
    await collecting
    assert await pull(registry, APP, DIGEST) == BODY


@pytest.mark.parametrize("gate", ["remove", "commit"])
async def test_a_collection_under_way_does_not_take_what_is_pushed_meanwhile(
    gate: str, registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """A push that comes while the collector stands before a commit, or between the row's end and the file's move, is
    acknowledged with its bytes in place."""
    await _dropped(registry)
    await peer.start("collect", APP, BODY, kind.steps[gate])
    pushing = asyncio.create_task(push(registry, APP, BODY))
    await asyncio.wait([pushing], timeout=0.05)
    assert not pushing.done(), "the push did not wait for the collector's step"
    assert await peer.finish() is None
    await pushing
    assert await pull(registry, APP, DIGEST) == BODY


async def test_a_stray_file_is_not_swept_away_under_a_push(
    registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind, data: Path
) -> None:
    """A file without a row is pushed again while the sweep is deleting it: the bytes of the push stay."""
    kind.leave_stray(data, DIGEST, BODY)
    await peer.start("sweep", APP, BODY, kind.steps["remove"])
    pushing = asyncio.create_task(_push_for_good(registry))
    await asyncio.wait([pushing], timeout=0.05)
    assert not pushing.done()
    assert await peer.finish() is None
    await pushing
    assert await pull(registry, APP, DIGEST) == BODY


async def _push_for_good(registry: StoredRegistry) -> None:
    """Pushes the blob with a manifest, so that later collections keep it."""
    await registry.put_manifest(APP, manifest_of(BODY), by=BY, sparse=True)
    await push(registry, APP, BODY)


async def test_a_mount_of_what_is_collected_either_fails_or_keeps_it(
    registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """While the collector moves the file, a mount finds no blob; while a mount commits, the collector finds a link."""
    await _dropped(registry)
    await peer.start("collect", APP, BODY, kind.steps["remove"])
    with pytest.raises(BlobUnknown):
        await registry.mount_blob(WEB, DIGEST, ALL_NAMES, BY)
    assert await peer.finish() is None

    await push(registry, APP, BODY)
    await registry.put_manifest(APP, manifest_of(BODY), by=BY)
    await peer.start("mount", WEB, BODY, kind.steps["commit"])
    deleting = asyncio.create_task(registry.delete_blob(APP, DIGEST, by=BY, even_if_referenced=True))
    assert await peer.finish() is None
    await deleting
    await registry.collector.free_unlinked_blobs()
    assert await pull(registry, WEB, DIGEST) == BODY


async def test_a_manifest_and_the_collection_of_its_blob_come_in_one_order_or_the_other(
    registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """A manifest is refused if its blob is being collected; a manifest that is being put keeps its blob."""
    await push(registry, APP, BODY)
    await peer.start("collect", APP, BODY, kind.steps["commit"])
    putting = asyncio.create_task(registry.put_manifest(APP, manifest_of(BODY), by=BY))
    await asyncio.wait([putting], timeout=0.05)
    assert await peer.finish() is None
    with pytest.raises(ManifestBlobUnknown):
        await putting

    await push(registry, APP, BODY)
    await peer.start("manifest", APP, BODY, kind.steps["commit"])
    collecting = asyncio.create_task(act(registry, "collect", APP, BODY))
    await asyncio.wait([collecting], timeout=0.05)
    assert await peer.finish() is None
    await collecting
    assert await pull(registry, APP, DIGEST) == BODY


async def test_a_manifest_and_the_deletion_of_its_blob_come_in_one_order_or_the_other(
    registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """While a manifest is being committed, a deletion of its blob waits and is then refused. While the deletion is
    being committed, the manifest waits and is refused. Both are never acknowledged."""
    await push(registry, APP, BODY)
    await peer.start("manifest", APP, BODY, kind.steps["commit"])
    deleting = asyncio.create_task(registry.delete_blob(APP, DIGEST, by=BY))
    await asyncio.wait([deleting], timeout=0.05)
    assert await peer.finish() is None
    with pytest.raises(Unsupported):
        await deleting
    assert await pull(registry, APP, DIGEST) == BODY

    await registry.delete_manifest(APP, manifest_of(BODY).digest, by=BY)
    await peer.start("delete", APP, BODY, kind.steps["commit"])
    putting = asyncio.create_task(registry.put_manifest(APP, manifest_of(BODY), by=BY))
    await asyncio.wait([putting], timeout=0.05)
    assert await peer.finish() is None
    with pytest.raises(ManifestBlobUnknown):
        await putting


async def test_pulls_under_way_end_well_when_the_blob_is_deleted_and_collected(registry: StoredRegistry) -> None:
    """Readers that opened the blob before its deletion get all of it; later ones get BlobUnknown."""
    body = random.Random(2).randbytes(5 * 1024 * 1024)
    await push(registry, APP, body)
    readers = [await registry.open_blob(APP, digest_of(body)) for _ in range(20)]
    parts = [(reader, aiter(reader)) for reader in readers]
    firsts = [await anext(chunks) for _, chunks in parts]
    await registry.delete_blob(APP, digest_of(body), by=BY)
    await act(registry, "collect", APP, body)
    assert not await is_stored(registry, digest_of(body))
    for first, (reader, chunks) in zip(firsts, parts, strict=True):
        assert first + b"".join([chunk async for chunk in chunks]) == body
        await reader.aclose()
    with pytest.raises(BlobUnknown):
        await registry.open_blob(APP, digest_of(body))


async def test_two_pushes_of_one_digest_both_succeed(
    registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """Two clients that push the same content at once, into two repositories, are both acknowledged, and both can pull
    it."""
    await peer.start("push", WEB, BODY, kind.steps["published"])
    pushing = asyncio.create_task(push(registry, APP, BODY))
    await asyncio.wait([pushing], timeout=0.05)
    assert await peer.finish() is None
    await pushing
    assert await pull(registry, APP, DIGEST) == await pull(registry, WEB, DIGEST) == BODY


async def test_pulls_race_with_deletes_collections_and_pushes(registry: StoredRegistry, system: GatedSystem) -> None:
    """In whatever order they run, a pull returns the right bytes or says that there is no such blob."""

    done = asyncio.Event()

    async def puller() -> int:
        found = 0
        while not done.is_set():
            try:
                assert await pull(registry, APP, DIGEST) == BODY
                found += 1
            except BlobUnknown:
                await asyncio.sleep(0)
        return found

    async def mover() -> None:
        for _ in range(20):
            await push(registry, APP, BODY)
            await registry.delete_blob(APP, DIGEST, by=BY)
            await registry.collector.free_unlinked_blobs()
        done.set()

    found = await asyncio.gather(*(puller() for _ in range(4)), mover())
    assert sum(count or 0 for count in found) > 0
