"""The audit log: one list of the entries in its own table and of the entries in the tag history."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import apsw
import pytest

from storage.access import AccountInvalid, AuditEntry, AuditQuery
from storage.composition import open_registry, prepare_data_dir
from storage.content import Actor, Manifest
from storage.metadata.sqlite.access import audit_table
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.manifest_and_tag_changes import put_manifest
from storage.names import RepositoryName, Tag
from storage.patterns import ALL_NAMES
from storage.store.stored_registry import StoredRegistry
from tests.fakes.registry_content import image_of, push_blob
from tests.fakes.second_connection import second_connection
from tests.unit.storage.metadata.account_views import AccountsClock

ALICE, BOB = Actor("alice", "192.0.2.1", "r1", "docker/28"), Actor("bob", "192.0.2.2", "r2", "crane")
APP, WEB = RepositoryName("team/app"), RepositoryName("team/web")


@pytest.fixture
def clock() -> AccountsClock:
    return AccountsClock()


@pytest.fixture
async def registry(data: Path, clock: AccountsClock) -> AsyncIterator[StoredRegistry]:
    async with open_registry(data, clock=clock) as opened:
        yield opened


async def _image(registry: StoredRegistry, seed: bytes) -> Manifest:
    """Returns an image whose blobs are in APP. Its manifest is not stored yet."""
    return image_of(await push_blob(registry, APP, b"config of " + seed), [await push_blob(registry, APP, seed)])


def entries(registry: StoredRegistry, **query: object) -> list[AuditEntry]:
    return list(registry.accounts.audit(AuditQuery(**query), 1000).items)  # type: ignore[arg-type]


def entry_texts(registry: StoredRegistry, **query: object) -> list[str]:
    """Returns actor, action and target of the entries that match, newest first."""
    return [f"{entry.actor} {entry.action} {entry.target}" for entry in entries(registry, **query)]


async def test_each_change_of_content_has_an_entry(registry: StoredRegistry, clock: AccountsClock) -> None:
    """Each push of a manifest or tag, each mount and each delete has an entry with its author and the author's address.
    A request that changes nothing or is refused has no entry. A manifest that is pushed with tags has no entry of its
    own: the entries of its tags have its digest."""
    untagged, tagged = await _image(registry, b"one"), await _image(registry, b"two")
    for _ in range(2):
        await registry.put_manifest(APP, untagged, by=ALICE)
        await registry.put_manifest(APP, tagged, [Tag("v1"), Tag("v2")], by=ALICE)
    layer = untagged.layers[0].digest
    await registry.mount_blob(WEB, layer, ALL_NAMES, BOB)
    await registry.delete_blob(WEB, layer, by=BOB)
    await registry.delete_tag(APP, Tag("v2"), by=BOB)
    await registry.delete_manifest(APP, tagged.digest, by=BOB)
    for refused in (registry.delete_blob(WEB, layer, by=BOB), registry.delete_manifest(APP, tagged.digest, by=BOB)):
        with pytest.raises(Exception, match="has no"):
            await refused
    expected = [
        ("alice", "manifest.put", f"team/app@{untagged.digest}", None),
        ("alice", "tag.put", "team/app:v1", {"digest": tagged.digest}),
        ("alice", "tag.put", "team/app:v2", {"digest": tagged.digest}),
        ("bob", "blob.mount", f"team/web@{layer}", {"from": "team/app"}),
        ("bob", "blob.delete", f"team/web@{layer}", None),
        ("bob", "tag.delete", "team/app:v2", None),
        ("bob", "tag.delete", "team/app:v1", None),
        ("bob", "manifest.delete", f"team/app@{tagged.digest}", None),
    ]
    recorded_entries = entries(registry)
    assert sorted((e.actor, e.action, e.target) for e in recorded_entries) == sorted(line[:3] for line in expected)
    assert {(e.action, e.target): e.detail for e in recorded_entries} == {line[1:3]: line[3] for line in expected}
    assert {(e.actor, e.address, e.request_id, e.user_agent, e.outcome, e.count) for e in recorded_entries} == {
        (by.name, by.address, by.request_id, by.user_agent, "ok", 1) for by in (ALICE, BOB)
    }


async def test_entries_of_both_tables_are_sorted_by_time(registry: StoredRegistry, clock: AccountsClock) -> None:
    """The log has the entries of both tables, newest first. Pages of any size have each entry once, also if many
    entries have the same time."""
    manifest = await _image(registry, b"one")
    for number in range(12):
        clock.now += number % 3 == 0
        await registry.put_manifest(APP, manifest, [Tag(f"t{number}")], by=ALICE)
        await registry.accounts.add_audit_entries([AuditEntry(clock.now, "bob", "login", f"n{number}")])
    all_entries = entries(registry)
    assert len(all_entries) == 24
    assert [entry.at for entry in all_entries] == sorted((entry.at for entry in all_entries), reverse=True)
    assert len({entry.id for entry in all_entries}) == 24
    for limit in (1, 2, 5, 23, 24, 25):
        entries_of_pages: list[AuditEntry] = []
        more, before = True, None
        while more:
            page = registry.accounts.audit(AuditQuery(before=before), limit)
            entries_of_pages += page.items
            more, before = page.more, page.items[-1].id
        assert entries_of_pages == all_entries, limit


async def test_a_page_begins_where_the_previous_one_ended(registry: StoredRegistry, clock: AccountsClock) -> None:
    """Entries that are added or deleted between two pages do not shift the pages."""
    started = clock.now
    for number in range(6):
        clock.now += 1
        await registry.accounts.add_audit_entries([AuditEntry(clock.now, "bob", "login", f"n{number}")])
    first = registry.accounts.audit(AuditQuery(), 2)
    assert [entry.target for entry in first.items] == ["n5", "n4"]
    await registry.accounts.add_audit_entries([AuditEntry(clock.now + 1, "bob", "login", "newer")])
    assert await registry.accounts.prune_audit(started + 3) == 2
    second = registry.accounts.audit(AuditQuery(before=first.items[-1].id), 10)
    assert ([entry.target for entry in second.items], second.more) == (["n3", "n2"], False)
    for malformed in ("", "7", "x" * 20, f"{first.items[0].id}0" * 20):
        with pytest.raises(AccountInvalid):
            registry.accounts.audit(AuditQuery(before=malformed), 10)


async def test_entries_are_found_by_each_of_their_fields(registry: StoredRegistry, clock: AccountsClock) -> None:
    """Entries are found by each field, and by several fields together. If the target is a repository, all entries about
    its content are found. If the target is a tag or digest, only the entries about it are found."""
    manifest = await _image(registry, b"one")
    await registry.put_manifest(APP, manifest, [Tag("v1"), Tag("v2")], by=ALICE)
    clock.now += 10
    await registry.delete_tag(APP, Tag("v2"), by=BOB)
    await registry.mount_blob(WEB, manifest.layers[0].digest, APP, BOB)
    await registry.accounts.add_audit_entries(
        [
            AuditEntry(clock.now + 1, "eve", "pull", "team/app:v1", "denied", "192.0.2.9", count=7),
            AuditEntry(clock.now + 2, "bob", "login", "group:dev", "failed"),
            AuditEntry(clock.now + 3, "bob", "login", "", detail={"way": "basic"}),
        ]
    )
    v1, v2 = "alice tag.put team/app:v1", "alice tag.put team/app:v2"
    assert entry_texts(registry, actor="alice") == [v2, v1]
    assert entry_texts(registry, action="tag.put") == [v2, v1]
    assert entry_texts(registry, action="tag.delete") == ["bob tag.delete team/app:v2"]
    assert entry_texts(registry, action="login") == ["bob login ", "bob login group:dev"]
    assert entry_texts(registry, outcome="denied") == ["eve pull team/app:v1"]
    assert entry_texts(registry, outcome="ok", actor="bob")[1:] == [
        f"bob blob.mount team/web@{manifest.layers[0].digest}",
        "bob tag.delete team/app:v2",
    ]
    assert entry_texts(registry, target="team/app") == ["eve pull team/app:v1", "bob tag.delete team/app:v2", v2, v1]
    assert entry_texts(registry, target="team/app:v1") == ["eve pull team/app:v1", v1]
    assert entry_texts(registry, target=f"team/app@{manifest.digest}") == [v2, v1]
    assert entry_texts(registry, target=f"team/web@{manifest.layers[0].digest}", actor="bob") != []
    assert entry_texts(registry, target="group:dev") == ["bob login group:dev"]
    assert entry_texts(registry, target="team") == []
    assert entry_texts(registry, since=clock.now + 2) == ["bob login ", "bob login group:dev"]
    assert entry_texts(registry, actor="bob", action="login", since=clock.now + 3) == ["bob login "]
    assert entry_texts(registry, until=clock.now) == [v2, v1]
    assert entry_texts(registry, until=clock.now + 3, action="login") == ["bob login group:dev"]
    assert entry_texts(registry, until=clock.now + 2, since=clock.now + 1) == ["eve pull team/app:v1"]
    newest = entries(registry)[0].id
    assert entry_texts(registry, until=clock.now, before=newest) == [v2, v1]
    assert entry_texts(registry, until=clock.now + 9, before=newest) == entry_texts(registry)[1:]
    (denied,) = entries(registry, outcome="denied")
    assert (denied.at, denied.count, denied.address) == (clock.now + 1, 7, "192.0.2.9")
    assert entries(registry, since=clock.now + 3)[0].detail == {"way": "basic"}


async def test_old_entries_are_deleted(registry: StoredRegistry, clock: AccountsClock) -> None:
    """Old entries are deleted, even if there are many. The entries of the tag history stay."""
    manifest = await _image(registry, b"one")
    await registry.put_manifest(APP, manifest, [Tag("v1")], by=ALICE)
    await registry.accounts.add_audit_entries([AuditEntry(float(number), "bob", "login") for number in range(12_000)])
    assert await registry.accounts.prune_audit(11_000.0) == 11_000
    assert await registry.accounts.prune_audit(11_000.0) == 0
    assert len(entries(registry, action="login")) == 1000
    assert entry_texts(registry, action="tag.put") == ["alice tag.put team/app:v1"]


QUERIES = {
    "all": {},
    "actor": {"actor": "a"},
    "action": {"action": "login"},
    "manifests": {"action": "manifest.put"},
    "tags": {"action": "tag.put"},
    "deleted tags": {"action": "tag.delete"},
    "repository": {"target": "team/app"},
    "tag": {"target": "team/app:v1"},
    "denied": {"outcome": "denied"},
    "since": {"since": 5.0},
    "until": {"until": 5.0},
    "page": {"before": "41da3a5b8c123456a7"},
}


@pytest.mark.parametrize("query_name", sorted(QUERIES))
def test_each_query_uses_an_index(data: Path, query_name: str) -> None:
    """No query of the audit log reads or sorts a whole table."""
    db = second_connection(data / "entrepot.db")
    plans: list[str] = []

    def trace(cursor: apsw.Cursor, sql: str, values: apsw.Bindings | None) -> bool:
        if not sql.startswith("EXPLAIN"):
            explained = cursor.connection.execute(f"EXPLAIN QUERY PLAN {sql}", values).fetchall()
            plans.extend(str(row[3]) for row in explained)
        return True

    db.exec_trace = trace
    audit_table.page(db, AuditQuery(**QUERIES[query_name]), 10)  # type: ignore[arg-type]
    db.exec_trace = None
    db.close()
    table_plans = [plan for plan in plans if "audit" in plan or " h" in plan]  # `h`: alias of the table `tag_history`
    assert table_plans
    assert [plan for plan in table_plans if "SEARCH" not in plan or "INDEX" not in plan] == []
    # The index for the target has the columns repository, time and tag. So SQLite may have to sort entries with the
    # same time by their ids; its plan then says `LAST TERM`.
    assert [plan for plan in plans if "TEMP B-TREE" in plan and "LAST TERM" not in plan] == []


async def test_a_tag_change_writes_nothing_to_the_audit_table(data: Path, registry: StoredRegistry) -> None:
    """A change of a tag does not write to the table `audit`, because its entry in the tag history is also its entry in
    the audit log."""
    manifest = await _image(registry, b"one")
    db = connect(data / "entrepot.db")
    statements: list[str] = []

    def trace(_: apsw.Cursor, sql: str, values: apsw.Bindings | None) -> bool:
        statements.append(sql)
        return True

    db.exec_trace = trace
    with db:
        put_manifest(db, APP, manifest, [Tag("v1")], ALICE, 1.0, sparse=False, condition=None)
    db.exec_trace = None
    db.close()
    assert [sql for sql in statements if "tag_history" in sql] != []
    assert [sql for sql in statements if "audit" in sql] == []


async def test_garbage_collection_deletes_old_entries(tmp_path: Path) -> None:
    """A round of garbage collection deletes exactly the entries that are older than `keep_audit` seconds."""
    prepare_data_dir(tmp_path)
    year_seconds = 365 * 86400.0
    old, young = AuditEntry(1.0, "alice", "login"), AuditEntry(year_seconds, "bob", "login")
    async with open_registry(tmp_path) as registry:
        await registry.accounts.add_audit_entries([old, young])
    async with (
        open_registry(
            tmp_path, collect_every=0.001, keep_audit=year_seconds / 2, clock=lambda: year_seconds + 1.0
        ) as registry,
        asyncio.timeout(60),
    ):
        # No event tells when an entry was removed.
        while len(remaining := registry.accounts.audit(AuditQuery(), 10).items) > 1:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        assert [entry.actor for entry in remaining] == ["bob"]
