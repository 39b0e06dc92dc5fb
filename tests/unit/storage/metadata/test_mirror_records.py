"""The records of a mirror about its upstreams."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from storage.composition import open_registry
from storage.content import OCI_MANIFEST, Actor, Allowance, CorruptionRecord, Manifest, UpstreamCheck, digest_of
from storage.metadata.sqlite import sqlite_upstream_records as kept
from storage.metadata.sqlite.database import connect
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry

UBUNTU, DEBIAN = RepositoryName("docker.io/library/ubuntu"), RepositoryName("docker.io/library/debian")
LATEST = Tag("latest")
BY = Actor(name="mirror")


class RecordsClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> RecordsClock:
    return RecordsClock()


@pytest.fixture
async def registry(data: Path, clock: RecordsClock) -> AsyncIterator[StoredRegistry]:
    async with open_registry(data, clock=clock) as opened:
        yield opened


def _manifest(layers: list[Digest], number: int = 0) -> Manifest:
    def part(digest: Digest) -> dict[str, object]:
        return {"mediaType": "application/tar", "digest": digest, "size": 5}

    document = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": part(digest_of(b"config")),
                "layers": [part(layer) for layer in layers], "annotations": {"number": str(number)}}  # fmt: skip
    return Manifest.parse(json.dumps(document).encode(), OCI_MANIFEST)


async def test_a_check_is_remembered_with_its_time_and_outcome(
    registry: StoredRegistry, data: Path, clock: RecordsClock
) -> None:
    """The last check at the upstream is stored with its time and outcome, for each tag, digest and repository. Other
    processes see it, and it survives a restart."""
    records = registry.records
    digest = digest_of(b"1")
    assert await records.last_check(UBUNTU, LATEST) is None
    await records.save_check(UBUNTU, LATEST, False)
    clock.now = 1001.5
    await records.save_check(UBUNTU, LATEST, True)
    await records.save_check(UBUNTU, digest, False)
    await records.save_check(DEBIAN, LATEST, False)
    async with open_registry(data) as other:
        assert await other.records.last_check(UBUNTU, LATEST) == UpstreamCheck(1001.5, True)
        assert await other.records.last_check(UBUNTU, digest) == UpstreamCheck(1001.5, False)
        assert await other.records.last_check(UBUNTU, Tag("1")) is None
        await other.records.forget_checks(UBUNTU, digest)
    assert await records.last_check(UBUNTU, digest) is None
    assert await records.last_check(UBUNTU, LATEST) is not None
    await records.forget_checks(UBUNTU)
    assert await records.last_check(UBUNTU, LATEST) is None
    assert await records.last_check(DEBIAN, LATEST) == UpstreamCheck(1001.5, False)


async def test_checks_of_blobs_and_manifests_are_separate(registry: StoredRegistry) -> None:
    """The same digest has separate checks as a blob and as a manifest. Both are deleted with the repository."""
    records, digest = registry.records, digest_of(b"1")
    await records.save_check(UBUNTU, digest, False, blob=True)
    assert await records.last_check(UBUNTU, digest) is None
    assert await records.last_check(UBUNTU, digest, blob=True) == UpstreamCheck(1000.0, False)
    await records.save_check(UBUNTU, digest, True)
    await records.forget_checks(UBUNTU, digest)
    assert await records.last_check(UBUNTU, digest, blob=True) == UpstreamCheck(1000.0, False)
    await records.forget_checks(UBUNTU, digest, blob=True)
    assert await records.last_check(UBUNTU, digest, blob=True) is None
    await records.save_check(UBUNTU, digest, False, blob=True)
    await records.forget_checks(UBUNTU)
    assert await records.last_check(UBUNTU, digest, blob=True) is None


async def test_a_check_does_not_make_a_repository_known(registry: StoredRegistry) -> None:
    """A check of a repository does not make its name known. A name is known once content was stored under it, and then
    for ever."""
    repo = RepositoryName("team/app")
    await registry.records.save_check(repo, LATEST, False)
    await registry.records.save_check(repo, LATEST, True)
    assert not await registry.is_known_repository(repo)
    manifest = _manifest([])
    await registry.put_manifest(repo, manifest, [LATEST], by=BY, sparse=True)
    assert await registry.is_known_repository(repo)
    await registry.delete_manifest(repo, manifest.digest, by=BY)
    assert await registry.is_known_repository(repo)


async def test_old_negative_checks_are_deleted(registry: StoredRegistry, data: Path, clock: RecordsClock) -> None:
    """Of too many negative checks, the oldest are deleted. Positive checks stay."""
    records = registry.records
    await records.save_check(UBUNTU, LATEST, True)
    db = apsw.Connection(str(data / "entrepot.db"))
    with db:
        db.executemany(
            "INSERT INTO upstream_check VALUES ('docker.io/library/ubuntu', ?, ?, 0)",
            ((f"t{number}", 500 + number / 1000) for number in range(kept.MAX_NOT_FOUND_CHECKS)),
        )
    for number in range(kept.CHECKS_PER_PRUNE + 1):
        clock.now += 1
        await records.save_check(UBUNTU, Tag(f"n{number}"), False)
    found = db.execute("SELECT count(*) FROM upstream_check WHERE known = 0").get
    db.close()
    assert found == kept.MAX_NOT_FOUND_CHECKS
    assert await records.last_check(UBUNTU, Tag("t0")) is None
    assert await records.last_check(UBUNTU, Tag(f"t{kept.MAX_NOT_FOUND_CHECKS - 1}")) is not None
    assert await records.last_check(UBUNTU, Tag("n0")) is not None
    assert await records.last_check(UBUNTU, LATEST) is not None


async def test_the_manifests_that_name_a_blob_are_found_newest_first(
    registry: StoredRegistry, clock: RecordsClock
) -> None:
    """The manifests of a repository that name the blob as config or layer are found, newest first, at most eight."""
    layer = digest_of(b"layer")
    manifests = [_manifest([layer], number) for number in range(10)]
    for manifest in manifests:
        clock.now += 1
        await registry.put_manifest(UBUNTU, manifest, by=BY, sparse=True)
    only = _manifest([digest_of(b"other")])
    await registry.put_manifest(UBUNTU, only, by=BY, sparse=True)
    records = registry.records
    assert await records.referring_manifests(UBUNTU, layer) == manifests[:1:-1]
    assert await records.referring_manifests(UBUNTU, digest_of(b"other")) == [only]
    assert only in await records.referring_manifests(UBUNTU, digest_of(b"config"))
    assert await records.referring_manifests(UBUNTU, digest_of(b"nothing")) == []
    assert await records.referring_manifests(DEBIAN, layer) == []


async def test_senders_of_wrong_bytes_are_recorded_for_a_while(
    registry: StoredRegistry, data: Path, clock: RecordsClock
) -> None:
    """For each endpoint, the number of corrupt responses is stored for all processes, until a time without a further
    one has passed. Old records are deleted. A record with a time in the future, after the clock was set back, counts as
    old."""
    records, digest, other = registry.records, digest_of(b"1"), digest_of(b"2")
    await records.save_bad_senders("docker.io", digest, ["https://one", "https://two"], 60)
    clock.now += 59
    await records.save_bad_senders("docker.io", digest, ["https://one"], 60)
    await records.save_bad_senders("ghcr.io", digest, ["https://three"], 60)
    async with open_registry(data, clock=clock) as there:
        assert await there.records.bad_senders("docker.io", digest, 60) == {
            "https://one": CorruptionRecord(2, 1059.0),
            "https://two": CorruptionRecord(1, 1000.0),
        }
    assert await records.bad_senders("docker.io", other, 60) == {}
    clock.now += 2
    assert await records.bad_senders("docker.io", digest, 60) == {"https://one": CorruptionRecord(2, 1059.0)}
    await records.save_bad_senders("docker.io", other, [], 60)
    clock.now -= 10
    assert await records.bad_senders("docker.io", digest, 60) == {}
    clock.now += 100
    await records.save_bad_senders("docker.io", other, ["https://one"], 60)
    db = apsw.Connection(str(data / "entrepot.db"))
    assert db.execute("SELECT digest, times FROM upstream_wrong").fetchall() == [(other, 1)]
    db.close()


async def test_a_token_is_kept_until_it_expires_or_is_refused(
    registry: StoredRegistry, data: Path, clock: RecordsClock
) -> None:
    """All processes share a token. If an older token is refused, a newer one stays. Expired tokens are deleted."""
    records = registry.records
    assert await records.token("docker.io pull ubuntu") is None
    await records.save_token("docker.io pull ubuntu", "old", 1300.0)
    await records.save_token("docker.io pull ubuntu", "new", 1400.0)
    await records.delete_token("docker.io pull ubuntu", "old")
    async with open_registry(data, clock=clock) as other:
        assert await other.records.token("docker.io pull ubuntu") == ("new", 1400.0)
    await records.save_token("docker.io pull debian", "refused", 1400.0)
    await records.delete_token("docker.io pull debian", "refused")
    assert await records.token("docker.io pull debian") is None
    clock.now = 1400.0
    assert await records.token("docker.io pull ubuntu") is None
    await records.save_token("ghcr.io", "another", 2000.0)
    db = apsw.Connection(str(data / "entrepot.db"))
    assert db.execute("SELECT key FROM upstream_token").fetchall() == [("ghcr.io",)]
    db.close()


async def test_an_allowance_is_the_newest_that_was_noted(registry: StoredRegistry, data: Path) -> None:
    """The newest allowance counts, whichever process has stored it. Unknown values stay unknown."""
    records = registry.records
    assert await records.allowance("docker.io") is None
    await records.save_allowance("docker.io", Allowance(10.0, 99, 100))
    await records.save_allowance("docker.io", Allowance(12.0, 97, 100, until=60.0))
    await records.save_allowance("docker.io", Allowance(11.0, 98, 100))
    await records.save_allowance("ghcr.io", Allowance(5.0))
    async with open_registry(data) as other:
        assert await other.records.allowance("docker.io") == Allowance(12.0, 97, 100, 60.0)
        assert await other.records.allowance("ghcr.io") == Allowance(5.0)


async def test_a_pause_is_never_made_shorter(registry: StoredRegistry, data: Path) -> None:
    """If an upstream has asked for a pause, a process that does not know of the pause cannot end it or make it shorter:
    the later end stays, whichever process stores its value last."""
    async with open_registry(data) as other:
        await registry.records.save_allowance("docker.io", Allowance(12.0, 5, 100, until=72.0))
        await other.records.save_allowance("docker.io", Allowance(13.0, 4, 100))
        assert await other.records.allowance("docker.io") == Allowance(13.0, 4, 100, 72.0)
        await other.records.save_allowance("docker.io", Allowance(11.0, 9, 100, until=90.0))
        assert await registry.records.allowance("docker.io") == Allowance(13.0, 4, 100, 90.0)


async def test_a_repository_is_confirmed_for_its_own_bytes(registry: StoredRegistry, data: Path) -> None:
    """A repository is confirmed for a blob whose bytes came for it, or that the upstream has said it has. The
    confirmation is deleted with the blob's link. A mount alone confirms nothing, and a blob without a link cannot be
    confirmed."""
    digest, records = digest_of(b"layer"), registry.records
    partial = await registry.partials.claim(digest, 5)
    partial.write_at(0, b"layer")
    await partial.commit(UBUNTU)
    partial.close()
    assert await records.is_confirmed(UBUNTU, digest)
    await records.confirm(DEBIAN, digest)
    assert not await records.is_confirmed(DEBIAN, digest)
    await registry.mount_blob(DEBIAN, digest, UBUNTU, BY)
    assert not await records.is_confirmed(DEBIAN, digest)
    await records.confirm(DEBIAN, digest)
    async with open_registry(data) as other:
        assert await other.records.is_confirmed(DEBIAN, digest)
    await registry.mount_blob(DEBIAN, digest, UBUNTU, BY)
    assert await records.is_confirmed(DEBIAN, digest)
    await registry.delete_blob(DEBIAN, digest, by=BY)
    await registry.mount_blob(DEBIAN, digest, UBUNTU, BY)
    assert not await records.is_confirmed(DEBIAN, digest)


async def test_of_many_large_manifests_few_are_read(registry: StoredRegistry, data: Path) -> None:
    """If many large manifests of a repository name a blob, only few of their bodies are read, because the event loop
    waits for this."""
    layer = digest_of(b"layer")
    db = connect(data / "entrepot.db")
    with closing(db), db:
        repository = db.execute(
            "INSERT INTO repository (name, created, manifests) VALUES (?, 0, 1) RETURNING id", (UBUNTU,)
        ).get
        for number in range(500):
            manifest = db.execute(
                "INSERT INTO manifest (repository, digest, media_type, size, pushed, body) "
                "VALUES (?, ?, '', ?, ?, zeroblob(?)) RETURNING id",
                (repository, f"sha256:{number:064}", 200_000, number, 200_000),
            ).get
            db.execute(
                "INSERT INTO manifest_blob (repository, digest, manifest) VALUES (?, ?, ?)",
                (repository, layer, manifest),
            )
    before = bytes_read()
    assert await registry.records.referring_manifests(UBUNTU, layer) == []
    assert bytes_read() - before < 4_000_000


def bytes_read() -> int:
    """Returns the number of bytes that this process has read since it started."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])
