"""The counts of what repositories use, and the quotas, in a real database. A usage scope is a set of repositories that
are counted together."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.content import digest_of
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
ALL = (TEAM, MIRROR, HOSTED)
NAMES = [RepositoryName(name) for name in ("team/a", "team/b", "team", "teams/a", "hub/a", "other")]


class Time:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path, grace=10.0, clock=Time()) as opened:
        yield opened


async def count_all(store: StoredRegistry) -> None:
    while await store.usage.count_batch():
        pass


async def assert_exact(store: StoredRegistry) -> None:
    """Checks that every scope is complete, and that its counts equal a recount."""
    for use in await store.usage.scopes():
        assert use.is_complete
        assert use == await store.usage.recount(use.definition.name)


async def change_at_random(store: StoredRegistry, choice: random.Random) -> None:
    """Makes one change of any kind. Many of these changes find nothing to change."""
    repo, data = choice.choice(NAMES), bytes([choice.randrange(8)]) * choice.randrange(1, 4)
    other, tag = choice.choice(NAMES), Tag(f"t{choice.randrange(4)}")
    source: RepositoryName | NameSet = other if choice.random() < 0.5 else ALL_NAMES
    digest = digest_of(data)
    image = image_of(descriptor_of(data, CONFIG_TYPE))
    changes: dict[str, Callable[[], Awaitable[object]]] = {
        "push": lambda: push_blob(store, repo, data),
        "mount": lambda: store.mount_blob(repo, digest, source, BY),
        "adopt": lambda: store.metadata.adopt_blob(repo, digest, len(data), "place"),
        "put": lambda: store.put_manifest(repo, image, [tag], by=BY),
        "put sparse": lambda: store.put_manifest(repo, image, [tag, Tag("also")], by=BY, sparse=True),
        "delete blob": lambda: store.delete_blob(repo, digest, by=BY, even_if_referenced=True),
        "delete manifest": lambda: store.delete_manifest(repo, image.digest, by=BY),
        "delete tag": lambda: store.delete_tag(repo, tag, by=BY),
        "collect": lambda: collect_later(store, choice.choice([0.0, 5.0, 20.0])),
    }
    try:
        await changes[choice.choice(list(changes))]()
    except Exception as error:
        if not hasattr(error, "code"):
            raise


async def collect_later(store: StoredRegistry, seconds: float) -> None:
    clock = store.collector._clock
    assert isinstance(clock, Time)
    clock.now += seconds
    await store.collector.collect()


@pytest.mark.parametrize("seed", range(2))
async def test_counts_equal_a_recount_after_any_changes(store: StoredRegistry, seed: int) -> None:
    """The counts are right after any pushes, mounts, tags, deletes and collections."""
    choice = random.Random(seed)
    await store.usage.configure(ALL)
    await count_all(store)
    for _ in range(120):
        await change_at_random(store, choice)
    await assert_exact(store)


@pytest.mark.parametrize("seed", range(2))
async def test_a_store_is_counted_while_it_changes(
    store: StoredRegistry, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts of scopes that are defined, changed and removed become exact while content changes."""
    monkeypatch.setattr(usage_tables, "BATCH_ROWS", 2)
    monkeypatch.setattr(usage_tables, "_REPOSITORIES_PER_BATCH", 1)
    choice = random.Random(seed)
    for _ in range(60):
        await change_at_random(store, choice)
    definitions = [ALL, ALL, ALL[:1], (MIRROR, ScopeDefinition("quota team/", ("team/", "other")))]
    for _ in range(120):
        await change_at_random(store, choice)
        if choice.random() < 0.05:
            await store.usage.configure(choice.choice(definitions))
        if choice.random() < 0.6:
            await store.usage.count_batch()
    await store.usage.configure(ALL)
    await count_all(store)
    assert [use.definition for use in await store.usage.scopes()] == sorted(ALL, key=lambda scope: scope.name)
    await assert_exact(store)


async def test_counting_goes_on_in_another_process(
    store: StoredRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that continues the count of a dead process counts nothing twice."""
    monkeypatch.setattr(usage_tables, "BATCH_ROWS", 2)
    for number in range(7):
        await push_blob(store, NAMES[0], bytes([number]))
    await store.usage.configure(ALL)
    for _ in range(4):
        assert await store.usage.count_batch()
    async with open_registry(tmp_path) as second:
        await second.usage.configure(ALL)
        await count_all(second)
        await assert_exact(second)
        use = await second.usage.scope(TEAM.name)
        assert use is not None
        assert (use.blobs, use.bytes) == (7, 7)


async def quota_of(store: StoredRegistry, *, size: int | None = None, tags: int | None = None) -> None:
    await store.usage.configure([ScopeDefinition("quota team/", ("team/",), max_bytes=size, max_tags=tags)])
    await count_all(store)


async def test_a_blob_that_does_not_fit_is_refused(store: StoredRegistry) -> None:
    """A blob that exceeds a quota is refused with a text that has the numbers. No row, no link, no bytes and no upload
    session of it stay."""
    await quota_of(store, size=2500)
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


async def test_a_blob_that_the_scope_has_costs_nothing(store: StoredRegistry) -> None:
    """A blob that the scope has already can be added to another repository, even if the quota is used up or was lowered
    below the use."""
    await quota_of(store, size=100)
    blob = await push_blob(store, NAMES[0], b"a" * 100)
    await push_blob(store, NAMES[1], b"a" * 100)
    await quota_of(store, size=10)
    await push_blob(store, NAMES[0], b"a" * 100)
    await store.mount_blob(RepositoryName("team/new"), blob.digest, NAMES[0], BY)
    await store.usage.check_room(NAMES[0], 100, blob.digest)
    with pytest.raises(QuotaExceeded):
        await store.usage.check_room(RepositoryName("team/never"), 1, None)
    await store.usage.check_room(NAMES[2], 1000, None)
    await push_blob(store, NAMES[3], b"b" * 1000)
    await assert_exact(store)


async def test_mounts_and_tags_count(store: StoredRegistry) -> None:
    """A mount from outside the scope, and a new tag, count. A move of an existing tag does not."""
    await quota_of(store, size=100, tags=1)
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


async def test_other_changes_of_the_transaction_are_kept(store: StoredRegistry) -> None:
    """Changes that share a transaction with a refused one succeed."""
    await quota_of(store, size=10)
    pushes = [push_blob(store, NAMES[index % 2 * 3], bytes([index]) * 6) for index in range(20)]
    results = await asyncio.gather(*pushes, return_exceptions=True)
    assert sum(isinstance(result, QuotaExceeded) for result in results) == 9  # 10 to team/, of which one fits
    assert not [result for result in results if isinstance(result, Exception) and not isinstance(result, QuotaExceeded)]
    await assert_exact(store)


async def test_a_refused_statement_leaves_nothing(store: StoredRegistry, tmp_path: Path) -> None:
    """A trigger that refuses a statement undoes what the statement has changed, and the transaction can continue. The
    counts of a scope that was not exceeded are changed before those of the scope that is."""
    config = await push_blob(store, NAMES[0], b"{}")
    await store.put_manifest(NAMES[0], image_of(descriptor_of(b"{}", CONFIG_TYPE)), [Tag("one")], by=BY)
    await push_blob(store, NAMES[5], b"a" * 100)
    await store.usage.configure([HOSTED, ScopeDefinition(TEAM.name, TEAM.prefixes, max_bytes=100, max_tags=1)])
    await count_all(store)
    with closing(connect(tmp_path / "entrepot.db")) as db:
        counts = "SELECT * FROM usage_scope ORDER BY id", "SELECT * FROM usage_blob ORDER BY scope, blob"
        before = [db.execute(sql).fetchall() for sql in counts]
        repository, manifest = db.execute("SELECT repository, id FROM manifest").fetchall()[0]
        large = db.execute("SELECT id FROM blob WHERE digest != ?", (config.digest,)).get
        db.execute("BEGIN")
        with pytest.raises(apsw.ConstraintError, match="a quota is exceeded"):
            db.execute("INSERT INTO tag VALUES (?, 'two', ?, 0)", (repository, manifest))
        with pytest.raises(apsw.ConstraintError, match="a quota is exceeded"):
            db.execute("INSERT INTO blob_link VALUES (?, ?, 0, 1)", (repository, large))
        assert [db.execute(sql).fetchall() for sql in counts] == before
        db.execute("COMMIT")
    await assert_exact(store)


async def test_a_quota_is_not_enforced_before_its_scope_is_counted(store: StoredRegistry) -> None:
    await store.usage.configure([ScopeDefinition("quota team/", ("team/",), max_bytes=1)])
    await push_blob(store, NAMES[0], b"12")
    use = await store.usage.scope("quota team/")
    assert use is not None
    assert not use.is_complete
    await count_all(store)
    with pytest.raises(QuotaExceeded):
        await push_blob(store, NAMES[0], b"3")
