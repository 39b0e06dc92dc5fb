"""Contract tests for blobs: reads of whole blobs and of byte ranges (spans), access by repository, mounts, and deletes.
They run on every implementation of the registry interface."""

from __future__ import annotations

import os

import pytest

from storage.content import Span, digest_of
from storage.errors import BlobUnknown, NameUnknown, RangeInvalid, Unsupported
from storage.interface import Registry
from storage.names import RepositoryName
from storage.patterns import ALL_NAMES, NO_NAMES, NameSet
from tests.fakes.registry_content import BY, NOWHERE, all_tags, image_of, push_blob, push_image, read_blob

DATA = bytes(range(256)) * 4 + b"tail"
SIZE = len(DATA)

INSIDE = {  # requested spans, with the first byte and the end of the bytes that the registry returns
    "the first byte": (Span(0, 1), (0, 1)),
    "the whole": (Span(0, SIZE), (0, SIZE)),
    "all from the start": (Span(0), (0, SIZE)),
    "the middle": (Span(500, 700), (500, 700)),
    "from the middle on": (Span(500), (500, SIZE)),
    "over the end": (Span(500, 5000), (500, SIZE)),
    "the last byte": (Span(SIZE - 1, SIZE), (SIZE - 1, SIZE)),
    "the last byte from the end": (Span(-1), (SIZE - 1, SIZE)),
    "the last 500": (Span(-500), (SIZE - 500, SIZE)),
    "a suffix longer than the blob": (Span(-5000), (0, SIZE)),
}
OUTSIDE = {
    "right after the end": Span(SIZE),
    "far after the end": Span(5000, 6000),
    "huge": Span(1 << 62, (1 << 62) + 1),
    "turned round": Span(7, 3),
    "nothing": Span(5, 5),
}


@pytest.mark.parametrize("case", INSIDE)
async def test_a_span_gives_its_bytes(registry: Registry, repo: RepositoryName, case: str) -> None:
    """The reader of a span yields exactly the bytes of the span, up to the end of the blob. Its descriptor has the
    digest and the size of the whole blob."""
    span, (start, stop) = INSIDE[case]
    await push_blob(registry, repo, DATA)
    reader = await registry.open_blob(repo, digest_of(DATA), span)
    assert tuple(reader.span) == (start, stop)
    assert (reader.descriptor.digest, reader.descriptor.size) == (digest_of(DATA), SIZE)
    assert b"".join([chunk async for chunk in reader]) == DATA[start:stop]
    await reader.aclose()


@pytest.mark.parametrize("case", OUTSIDE)
async def test_a_span_outside_is_refused_on_opening(registry: Registry, repo: RepositoryName, case: str) -> None:
    """Opening a span outside the blob raises RangeInvalid. The error has the size of the blob."""
    await push_blob(registry, repo, DATA)
    with pytest.raises(RangeInvalid) as refused:
        await registry.open_blob(repo, digest_of(DATA), OUTSIDE[case])
    assert refused.value.size == SIZE
    assert await read_blob(registry, repo, digest_of(DATA)) == DATA


@pytest.mark.parametrize("span", [Span(0), Span(0, 1), Span(-1), Span(1)])
async def test_a_blob_of_no_bytes(registry: Registry, repo: RepositoryName, span: Span) -> None:
    """The reader of an empty blob yields no bytes. Every span is outside an empty blob."""
    await push_blob(registry, repo, b"")
    assert (await registry.resolve_blob(repo, digest_of(b""))).size == 0
    assert await read_blob(registry, repo, digest_of(b"")) == b""
    with pytest.raises(RangeInvalid) as refused:
        await registry.open_blob(repo, digest_of(b""), span)
    assert refused.value.size == 0


async def test_the_file_of_a_reader_holds_the_bytes(registry: Registry, repo: RepositoryName) -> None:
    """If a reader has a file, the file holds the blob from `offset` on. Iterating over the reader yields the same
    bytes."""
    await push_blob(registry, repo, DATA)
    reader = await registry.open_blob(repo, digest_of(DATA), Span(100, 300))
    if reader.file is not None:
        assert os.pread(reader.file.fd, 200, reader.file.offset + 100) == DATA[100:300]
    assert b"".join([chunk async for chunk in reader]) == DATA[100:300]
    await reader.aclose()


async def test_readers_do_not_disturb_each_other(registry: Registry, repo: RepositoryName) -> None:
    """Two readers of one blob that are read alternately both yield the whole blob, even if a third reader is closed
    before its end."""
    data = os.urandom(3_000_000)
    await push_blob(registry, repo, data)
    first, second, third = [await registry.open_blob(repo, digest_of(data)) for _ in range(3)]
    chunks_read: list[list[bytes]] = [[], []]
    iterators = [aiter(first), aiter(second)]
    unfinished = [0, 1]
    await third.aclose()
    while unfinished:
        for index in tuple(unfinished):
            try:
                chunks_read[index].append(await anext(iterators[index]))
            except StopAsyncIteration:
                unfinished.remove(index)
    assert [b"".join(chunks) for chunks in chunks_read] == [data, data]
    await first.aclose()
    await second.aclose()


async def test_a_reader_may_be_closed_at_any_time(registry: Registry, repo: RepositoryName) -> None:
    """A reader can be closed before it is read, while it is read, and when it is closed already."""
    data = os.urandom(3_000_000)
    await push_blob(registry, repo, data)
    unread = await registry.open_blob(repo, digest_of(data))
    await unread.aclose()
    await unread.aclose()
    partly_read = await registry.open_blob(repo, digest_of(data))
    iterator = aiter(partly_read)
    assert data.startswith(await anext(iterator))
    await partly_read.aclose()
    await partly_read.aclose()
    assert await read_blob(registry, repo, digest_of(data)) == data


async def test_an_open_reader_outlives_the_link(registry: Registry, repo: RepositoryName) -> None:
    """A reader that was opened before its blob was deleted reads it to the end."""
    data = os.urandom(2_000_000)
    await push_blob(registry, repo, data)
    reader = await registry.open_blob(repo, digest_of(data))
    await registry.delete_blob(repo, digest_of(data), by=BY)
    assert b"".join([chunk async for chunk in reader]) == data
    await reader.aclose()


async def test_an_unknown_blob(registry: Registry, repo: RepositoryName) -> None:
    """A digest that was never pushed is unknown to every call, in a known repository and in an unknown one."""
    await push_blob(registry, repo, b"something else")
    for name in (repo, NOWHERE):
        for algorithm in ("sha256", "sha512"):
            digest = digest_of(b"never pushed", algorithm)
            with pytest.raises(BlobUnknown):
                await registry.resolve_blob(name, digest)
            with pytest.raises(BlobUnknown):
                await registry.open_blob(name, digest)
            with pytest.raises(BlobUnknown):
                await registry.open_blob(name, digest, Span(5, 3))
            with pytest.raises(BlobUnknown):
                await registry.delete_blob(name, digest, by=BY)


async def test_a_blob_of_another_repository_is_unknown(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """A blob of one repository is unknown in another repository, even if the other name begins with the first name and
    the other repository has content of its own."""
    await push_blob(registry, repo, DATA)
    await push_image(registry, other, "something of its own", "latest")
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(other, digest_of(DATA))
    with pytest.raises(BlobUnknown):
        await registry.open_blob(other, digest_of(DATA))
    with pytest.raises(BlobUnknown):
        await registry.delete_blob(other, digest_of(DATA), by=BY)


async def test_a_sparse_manifest_does_not_make_blobs_readable(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """A sparse put stores a manifest without its blobs. If the manifest refers to a blob of another repository, clients
    still cannot read that blob."""
    layer = await push_blob(registry, repo, DATA)
    await registry.put_manifest(other, image_of(layer), by=BY, sparse=True)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(other, layer.digest)
    with pytest.raises(BlobUnknown):
        await registry.open_blob(other, layer.digest)


async def test_a_manifest_is_no_blob(registry: Registry, repo: RepositoryName) -> None:
    """The digest of a manifest cannot be resolved as a blob."""
    manifest = await push_image(registry, repo, "one", "latest")
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(repo, manifest.digest)


async def test_a_mount_from_a_repository(registry: Registry, repo: RepositoryName, other: RepositoryName) -> None:
    """A mount adds a blob of the source repository to the target without an upload. Afterwards both repositories have
    the blob."""
    await push_blob(registry, repo, DATA)
    mounted = await registry.mount_blob(other, digest_of(DATA), repo, BY)
    assert (mounted.digest, mounted.size) == (digest_of(DATA), SIZE)
    assert await read_blob(registry, other, digest_of(DATA)) == DATA
    assert await read_blob(registry, repo, digest_of(DATA)) == DATA
    assert await all_tags(registry, other) == []


async def test_a_mount_from_anywhere(registry: Registry, repo: RepositoryName, other: RepositoryName) -> None:
    """Without a source, a blob of any repository can be mounted, also a sha512 blob."""
    await push_blob(registry, repo, DATA, "sha512")
    mounted = await registry.mount_blob(other, digest_of(DATA, "sha512"), ALL_NAMES, BY)
    assert (mounted.digest, mounted.size) == (digest_of(DATA, "sha512"), SIZE)
    assert await read_blob(registry, other, digest_of(DATA, "sha512")) == DATA


async def test_a_mount_from_a_set(registry: Registry, repo: RepositoryName, other: RepositoryName) -> None:
    """If the source is a set of names, a blob is mounted only if a repository in the set has it."""
    for name in (repo, other):
        await push_blob(registry, name, DATA)
    target = RepositoryName("target")
    for names in (NO_NAMES, NameSet.of(["else/**"]), NameSet.of(["**"], guarded=["team"])):
        with pytest.raises(BlobUnknown):
            await registry.mount_blob(target, digest_of(DATA), names, BY)
    with pytest.raises(NameUnknown):
        await registry.tags(target, None, 10)
    for number, names in enumerate((NameSet.of(["else/**", f"{other}"]), NameSet.of(["team/*"]))):
        mounted = await registry.mount_blob(RepositoryName(f"target{number}"), digest_of(DATA), names, BY)
        assert mounted.size == SIZE


async def test_a_mount_of_a_blob_that_the_target_has(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """A mount of a blob that the target already has succeeds with any source."""
    await push_blob(registry, repo, DATA)
    await push_blob(registry, other, DATA)
    for source in (repo, other, ALL_NAMES):
        assert (await registry.mount_blob(repo, digest_of(DATA), source, BY)).size == SIZE
    assert await read_blob(registry, repo, digest_of(DATA)) == DATA


async def test_a_mount_from_a_repository_without_the_blob(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """A mount from a repository without the blob fails, even if a third repository has the blob. The mount does not
    create the target repository."""
    await push_blob(registry, repo, DATA)
    await push_blob(registry, other, b"something else")
    target = RepositoryName("target")
    for source in (other, NOWHERE, target):
        with pytest.raises(BlobUnknown):
            await registry.mount_blob(target, digest_of(DATA), source, BY)
    with pytest.raises(BlobUnknown):
        await registry.mount_blob(target, digest_of(b"nobody has this"), ALL_NAMES, BY)
    with pytest.raises(BlobUnknown):
        await registry.mount_blob(target, digest_of(DATA, "sha512"), ALL_NAMES, BY)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(target, digest_of(DATA))
    with pytest.raises(NameUnknown):
        await registry.tags(target, None, 10)


async def test_a_mounted_blob_outlives_its_source(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """A mounted blob stays in the target when it is deleted from the source. Once it is deleted from all repositories,
    it cannot be mounted any more."""
    await push_blob(registry, repo, DATA)
    await registry.mount_blob(other, digest_of(DATA), repo, BY)
    await registry.delete_blob(repo, digest_of(DATA), by=BY)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(repo, digest_of(DATA))
    assert await read_blob(registry, other, digest_of(DATA)) == DATA
    with pytest.raises(BlobUnknown):
        await registry.mount_blob(other, digest_of(DATA), repo, BY)
    await registry.delete_blob(other, digest_of(DATA), by=BY)
    with pytest.raises(BlobUnknown):
        await registry.mount_blob(repo, digest_of(DATA), ALL_NAMES, BY)


async def test_a_deleted_blob_is_gone_at_once(registry: Registry, repo: RepositoryName) -> None:
    """Right after its deletion, a blob is unknown to every call, also to a second deletion. Other blobs stay."""
    await push_blob(registry, repo, DATA)
    await push_blob(registry, repo, b"another")
    await registry.delete_blob(repo, digest_of(DATA), by=BY)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(repo, digest_of(DATA))
    with pytest.raises(BlobUnknown):
        await registry.open_blob(repo, digest_of(DATA))
    with pytest.raises(BlobUnknown):
        await registry.delete_blob(repo, digest_of(DATA), by=BY)
    assert await read_blob(registry, repo, digest_of(b"another")) == b"another"


async def test_a_blob_in_use_stays(registry: Registry, repo: RepositoryName) -> None:
    """Deleting a layer or a config to which a manifest of the repository refers raises Unsupported. The error names a
    manifest that has to be deleted first. Once all such manifests are deleted, the blob can be deleted."""
    image = await push_image(registry, repo, "one", "latest")
    layer, config = image.layers[0].digest, image.config.digest if image.config else image.layers[0].digest
    for digest in (layer, config):
        with pytest.raises(Unsupported, match=f"such as {image.digest}, refer to the blob {digest}; delete"):
            await registry.delete_blob(repo, digest, by=BY)
    assert await read_blob(registry, repo, layer) == b"layer of one"
    await registry.delete_manifest(repo, image.digest, by=BY)
    await registry.delete_blob(repo, layer, by=BY)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(repo, layer)


async def test_a_blob_that_another_repository_uses(
    registry: Registry, repo: RepositoryName, other: RepositoryName
) -> None:
    """A blob can be deleted from a repository whose manifests do not refer to it, even if manifests of another
    repository do. It stays in the other repository."""
    image = await push_image(registry, other, "one", "latest")
    layer = image.layers[0].digest
    await registry.mount_blob(repo, layer, other, BY)
    await registry.delete_blob(repo, layer, by=BY)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(repo, layer)
    assert await read_blob(registry, other, layer) == b"layer of one"
