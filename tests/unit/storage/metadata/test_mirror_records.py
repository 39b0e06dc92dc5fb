"""The records that a mirror keeps about its upstreams: its last checks, endpoints that sent corrupt bytes, tokens, rate
limits, and which repositories have which blobs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

from storage.composition import open_registry
from storage.content import OCI_MANIFEST, Actor, Allowance, CorruptionRecord, Manifest, UpstreamCheck, digest_of
from storage.metadata.sqlite import sqlite_upstream_records
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.sqlite_upstream_records import MAX_TOKENS
from storage.names import Digest, RepositoryName, Tag
from storage.store.stored_registry import StoredRegistry
from tests.fakes.second_connection import second_connection

UBUNTU, DEBIAN = RepositoryName("docker.io/library/ubuntu"), RepositoryName("docker.io/library/debian")
LATEST = Tag("latest")
BY = Actor(name="mirror")


class RecordsClock:
    """A clock that stands still until a test moves it."""

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


async def test_a_check_is_stored_with_its_time_and_outcome(
    registry: StoredRegistry, data: Path, clock: RecordsClock
) -> None:
    """The last check of each tag and digest at the upstream is stored with its time and outcome. Other processes see
    the record."""
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


async def test_checks_of_blobs_and_of_manifests_are_separate(registry: StoredRegistry) -> None:
    """The check of a digest as a blob and the check of the same digest as a manifest are separate records. If all
    checks of a repository are deleted, both records are deleted."""
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
    """A repository becomes known when content is stored in it, not when it is checked at the upstream. It stays known
    after its content is deleted."""
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
    """If there are too many negative checks (content that the upstream does not have), the oldest are deleted. Positive
    checks stay."""
    records = registry.records
    await records.save_check(UBUNTU, LATEST, True)
    db = second_connection(data / "entrepot.db")
    with db:
        db.executemany(
            "INSERT INTO upstream_check VALUES ('docker.io/library/ubuntu', ?, ?, 0)",
            ((f"t{number}", 500 + number / 1000) for number in range(sqlite_upstream_records.MAX_NOT_FOUND_CHECKS)),
        )
    for number in range(sqlite_upstream_records.CHECKS_PER_PRUNE + 1):
        clock.now += 1
        await records.save_check(UBUNTU, Tag(f"n{number}"), False)
    negative_checks = db.execute("SELECT count(*) FROM upstream_check WHERE known = 0").get
    db.close()
    assert negative_checks == sqlite_upstream_records.MAX_NOT_FOUND_CHECKS
    assert await records.last_check(UBUNTU, Tag("t0")) is None
    assert await records.last_check(UBUNTU, Tag(f"t{sqlite_upstream_records.MAX_NOT_FOUND_CHECKS - 1}")) is not None
    assert await records.last_check(UBUNTU, Tag("n0")) is not None
    assert await records.last_check(UBUNTU, LATEST) is not None


async def test_manifests_that_name_a_blob_are_found_newest_first(registry: StoredRegistry, clock: RecordsClock) -> None:
    """The manifests of a repository that name a blob as config or layer are found. The result has at most the eight
    newest of them, newest first."""
    layer = digest_of(b"layer")
    manifests = [_manifest([layer], number) for number in range(10)]
    for manifest in manifests:
        clock.now += 1
        await registry.put_manifest(UBUNTU, manifest, by=BY, sparse=True)
    other_manifest = _manifest([digest_of(b"other")])
    await registry.put_manifest(UBUNTU, other_manifest, by=BY, sparse=True)
    records = registry.records
    assert await records.referring_manifests(UBUNTU, layer) == manifests[:1:-1]  # all but the two oldest
    assert await records.referring_manifests(UBUNTU, digest_of(b"other")) == [other_manifest]
    assert other_manifest in await records.referring_manifests(UBUNTU, digest_of(b"config"))
    assert await records.referring_manifests(UBUNTU, digest_of(b"nothing")) == []
    assert await records.referring_manifests(DEBIAN, layer) == []


async def test_senders_of_corrupt_bytes_are_recorded_for_a_while(
    registry: StoredRegistry, data: Path, clock: RecordsClock
) -> None:
    """The number of corrupt responses of each endpoint is stored for all processes. The record is valid for some
    seconds after the last corrupt response, and is deleted after that. If the clock is set back, so that the record is
    in the future, it is no longer valid."""
    records, digest, other_digest = registry.records, digest_of(b"1"), digest_of(b"2")
    await records.save_bad_senders("docker.io", digest, ["https://one", "https://two"], 60)
    clock.now += 59
    await records.save_bad_senders("docker.io", digest, ["https://one"], 60)
    await records.save_bad_senders("ghcr.io", digest, ["https://three"], 60)
    async with open_registry(data, clock=clock) as other_process:
        assert await other_process.records.bad_senders("docker.io", digest, 60) == {
            "https://one": CorruptionRecord(2, 1059.0),
            "https://two": CorruptionRecord(1, 1000.0),
        }
    assert await records.bad_senders("docker.io", other_digest, 60) == {}
    clock.now += 2
    assert await records.bad_senders("docker.io", digest, 60) == {"https://one": CorruptionRecord(2, 1059.0)}
    await records.save_bad_senders("docker.io", other_digest, [], 60)
    clock.now -= 10
    assert await records.bad_senders("docker.io", digest, 60) == {}
    clock.now += 100
    await records.save_bad_senders("docker.io", other_digest, ["https://one"], 60)
    db = second_connection(data / "entrepot.db")
    assert db.execute("SELECT digest, times FROM upstream_wrong").fetchall() == [(other_digest, 1)]
    db.close()


async def test_a_token_is_stored_until_it_expires_or_is_refused(
    registry: StoredRegistry, data: Path, clock: RecordsClock
) -> None:
    """All processes use the same token for an upstream. When an upstream refuses a token, only this token is deleted,
    and a newer token stays. Expired tokens are deleted."""
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
    db = second_connection(data / "entrepot.db")
    assert db.execute("SELECT key FROM upstream_token").fetchall() == [("ghcr.io",)]
    db.close()


@pytest.mark.slow
async def test_number_of_tokens_is_limited(registry: StoredRegistry, data: Path) -> None:
    """A token service may issue a token for each name that a client requests, and never let it expire. When there are
    too many tokens, those that expire first are deleted, but never the token that was stored last."""
    for number in range(MAX_TOKENS + 20):
        await registry.records.save_token(f"docker.io pull {number}", "token", 1_000_000.0 + number)
    await registry.records.save_token("docker.io pull ubuntu", "token", 500_000.0)
    db = second_connection(data / "entrepot.db")
    keys = {key for (key,) in db.execute("SELECT key FROM upstream_token")}
    db.close()
    assert keys == {f"docker.io pull {number}" for number in range(21, MAX_TOKENS + 20)} | {"docker.io pull ubuntu"}


async def test_the_newest_allowance_counts(registry: StoredRegistry, data: Path) -> None:
    """An allowance states how many requests an upstream still allows. The newest allowance counts, whichever process
    stored it and in whatever order. Unknown values stay unknown."""
    records = registry.records
    assert await records.allowance("docker.io") is None
    await records.save_allowance("docker.io", Allowance(10.0, 99, 100))
    await records.save_allowance("docker.io", Allowance(12.0, 97, 100, until=60.0))
    await records.save_allowance("docker.io", Allowance(11.0, 98, 100))
    await records.save_allowance("ghcr.io", Allowance(5.0))
    async with open_registry(data) as other:
        assert await other.records.allowance("docker.io") == Allowance(12.0, 97, 100, 60.0)
        assert await other.records.allowance("ghcr.io") == Allowance(5.0)


async def test_a_requested_pause_is_never_shortened(registry: StoredRegistry, data: Path) -> None:
    """An upstream has requested a pause. If a process that does not know about the pause stores an allowance, the pause
    does not end earlier: the latest end of all stored allowances counts."""
    async with open_registry(data) as other:
        await registry.records.save_allowance("docker.io", Allowance(12.0, 5, 100, until=72.0))
        await other.records.save_allowance("docker.io", Allowance(13.0, 4, 100))
        assert await other.records.allowance("docker.io") == Allowance(13.0, 4, 100, 72.0)
        await other.records.save_allowance("docker.io", Allowance(11.0, 9, 100, until=90.0))
        assert await registry.records.allowance("docker.io") == Allowance(13.0, 4, 100, 90.0)


async def test_not_found_checks_from_the_future_do_not_displace_others(
    registry: StoredRegistry, clock: RecordsClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many "not found" checks were stored while the clock was ahead. After the clock is set right, they are not taken
    for the newest ones, so a new check is kept."""
    monkeypatch.setattr(sqlite_upstream_records, "MAX_NOT_FOUND_CHECKS", 2)
    monkeypatch.setattr(sqlite_upstream_records, "CHECKS_PER_PRUNE", 1)
    right_time = clock.now
    clock.now += 86_400
    for tag in "abc":
        clock.now += 1
        await registry.records.save_check(UBUNTU, Tag(tag), found=False)
    clock.now = right_time
    await registry.records.save_check(UBUNTU, Tag("d"), found=False)
    assert await registry.records.last_check(UBUNTU, Tag("d")) == UpstreamCheck(right_time, found=False)


async def test_allowance_from_the_future_is_replaced(registry: StoredRegistry, clock: RecordsClock) -> None:
    """An allowance was stored while the clock was ahead. After the clock is set right, newer numbers and pauses replace
    those from the future. A stored pause of at most an hour is still not shortened."""
    records, right_time = registry.records, clock.now
    clock.now = right_time + 86_400
    await records.save_allowance("docker.io", Allowance(clock.now, 99, 100, until=clock.now + 60))
    clock.now = right_time
    await records.save_allowance("docker.io", Allowance(clock.now, 2, 100, until=clock.now + 30))
    assert await records.allowance("docker.io") == Allowance(right_time, 2, 100, right_time + 30)
    await records.save_allowance("docker.io", Allowance(clock.now, 1, 100, until=clock.now + 3600))
    await records.save_allowance("docker.io", Allowance(clock.now, 0, 100))
    assert await records.allowance("docker.io") == Allowance(right_time, 0, 100, right_time + 3600)


async def test_which_blobs_are_confirmed_for_a_repository(registry: StoredRegistry, data: Path) -> None:
    """A blob is confirmed for a repository if its bytes were downloaded for this repository, or if the upstream has
    stated that the repository has the blob. The confirmation is deleted with the repository's link to the blob. A mount
    does not confirm a blob, and a blob without a link cannot be confirmed."""
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


@pytest.mark.slow
async def test_few_of_many_large_manifests_are_read(registry: StoredRegistry, data: Path) -> None:
    """If many large manifests of a repository name a blob, only few of their bodies are read, because the event loop
    waits for these reads."""
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
    bytes_before = bytes_read()
    assert await registry.records.referring_manifests(UBUNTU, layer) == []
    assert bytes_read() - bytes_before < 4_000_000


def bytes_read() -> int:
    """Returns the number of bytes that this process has read since it started."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])
