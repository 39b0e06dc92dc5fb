"""Scrub finds damaged content. It is not served until it is stored again, which heals it."""

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
async def test_a_damaged_blob_is_taken_out_of_use_and_healed_by_a_push(
    registry: StoredRegistry, damage: Callable[[Path], None], reason: str, is_kept: bool
) -> None:
    """GET, HEAD, a mount and the push of a manifest treat a damaged blob as missing. Its links and manifests stay. A
    push of the same bytes heals it for every repository that has it."""
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
    assert {line.action: line.target for line in audit.items if line.action.startswith("blob.h")} == {
        "blob.healed": f"{APP}@{layer.digest}"
    }
    assert {line.target for line in audit.items if line.action == "blob.damaged"} == {
        f"{APP}@{layer.digest}",
        f"{WEB}@{layer.digest}",
    }


async def test_a_read_finds_that_the_file_is_missing(registry: StoredRegistry) -> None:
    """The first GET of a blob whose file is missing marks the blob as damaged. GET and HEAD then answer that the blob
    is unknown, and a push heals it."""
    layer = await push_blob(registry, APP, BODY)
    delete(file_of(registry, layer.digest))
    with pytest.raises(BlobUnknown, match="push the image again"):
        await registry.open_blob(APP, layer.digest)
    with pytest.raises(BlobUnknown):
        await registry.resolve_blob(APP, layer.digest)
    await push_blob(registry, WEB, BODY)
    assert await read_blob(registry, APP, layer.digest) == BODY


async def test_bytes_that_come_back_make_the_blob_whole(registry: StoredRegistry) -> None:
    """If a lost file is put back in its place, the next scrub serves the blob again."""
    layer = await push_blob(registry, APP, BODY)
    delete(file_of(registry, layer.digest))
    assert (await scrub(registry))[0]["damaged"] == 1
    file_of(registry, layer.digest).write_bytes(BODY)
    result, [step] = await scrub(registry)
    assert (result["healed"], step["event"]) == (1, "healed")
    assert await read_blob(registry, APP, layer.digest) == BODY


@pytest.mark.full_store
async def test_an_unmounted_directory_is_not_damage(registry: StoredRegistry) -> None:
    """If the directory of a file does not exist, scrub stops and a GET fails. No blob counts as damaged."""
    layer = await push_blob(registry, APP, BODY)
    shard = file_of(registry, layer.digest).parent
    shard.rename(shard.with_name("away"))
    for attempt in (scrub(registry), registry.open_blob(APP, layer.digest)):
        with pytest.raises(StorageFailed, match="is its file system mounted"):
            await attempt
    shard.with_name("away").rename(shard)
    assert await read_blob(registry, APP, layer.digest) == BODY


async def test_scrub_stops_when_all_is_damaged(registry: StoredRegistry) -> None:
    """After many damaged blobs in a row, scrub stops and asks the operator to check the disk. With `keep_going`, it
    continues."""
    digests = [(await push_blob(registry, APP, b"%d" % number)).digest for number in range(30)]
    for digest in digests:
        delete(file_of(registry, digest))
    with pytest.raises(StorageFailed, match=r"the last 20 blobs are all damaged.*--keep-going"):
        await scrub(registry)
    assert len((await registry.damage.damaged_blobs(None, 100)).items) == 20
    found: list[Digest] = []
    result, steps = await scrub(registry, keep_going=True, on_damaged=found.append)
    assert (result["damaged"], len(steps)) == (30, 10)
    assert set(found) == set(digests)


async def test_the_quarantine_is_bounded(registry: StoredRegistry) -> None:
    """The oldest bytes in the quarantine are deleted first. With the limit `0`, none are kept."""
    for number, body in enumerate((b"a" * 600, b"b" * 600)):
        digest = (await push_blob(registry, APP, body)).digest
        flip_byte(file_of(registry, digest))
        await scrub(registry, quarantine_bytes=1000)
        assert [item.digest for item in await registry.blobs.list_quarantine()] == [digest], number
    digest = (await push_blob(registry, APP, b"c")).digest
    flip_byte(file_of(registry, digest))
    await scrub(registry, quarantine_bytes=0)
    assert await registry.blobs.list_quarantine() == []


async def test_a_deleted_quarantine_is_made_again(registry: StoredRegistry) -> None:
    (layout_behind(registry).root / "quarantine").rmdir()
    digest = (await push_blob(registry, APP, BODY)).digest
    assert await registry.blobs.list_quarantine() == []
    flip_byte(file_of(registry, digest))
    await scrub(registry)
    assert [item.digest for item in await registry.blobs.list_quarantine()] == [digest]


async def test_the_collector_removes_a_damaged_blob(data: Path) -> None:
    """A damaged blob without references is collected like any other. Its bytes stay in the quarantine, so its removal
    frees no bytes. A dry run reports the same."""
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
    """After a stop, the next run reads the rest of the round and nothing twice. The end of the round is recorded."""
    monkeypatch.setattr(scrubber, "SAVE_SECONDS", 0.0)
    async with open_registry(data) as registry:
        for number in range(20):
            await push_blob(registry, APP, b"%d" % number)
        waits = 0

        async def stop_in_the_middle(_: float) -> None:
            nonlocal waits
            waits += 1
            if waits == 20:  # two for each blob
                [job] = await registry.jobs.active()
                await registry.jobs.request_stop(job.id)
            await asyncio.sleep(0)

        with pytest.raises(JobStopped):
            await scrub(registry, sleep=stop_in_the_middle)
        done = await _current_round(registry)
        assert 8 <= done.blobs <= 12
        assert done.ended is None

    async with open_registry(data) as registry:
        read = 0

        async def count(_: float) -> None:
            nonlocal read
            read += 1
            await asyncio.sleep(0)

        await push_blob(registry, APP, b"after the round began")
        result, _ = await scrub(registry, sleep=count)
        assert (result["round"], result["blobs"]) == (done.id, 20)
        assert read == 2 * (20 - done.blobs)
        [ended] = await registry.damage.rounds(10)
        assert ended.ended is not None
        assert (await scrub(registry))[0]["blobs"] == 21


async def _current_round(registry: StoredRegistry) -> ScrubRound:
    found = await registry.damage.current_round()
    assert found is not None
    return found


async def test_the_rate_is_kept(registry: StoredRegistry) -> None:
    """Reading 2.5 MB at 100 kB a second takes 25 s of the test's clock, which advances only during pauses. No pause is
    longer than a second, so a scrub at a low rate can be stopped soon too."""
    await push_blob(registry, APP, BODY)
    now, longest = 0.0, 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now, longest
        now += seconds
        longest = max(longest, seconds)
        await asyncio.sleep(0)

    await scrub(registry, rate=100_000, monotonic=lambda: now, sleep=sleep)
    assert 24.9 < now < 25.1
    assert longest <= 1


async def test_a_slow_reader_catches_up_by_one_second() -> None:
    """A reader that was slower than the rate may read faster afterwards, but catches up by one second at most."""
    now, waited = 0.0, 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now, waited
        now += seconds
        waited += seconds

    rate = ReadRate(10, lambda: now, sleep)
    now = 100.0
    for _ in range(3):
        await rate.wait(10)
    assert waited == pytest.approx(2.0)


@pytest.mark.slow
async def test_a_busy_registry_gives_no_false_alarm(data: Path) -> None:
    """While blobs are pushed, deleted and collected, scrub finds no damage."""
    async with open_registry(data, grace=0) as registry:
        bodies = [random.Random(number).randbytes(20_000) for number in range(12)]
        await push_image(registry, WEB, "kept", "1")
        ended = False

        async def churn(number: int) -> None:
            while not ended:
                for body in bodies[number::3]:
                    await push_blob(registry, APP, body)
                    with suppress(BlobUnknown):  # without grace, the collector may be faster
                        await registry.delete_blob(APP, digest_of(body), by=BY)

        async def collect() -> None:
            while not ended:
                await registry.collector.collect()

        busy = [asyncio.create_task(each) for each in (churn(0), churn(1), churn(2), collect())]
        steps = []
        for _ in range(25):
            steps += (await scrub(registry))[1]
        ended = True
        await asyncio.gather(*busy)
        assert steps == []
        assert await registry.blobs.list_quarantine() == []


@pytest.mark.parametrize("push_in_second_read", [False, True])
async def test_a_replaced_file_is_no_damage(registry: StoredRegistry, push_in_second_read: bool) -> None:
    """When scrub finds damaged bytes, it reads them a second time. If a push stores the right bytes during either read,
    the blob does not count as damaged."""
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
    assert await registry.quarantine.check(stored, *hooks) is None
    assert pushed
    assert await read_blob(registry, APP, layer.digest) == BODY
    assert await registry.blobs.list_quarantine() == []
