"""A scrub reads all content of a store and checks its digests. Damaged content is marked and no longer served. When a
client pushes the content again, it is healed: stored and served again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from storage.access import AuditQuery
from storage.composition import open_registry
from storage.content import digest_of
from storage.damage import ScrubRound
from storage.errors import BlobUnknown, ManifestBlobUnknown, StorageFailed
from storage.jobs import JobStopped
from storage.names import Digest, RepositoryName
from storage.patterns import ALL_NAMES
from storage.store.stored_registry import StoredRegistry
from storage.upkeep import scrubber
from storage.upkeep.read_rate import ReadRate
from tests.fakes.blob_files import layout_behind
from tests.fakes.registry_content import BY, image_of, push_blob, push_image, read_blob
from tests.fakes.scrub_runs import cut, delete, file_of, flip_byte, quarantined_file, scrub

APP, WEB = RepositoryName("team/app"), RepositoryName("team/web")
BODY = random.Random(3).randbytes(2_500_000)


@pytest.mark.parametrize(
    ("damage", "reason", "is_kept"),
    [
        (lambda file: flip_byte(file, 1_234_567), "its bytes have the digest sha256:", True),
        (cut, "its file has 2499999 bytes instead of 2500000", True),
        (delete, "its bytes are missing", False),
    ],
    ids=["flipped", "cut", "deleted"],
)
async def test_a_damaged_blob_is_not_served_until_it_is_pushed_again(
    registry: StoredRegistry, damage: Callable[[Path], None], reason: str, is_kept: bool
) -> None:
    """GET, HEAD, mounts and pushes of manifests treat a damaged blob as unknown. Its links and manifests stay. After a
    push of the right bytes to one repository, the blob is available again in every repository that has it. `is_kept`:
    whether the damaged bytes are in the quarantine."""
    config = await push_blob(registry, APP, b"{}")
    layer = await push_blob(registry, APP, BODY)
    manifest = image_of(config, [layer])
    await registry.put_manifest(APP, manifest, by=BY)
    await registry.mount_blob(WEB, layer.digest, APP, BY)
    damage(file_of(registry, layer.digest))

    result, steps = await scrub(registry)

    assert (result["blobs"], result["manifests"], result["damaged"]) == (2, 1, 1)
    [step] = steps
    assert step["reason"].startswith(reason)
    assert (step["digest"], step["size"], set(step["repositories"])) == (layer.digest, len(BODY), {APP, WEB})
    assert not file_of(registry, layer.digest).exists()
    assert quarantined_file(registry, layer.digest).exists() is is_kept
    for repo in (APP, WEB):
        with pytest.raises(BlobUnknown, match="damaged and are not served any more; push the image again"):
            await registry.open_blob(repo, layer.digest)
        with pytest.raises(BlobUnknown):
            await registry.resolve_blob(repo, layer.digest)
    for source in (APP, ALL_NAMES):
        with pytest.raises(BlobUnknown):
            await registry.mount_blob(RepositoryName("team/third"), layer.digest, source, BY)
    with pytest.raises(ManifestBlobUnknown):
        await registry.put_manifest(WEB, image_of(layer, []), by=BY)
    assert (await registry.get_manifest(APP, manifest.digest)).body == manifest.body
    [damaged] = (await registry.damage.damaged_blobs(None, 10)).items
    assert (damaged.digest, set(damaged.repositories)) == (layer.digest, {APP, WEB})

    await push_blob(registry, APP, BODY)

    assert await read_blob(registry, WEB, layer.digest) == BODY
    assert not (await registry.damage.damaged_blobs(None, 10)).items
    assert (await scrub(registry))[0]["damaged"] == 0
    audit = registry.accounts.audit(AuditQuery(), 20)
    assert {entry.action: entry.target for entry in audit.items if entry.action.startswith("blob.h")} == {
        "blob.healed": f"{APP}@{layer.digest}"
    }
    assert {entry.target for entry in audit.items if entry.action == "blob.damaged"} == {
        f"{APP}@{layer.digest}",
        f"{WEB}@{layer.digest}",
    }


async def test_the_total_of_a_round_is_what_it_has_read(registry: StoredRegistry) -> None:
    """The total of a round that has ended is what it has read, also if a damaged blob was pushed again after the round
    had begun."""
    await push_blob(registry, APP, b"{}")
    layer = await push_blob(registry, APP, BODY)
    flip_byte(file_of(registry, layer.digest), 1)
    await scrub(registry)
    assert (await registry.damage.start_round()).total_bytes == 2  # without the damaged blob
    await push_blob(registry, APP, BODY)

    await scrub(registry)

    ended = (await registry.damage.rounds(1))[0]
    assert (ended.checked_bytes, ended.total_bytes) == (2 + len(BODY), 2 + len(BODY))


async def test_a_read_finds_that_the_file_is_missing(registry: StoredRegistry) -> None:
    """If the file of a blob is missing, the first GET marks the blob as damaged. After that, GET and HEAD answer that
    the blob is unknown, until a client pushes it again."""
    layer = await push_blob(registry, APP, BODY)
    delete(file_of(registry, layer.digest))
    with pytest.raises(BlobUnknown, match="push the image again"):
        await registry.open_blob(APP, layer.digest)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(APP, layer.digest)
    await push_blob(registry, WEB, BODY)
    assert await read_blob(registry, APP, layer.digest) == BODY


async def test_a_blob_whose_file_was_put_back_is_served_again(registry: StoredRegistry) -> None:
    """If the missing file of a damaged blob is put back in its place, the next scrub heals the blob, and it is served
    again."""
    layer = await push_blob(registry, APP, BODY)
    delete(file_of(registry, layer.digest))
    assert (await scrub(registry))[0]["damaged"] == 1
    file_of(registry, layer.digest).write_bytes(BODY)
    result, [step] = await scrub(registry)
    assert (result["healed"], step["event"]) == (1, "healed")
    assert await read_blob(registry, APP, layer.digest) == BODY


@pytest.mark.full_store
async def test_an_unmounted_directory_is_not_damage(registry: StoredRegistry) -> None:
    """If the directory of a blob's file does not exist, for example because its file system is not mounted, a scrub
    stops and a GET fails. No blob is marked as damaged."""
    layer = await push_blob(registry, APP, BODY)
    shard = file_of(registry, layer.digest).parent
    shard.rename(shard.with_name("away"))
    for call in (scrub(registry), registry.open_blob(APP, layer.digest)):
        with pytest.raises(StorageFailed, match="is its file system mounted"):
            await call
    shard.with_name("away").rename(shard)
    assert await read_blob(registry, APP, layer.digest) == BODY


async def test_scrub_stops_after_many_damaged_blobs(registry: StoredRegistry) -> None:
    """After 20 damaged blobs in a row, a scrub stops with an error, because the disk may be faulty. With
    `continue_after_many_damaged`, it continues."""
    digests = [(await push_blob(registry, APP, b"%d" % number)).digest for number in range(30)]
    for digest in digests:
        delete(file_of(registry, digest))
    with pytest.raises(StorageFailed, match=r"the last 20 blobs are all damaged.*--keep-going"):
        await scrub(registry)
    assert len((await registry.damage.damaged_blobs(None, 100)).items) == 20
    reported: list[Digest] = []
    result, steps = await scrub(registry, continue_after_many_damaged=True, on_damaged=reported.append)
    assert (result["damaged"], len(steps)) == (30, 10)  # the first scrub has reported the other 20 blobs
    assert set(reported) == set(digests)


async def test_the_quarantine_is_limited(registry: StoredRegistry) -> None:
    """If the quarantine exceeds its limit, the oldest bytes in it are deleted. With the limit 0, no bytes are kept."""
    for number, body in enumerate((b"a" * 600, b"b" * 600)):
        digest = (await push_blob(registry, APP, body)).digest
        flip_byte(file_of(registry, digest))
        await scrub(registry, quarantine_bytes=1000)
        assert [item.digest for item in await registry.blobs.list_quarantine()] == [digest], number
    digest = (await push_blob(registry, APP, b"c")).digest
    flip_byte(file_of(registry, digest))
    await scrub(registry, quarantine_bytes=0)
    assert await registry.blobs.list_quarantine() == []


async def test_a_deleted_quarantine_directory_is_created_again(registry: StoredRegistry) -> None:
    """If the quarantine directory was deleted, a scrub creates it again when it needs it."""
    (layout_behind(registry).root / "quarantine").rmdir()
    digest = (await push_blob(registry, APP, BODY)).digest
    assert await registry.blobs.list_quarantine() == []
    flip_byte(file_of(registry, digest))
    await scrub(registry)
    assert [item.digest for item in await registry.blobs.list_quarantine()] == [digest]


async def test_garbage_collection_removes_a_damaged_blob(data: Path) -> None:
    """Garbage collection removes a damaged blob to which no manifest refers, like any other blob. Its bytes stay in the
    quarantine, so the removal frees no bytes. A dry run reports the same."""
    async with open_registry(data, grace=0) as registry:
        layer = await push_blob(registry, APP, BODY)
        flip_byte(file_of(registry, layer.digest))
        await scrub(registry)
        planned = await registry.collector.collect(dry_run=True)
        report = await registry.collector.collect()
        assert planned == report
        assert (report.links, report.blobs, report.freed_bytes) == (1, 1, 0)
        assert not (await registry.damage.damaged_blobs(None, 10)).items
        assert [item.digest for item in await registry.blobs.list_quarantine()] == [layer.digest]
        assert await registry.blobs.delete_quarantined(layer.digest)
        assert not await registry.blobs.delete_quarantined(layer.digest)


async def test_a_round_continues_where_it_stopped(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a scrub is stopped in the middle of a round, the next scrub reads only the remaining blobs of the round. The
    end of the round is recorded."""
    monkeypatch.setattr(scrubber, "SAVE_SECONDS", 0.0)
    async with open_registry(data) as registry:
        for number in range(20):
            await push_blob(registry, APP, b"%d" % number)
        pauses = 0

        async def stop_in_the_middle(_: float) -> None:
            nonlocal pauses
            pauses += 1
            if pauses == 20:  # there are two pauses for each blob
                [job] = await registry.jobs.active()
                await registry.jobs.request_stop(job.id)
            await asyncio.sleep(0)

        with pytest.raises(JobStopped):
            await scrub(registry, sleep=stop_in_the_middle)
        stopped_round = await _current_round(registry)
        assert 8 <= stopped_round.blobs <= 12
        assert stopped_round.ended is None

    async with open_registry(data) as registry:
        later_pauses = 0

        async def count(_: float) -> None:
            nonlocal later_pauses
            later_pauses += 1
            await asyncio.sleep(0)

        await push_blob(registry, APP, b"after the round began")
        result, _ = await scrub(registry, sleep=count)
        assert (result["round"], result["blobs"]) == (stopped_round.id, 20)
        assert later_pauses == 2 * (20 - stopped_round.blobs)
        [ended] = await registry.damage.rounds(10)
        assert ended.ended is not None
        assert (await scrub(registry))[0]["blobs"] == 21


async def _current_round(registry: StoredRegistry) -> ScrubRound:
    current_round = await registry.damage.current_round()
    assert current_round is not None
    return current_round


async def test_a_scrub_keeps_to_its_rate(registry: StoredRegistry) -> None:
    """At a rate of 100 kB per second, a scrub of 2.5 MB takes 25 s. The test's clock advances only during the scrub's
    pauses. No pause is longer than a second, so that even a slow scrub can be stopped soon."""
    await push_blob(registry, APP, BODY)
    now, longest_pause = 0.0, 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now, longest_pause
        now += seconds
        longest_pause = max(longest_pause, seconds)
        await asyncio.sleep(0)

    await scrub(registry, rate=100_000, monotonic=lambda: now, sleep=sleep)
    assert 24.9 < now < 25.1
    assert longest_pause <= 1


async def test_a_slow_scrub_makes_up_for_at_most_one_second() -> None:
    """If a scrub was slower than its rate, it may read faster afterwards, but it makes up for at most one second."""
    now, waited = 0.0, 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now, waited
        now += seconds
        waited += seconds

    rate = ReadRate(10, lambda: now, sleep)
    now = 100.0
    for _ in range(3):
        await rate.wait(10)  # the bytes of one second
    assert waited == pytest.approx(2.0)


@pytest.mark.slow
async def test_a_scrub_of_a_busy_registry_finds_no_damage(data: Path) -> None:
    """A scrub finds no damage while blobs are pushed, deleted and collected."""
    async with open_registry(data, grace=0) as registry:
        bodies = [random.Random(number).randbytes(20_000) for number in range(12)]
        await push_image(registry, WEB, "kept", "1")
        ended = False

        async def push_and_delete(number: int) -> None:
            while not ended:
                for body in bodies[number::3]:
                    await push_blob(registry, APP, body)
                    with suppress(BlobUnknown):  # garbage collection may have deleted the blob already
                        await registry.delete_blob(APP, digest_of(body), by=BY)

        async def collect() -> None:
            while not ended:
                await registry.collector.collect()

        busy = [
            asyncio.create_task(each)
            for each in (push_and_delete(0), push_and_delete(1), push_and_delete(2), collect())
        ]
        steps = []
        for _ in range(25):
            steps += (await scrub(registry))[1]
        ended = True
        await asyncio.gather(*busy)
        assert steps == []
        assert await registry.blobs.list_quarantine() == []


@pytest.mark.parametrize("push_in_second_read", [False, True])
async def test_a_replaced_file_is_no_damage(registry: StoredRegistry, push_in_second_read: bool) -> None:
    """When a scrub finds damaged bytes, it reads them a second time. If a push stores the right bytes during the first
    or the second read, the blob is not marked as damaged."""
    layer = await push_blob(registry, APP, BODY)
    flip_byte(file_of(registry, layer.digest))
    [stored] = await registry.damage.blobs_after(0, 1000, 10)
    pushed = False

    async def push(_: int) -> None:
        nonlocal pushed
        if not pushed:
            pushed = True
            await push_blob(registry, WEB, BODY)

    async def do_nothing(_: int) -> None:
        return None

    hooks = (do_nothing, push) if push_in_second_read else (push, do_nothing)
    assert await registry.quarantine.find_and_take_out(stored, *hooks) is None
    assert pushed
    assert await read_blob(registry, APP, layer.digest) == BODY
    assert await registry.blobs.list_quarantine() == []
