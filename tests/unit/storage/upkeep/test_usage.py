"""The counts of the blobs, bytes and tags that repositories use, and quotas for them, in a real database. A *usage
scope* is a set of repositories that are counted together."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from storage.composition import layout_of, open_registry, prepare_data_dir
from storage.content import digest_of
from storage.data_dir.locks import Flock
from storage.errors import Denied, QuotaExceeded
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.upkeep import usage_tables
from storage.names import RepositoryName, Tag
from storage.patterns import ALL_NAMES, NameSet
from storage.store.stored_registry import StoredRegistry
from storage.usage import ScopeDefinition
from tests.fakes.registry_content import BY, CONFIG_TYPE, descriptor_of, image_of, push_blob

TEAM = ScopeDefinition("quota team/", ("team/",))
MIRROR = ScopeDefinition("cache hub", ("hub/",), upstream="hub")
HOSTED = ScopeDefinition("quota ", ("",), excluded=("hub/",))
ALL_SCOPES = (TEAM, MIRROR, HOSTED)
NAMES = [RepositoryName(name) for name in ("team/a", "team/b", "team", "teams/a", "hub/a", "other")]
"""Only the first two repositories are in the scope `TEAM`."""


class StillClock:
    """A clock that stands still until a test moves it."""

    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path, grace=10.0, clock=StillClock()) as opened:
        yield opened


async def count_all(store: StoredRegistry) -> None:
    while await store.usage.count_batch():
        pass


async def assert_exact(store: StoredRegistry) -> None:
    """Checks that every scope is complete, and that its counts equal a recount."""
    for usage in await store.usage.scopes():
        assert usage.is_complete
        assert usage == await store.usage.recount(usage.definition.name)


async def change_at_random(store: StoredRegistry, rng: random.Random) -> None:
    """Makes one random change to the content of the store. Many of these changes fail, for example because the content
    to delete does not exist."""
    repo, data = rng.choice(NAMES), bytes([rng.randrange(8)]) * rng.randrange(1, 4)
    other, tag = rng.choice(NAMES), Tag(f"t{rng.randrange(4)}")
    source: RepositoryName | NameSet = other if rng.random() < 0.5 else ALL_NAMES
    digest = digest_of(data)
    image = image_of(descriptor_of(data, CONFIG_TYPE))
    changes: dict[str, Callable[[], Awaitable[object]]] = {
        "push": lambda: push_blob(store, repo, data),
        "mount": lambda: store.mount_blob(repo, digest, source, BY),
        "adopt": lambda: store.metadata.add_blob_without_upload(repo, digest, len(data), "place"),
        "put": lambda: store.put_manifest(repo, image, [tag], by=BY),
        "put sparse": lambda: store.put_manifest(repo, image, [tag, Tag("also")], by=BY, sparse=True),
        "delete blob": lambda: store.delete_blob(repo, digest, by=BY, even_if_referenced=True),
        "delete manifest": lambda: store.delete_manifest(repo, image.digest, by=BY),
        "delete tag": lambda: store.delete_tag(repo, tag, by=BY),
        "collect": lambda: collect_later(store, rng.choice([0.0, 5.0, 20.0])),
    }
    try:
        await changes[rng.choice(list(changes))]()
    except Exception as error:
        if not hasattr(error, "code"):
            raise


async def collect_later(store: StoredRegistry, seconds: float) -> None:
    clock = store.collector._clock
    assert isinstance(clock, StillClock)
    clock.now += seconds
    await store.collector.collect()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.slow
async def test_counts_equal_a_recount_after_any_changes(store: StoredRegistry, seed: int) -> None:
    """After random pushes, mounts, changes of tags, deletes and garbage collections, the counts equal a recount."""
    rng = random.Random(seed)
    await store.usage.configure(ALL_SCOPES)
    await count_all(store)
    for _ in range(120):
        await change_at_random(store, rng)
    await assert_exact(store)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.slow
async def test_a_changing_store_is_counted_exactly(
    store: StoredRegistry, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store is counted in batches, while its content changes and while usage scopes are added, changed and removed.
    After the last batch, the counts equal a recount."""
    monkeypatch.setattr(usage_tables, "BATCH_ROWS", 2)
    monkeypatch.setattr(usage_tables, "_REPOSITORIES_PER_BATCH", 1)
    rng = random.Random(seed)
    for _ in range(60):
        await change_at_random(store, rng)
    definitions = [ALL_SCOPES, ALL_SCOPES, ALL_SCOPES[:1], (MIRROR, ScopeDefinition("quota team/", ("team/", "other")))]
    for _ in range(120):
        await change_at_random(store, rng)
        if rng.random() < 0.05:
            await store.usage.configure(rng.choice(definitions))
        if rng.random() < 0.6:
            await store.usage.count_batch()
    await store.usage.configure(ALL_SCOPES)
    await count_all(store)
    assert [usage.definition for usage in await store.usage.scopes()] == sorted(
        ALL_SCOPES, key=lambda scope: scope.name
    )
    await assert_exact(store)


async def test_another_process_continues_the_count(
    store: StoredRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a process ends while it counts, another process continues the count and counts nothing twice."""
    monkeypatch.setattr(usage_tables, "BATCH_ROWS", 2)
    for number in range(7):
        await push_blob(store, NAMES[0], bytes([number]))
    await store.usage.configure(ALL_SCOPES)
    for _ in range(4):
        assert await store.usage.count_batch()
    async with open_registry(tmp_path) as second_store:
        await second_store.usage.configure(ALL_SCOPES)
        await count_all(second_store)
        await assert_exact(second_store)
        usage = await second_store.usage.scope(TEAM.name)
        assert usage is not None
        assert (usage.blobs, usage.bytes) == (7, 7)


async def set_quota(store: StoredRegistry, *, size: int | None = None, tags: int | None = None) -> None:
    await store.usage.configure([ScopeDefinition("quota team/", ("team/",), max_bytes=size, max_tags=tags)])
    await count_all(store)


async def test_a_blob_that_does_not_fit_is_refused(store: StoredRegistry) -> None:
    """A blob that would exceed a quota is refused. The error names the quota, the usage and the blob's size. No row,
    link, file or upload session of the blob stays."""
    await set_quota(store, size=2500)
    await push_blob(store, NAMES[0], b"a" * 2048)
    blob = b"b" * 1024
    with pytest.raises(QuotaExceeded, match=r"team/ may hold 2.4 KiB and holds 2 KiB; this blob of 1 KiB does not"):
        await push_blob(store, NAMES[1], blob)
    assert await store.metadata.known_blobs([digest_of(blob)]) == set()
    shards = [await store.blobs.list_shard(shard) for shard in range(store.blobs.shard_count)]
    assert [digest for shard in shards for digest, *_ in shard] == [digest_of(b"a" * 2048)]
    assert await store.blobs.list_uploads() == []
    assert await store.metadata.stale_uploads(2e9, 10) == []
    await assert_exact(store)


@pytest.mark.parametrize("size", [2**63 - 1, 2**63, 10**20])
async def test_a_stated_size_beyond_any_blob_does_not_fit(store: StoredRegistry, size: int) -> None:
    """A client may state a size that exceeds the integers of the database, by itself or when the offset of a chunk is
    added to it. The check of the quota refuses it like any other size that does not fit."""
    await set_quota(store, size=2500)
    await push_blob(store, NAMES[0], b"a" * 100)
    with pytest.raises(QuotaExceeded, match="does not fit"):
        await store.usage.check_quota(NAMES[1], size, None)
    await store.usage.check_quota(NAMES[2], size, None)


async def test_a_blob_that_the_scope_has_already_is_not_refused(store: StoredRegistry) -> None:
    """A blob that a usage scope has already can be added to further repositories of the scope, even if the quota is
    used up or was lowered below the usage."""
    await set_quota(store, size=100)
    blob = await push_blob(store, NAMES[0], b"a" * 100)
    await push_blob(store, NAMES[1], b"a" * 100)
    await set_quota(store, size=10)
    await push_blob(store, NAMES[0], b"a" * 100)
    await store.mount_blob(RepositoryName("team/new"), blob.digest, NAMES[0], BY)
    await store.usage.check_quota(NAMES[0], 100, blob.digest)
    with pytest.raises(QuotaExceeded):
        await store.usage.check_quota(RepositoryName("team/never"), 1, None)
    await store.usage.check_quota(NAMES[2], 1000, None)
    await push_blob(store, NAMES[3], b"b" * 1000)
    await assert_exact(store)


async def test_mounts_and_new_tags_count_for_the_quota(store: StoredRegistry) -> None:
    """A mount from a repository outside the scope counts for the quota, and so does a new tag. A move of an existing
    tag does not count."""
    await set_quota(store, size=100, tags=1)
    config = await push_blob(store, NAMES[3], b"c" * 101)
    with pytest.raises(Denied, match="team/ may hold 100 bytes"):
        await store.mount_blob(NAMES[0], config.digest, NAMES[3], BY)
    small = await push_blob(store, NAMES[0], b"{}")
    image = image_of(descriptor_of(b"{}", CONFIG_TYPE))
    other = image_of(descriptor_of(b"{}", CONFIG_TYPE), annotations={"other": "one"})
    assert small.digest == image.blobs[0].digest
    await store.put_manifest(NAMES[0], image, [Tag("one")], by=BY)
    await store.put_manifest(NAMES[0], other, [Tag("one")], by=BY)
    with pytest.raises(QuotaExceeded, match="team/ may have 1 tags and has 1; delete tags"):
        await store.put_manifest(NAMES[0], image, [Tag("two")], by=BY)
    assert list((await store.tags(NAMES[0], None, 10)).items) == ["one"]
    await store.delete_tag(NAMES[0], Tag("one"), by=BY)
    await store.put_manifest(NAMES[0], image, [Tag("two")], by=BY)
    await assert_exact(store)


class RecordedCommits:
    """Records the number of changes in each transaction."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_queued(self, change: asyncio.Future[Any]) -> None:
        pass

    def on_commit(self, change_count: int, wait_seconds: float, commit_seconds: float) -> None:
        self.sizes.append(change_count)


async def test_other_changes_of_a_transaction_succeed(tmp_path: Path) -> None:
    """If a quota refuses a change, the other changes of the same transaction succeed."""
    prepare_data_dir(tmp_path)
    commits, lock_file = RecordedCommits(), layout_of(tmp_path).metadata_lock
    async with open_registry(tmp_path, commit_observer=commits) as store:
        await set_quota(store, size=10)
        commits.sizes.clear()
        with lock_file.open() as lock, Flock(lock.fileno()):  # no transaction begins until all changes are queued
            changes = [
                asyncio.create_task(store.metadata.add_blob_without_upload(repo, digest_of(bytes([index])), 6, "place"))
                for index, repo in enumerate([NAMES[0], NAMES[3]] * 10)
            ]
            await asyncio.sleep(0)  # each task queues its change
        results = await asyncio.gather(*changes, return_exceptions=True)
        # The first transaction has the changes that were queued when it began to wait, the second one all others.
        assert (sum(commits.sizes), len(commits.sizes)) in ((20, 1), (20, 2))
        # Only one of the ten blobs of team/a fits into the quota. All blobs of teams/a are added.
        assert [type(result) for result in results[0::2]] == [type(None), *[QuotaExceeded] * 9]
        assert results[1::2] == [None] * 10
        assert [(await store.resolve_blob(NAMES[3], digest_of(bytes([index])))).size for index in range(1, 20, 2)] == [
            6
        ] * 10
        await assert_exact(store)


async def test_a_refused_statement_is_undone(store: StoredRegistry, tmp_path: Path) -> None:
    """If a quota's trigger refuses a statement, all changes of this statement are undone, including those to the counts
    of other scopes. The transaction can continue."""
    config = await push_blob(store, NAMES[0], b"{}")
    await store.put_manifest(NAMES[0], image_of(descriptor_of(b"{}", CONFIG_TYPE)), [Tag("one")], by=BY)
    await push_blob(store, NAMES[5], b"a" * 100)
    await store.usage.configure([HOSTED, ScopeDefinition(TEAM.name, TEAM.prefixes, max_bytes=100, max_tags=1)])
    await count_all(store)
    with closing(connect(tmp_path / "entrepot.db")) as db:
        count_queries = "SELECT * FROM usage_scope ORDER BY id", "SELECT * FROM usage_blob ORDER BY scope, blob"
        counts_before = [db.execute(sql).fetchall() for sql in count_queries]
        repository, manifest = db.execute("SELECT repository, id FROM manifest").fetchall()[0]
        large = db.execute("SELECT id FROM blob WHERE digest != ?", (config.digest,)).get
        db.execute("BEGIN")
        with pytest.raises(apsw.ConstraintError, match="a quota is exceeded"):
            db.execute("INSERT INTO tag VALUES (?, 'two', ?, 0)", (repository, manifest))
        with pytest.raises(apsw.ConstraintError, match="a quota is exceeded"):
            db.execute("INSERT INTO blob_link VALUES (?, ?, 0, 1)", (repository, large))
        assert [db.execute(sql).fetchall() for sql in count_queries] == counts_before
        db.execute("COMMIT")
    await assert_exact(store)


async def test_a_quota_is_not_enforced_before_its_scope_is_counted(store: StoredRegistry) -> None:
    """Until all content of a usage scope is counted, its quota does not refuse pushes."""
    await store.usage.configure([ScopeDefinition("quota team/", ("team/",), max_bytes=1)])
    await push_blob(store, NAMES[0], b"12")
    usage = await store.usage.scope("quota team/")
    assert usage is not None
    assert not usage.is_complete
    await count_all(store)
    with pytest.raises(QuotaExceeded):
        await push_blob(store, NAMES[0], b"3")
