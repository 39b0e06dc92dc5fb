"""Tests of the garbage collector against requests that need, at the same time, the blob that it is about to delete. The
calls of `asyncio.wait` give the second action the time to start, and to wait for the first one if it has to."""

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


async def _push_and_delete(registry: StoredRegistry) -> None:
    """Pushes a blob and deletes it, so that the collector has its file to delete."""
    await push(registry, APP, BODY)
    await registry.delete_blob(APP, DIGEST, by=BY)


@pytest.mark.parametrize("gate", ["before_move", "after_move", "commit"])
async def test_collection_during_a_push_does_not_damage_the_blob(
    gate: str, registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """A push is stopped before the blob is moved to its place, before this move is durable, or before a commit. Then a
    collection starts. After both have ended, the blob is either complete or deleted together with its row."""
    await _push_and_delete(registry)
    await peer.start("push", APP, BODY, kind.steps[gate])
    collecting = asyncio.create_task(act(registry, "collect", APP, BODY))
    await asyncio.wait([collecting], timeout=0.05)
    assert await peer.finish() is None
    await collecting
    # No manifest refers to the blob and there is no grace period, so the collection may have deleted the blob and its
    # row.
    is_in_store = await is_stored(registry, DIGEST)
    try:
        assert await pull(registry, APP, DIGEST) == BODY
    except BlobUnknown:
        assert not is_in_store


@pytest.mark.parametrize("gate", ["before_move", "after_move", "commit"])
async def test_collection_during_a_push_keeps_a_referenced_blob(
    gate: str, registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """A manifest refers to the blob whose push is stopped when a collection starts. After both have ended, the blob can
    be pulled."""
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
async def test_push_waits_for_a_running_collection(
    gate: str, registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """The collector is stopped before its commit, or after it has deleted the blob's row and before it removes the
    file. A push of the same blob waits for the collector. After the push is acknowledged, the blob can be pulled."""
    await _push_and_delete(registry)
    await peer.start("collect", APP, BODY, kind.steps[gate])
    pushing = asyncio.create_task(push(registry, APP, BODY))
    await asyncio.wait([pushing], timeout=0.05)
    assert not pushing.done(), "the push did not wait for the collector's step"
    assert await peer.finish() is None
    await pushing
    assert await pull(registry, APP, DIGEST) == BODY


async def test_sweep_of_a_stray_file_does_not_delete_a_push(
    registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind, data: Path
) -> None:
    """The collector is about to delete a file that has no row in the metadata (a stray file), when the same content is
    pushed. The pushed blob is kept."""
    kind.leave_stray(data, DIGEST, BODY)
    await peer.start("sweep", APP, BODY, kind.steps["remove"])
    pushing = asyncio.create_task(_push_with_manifest(registry))
    await asyncio.wait([pushing], timeout=0.05)
    assert not pushing.done()
    assert await peer.finish() is None
    await pushing
    assert await pull(registry, APP, DIGEST) == BODY


async def _push_with_manifest(registry: StoredRegistry) -> None:
    """Puts a manifest that refers to the blob, and pushes the blob, so that later collections keep it."""
    await registry.put_manifest(APP, manifest_of(BODY), by=BY, sparse=True)
    await push(registry, APP, BODY)


async def test_mount_during_a_collection_fails_or_keeps_the_blob(
    registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """While the collector removes the file of a blob, a mount of this blob fails. If the mount commits first, the
    collector keeps the blob, because a repository is linked to it."""
    await _push_and_delete(registry)
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


async def test_manifest_is_refused_or_keeps_its_blob_from_the_collection(
    registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """If the collection of a blob commits first, a manifest that refers to the blob is refused. If the manifest commits
    first, the collection keeps the blob."""
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


async def test_manifest_and_deletion_of_its_blob_are_never_both_accepted(
    registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """While a manifest is being committed, a deletion of its blob waits and is then refused. While the deletion is
    being committed, the manifest waits and is then refused."""
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


async def test_open_readers_get_the_whole_blob_after_its_deletion(registry: StoredRegistry) -> None:
    """Readers that opened the blob before it was deleted and collected get all its bytes. Opening the blob afterwards
    raises BlobUnknown."""
    body = random.Random(2).randbytes(5 * 1024 * 1024)
    await push(registry, APP, body)
    readers = [await registry.open_blob(APP, digest_of(body)) for _ in range(20)]
    open_readers = [(reader, aiter(reader)) for reader in readers]
    first_chunks = [await anext(chunks) for _, chunks in open_readers]
    await registry.delete_blob(APP, digest_of(body), by=BY)
    await act(registry, "collect", APP, body)
    assert not await is_stored(registry, digest_of(body))
    for first_chunk, (reader, chunks) in zip(first_chunks, open_readers, strict=True):
        assert first_chunk + b"".join([chunk async for chunk in chunks]) == body
        await reader.aclose()
    with pytest.raises(BlobUnknown):
        await registry.open_blob(APP, digest_of(body))


async def test_two_pushes_of_one_digest_both_succeed(
    registry: StoredRegistry, peer: PeerRegistry, kind: ContentKind
) -> None:
    """Two clients push the same content at the same time into two repositories. Both pushes are acknowledged, and the
    blob can be pulled from both repositories."""
    await peer.start("push", WEB, BODY, kind.steps["after_move"])
    pushing = asyncio.create_task(push(registry, APP, BODY))
    await asyncio.wait([pushing], timeout=0.05)
    assert await peer.finish() is None
    await pushing
    assert await pull(registry, APP, DIGEST) == await pull(registry, WEB, DIGEST) == BODY


async def test_pulls_during_pushes_deletions_and_collections(registry: StoredRegistry, system: GatedSystem) -> None:
    """While another task pushes, deletes and collects a blob again and again, each pull returns the right bytes or
    raises BlobUnknown."""

    stop_pulling = asyncio.Event()

    async def pull_repeatedly() -> int:
        pulled = 0
        while not stop_pulling.is_set():
            try:
                assert await pull(registry, APP, DIGEST) == BODY
                pulled += 1
            except BlobUnknown:
                await asyncio.sleep(0)
        return pulled

    async def push_and_delete() -> None:
        for _ in range(20):
            await push(registry, APP, BODY)
            await registry.delete_blob(APP, DIGEST, by=BY)
            await registry.collector.free_unlinked_blobs()
        stop_pulling.set()

    counts = await asyncio.gather(*(pull_repeatedly() for _ in range(4)), push_and_delete())
    assert sum(count or 0 for count in counts) > 0
