"""The cost of finding unused blobs and images of mirrored repositories, and of planning which of them are removed.

A *link* is a row that lets a repository serve a blob. It is *unused* if no manifest of the repository refers to the
blob. The *collect queue* is a table of the blobs whose links may have become unused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw
import pytest

from storage.cached_images import EvictionRules
from storage.composition import prepare_data_dir
from storage.data_dir.layout import Layout
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.inventory import SqliteInventory
from storage.metadata.sqlite.upkeep import cached_image_tables
from storage.metadata.sqlite.upkeep.cached_image_tables import LINKS_START, QueuePosition, find_image, unused_links
from storage.metadata.sqlite.upkeep.eviction_plan import plan_eviction
from storage.names import Digest, RepositoryName
from tests.fakes.counted_int import CountedInt
from tests.fakes.read_rows import record_rows

REPOSITORIES = 200
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
ADD_MANIFEST = """
INSERT INTO manifest (repository, digest, media_type, size, pushed, body) VALUES (?, ?, ?, 1, 0, x'00') RETURNING id"""


@pytest.mark.parametrize("links", [10, 1000])
def test_unused_links_are_found_by_the_queue(tmp_path: Path, links: int) -> None:
    """The search for unused links reads only the links of blobs in the collect queue. So with one blob in the queue, it
    takes fewer than 200 steps of SQLite's virtual machine, however many links and repositories there are."""
    prepare_data_dir(tmp_path)
    db = connect(Layout(tmp_path).metadata)
    with db:
        # A mirror of the upstream `h`. The names of its repositories begin with `h/`.
        sql = "INSERT INTO usage_scope (id, name, prefixes, excluded, upstream) VALUES (1, 'c', ?, '[]', 'h')"
        db.execute(sql, ('["h/"]',))
        for number in range(1, REPOSITORIES + 1):
            db.execute("INSERT INTO repository (id, name, created) VALUES (?, ?, 0)", (number, f"h/{number}"))
        for blob in range(1, links + 1):
            digest = f"sha256:{blob:064x}"
            db.execute("INSERT INTO blob (id, digest, size, place, created) VALUES (?, ?, 1, 'x', 0)", (blob, digest))
            repository = blob % REPOSITORIES + 1
            db.execute("INSERT INTO blob_link (repository, blob, needed) VALUES (?, ?, 0)", (repository, blob))
        # The queue has one entry: blob 7, which is in repository 8.
        db.execute("INSERT INTO collect_queue (repository, digest, since) VALUES (8, ?, 0)", (f"sha256:{7:064x}",))
    steps = list[int]()

    def count(event: dict[str, Any]) -> None:
        steps.append(event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"])

    db.trace_v2(2, count)  # SQLITE_TRACE_PROFILE
    # A link is returned as the row ids of its repository and its blob, and the blob's digest. None: that was the whole
    # queue.
    assert unused_links(db, ["h"], unused_since=1.0, now=61.0) == ([(8, 7, Digest(f"sha256:{7:064x}"))], None)
    assert unused_links(db, ["other"], unused_since=1.0, now=61.0) == ([], None)
    db.trace_v2(0)
    assert max(steps) < 200
    db.close()


def test_one_search_for_unused_links_reads_one_page_of_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search reads one page of the collect queue, and returns the position at which the next search continues. The
    last row of the queue has the only unused link. It is found, although there are two pages of used links before it,
    and more used links in its own page than one search may return."""
    monkeypatch.setattr(cached_image_tables, "QUEUE_PAGE_ROWS", 1000)
    last_blob = 2000 + 2 * cached_image_tables.MAX_LINKS  # the row id of the only blob that no manifest refers to
    prepare_data_dir(tmp_path)
    db = connect(Layout(tmp_path).metadata)
    digests = [f"sha256:{number:064x}" for number in range(last_blob + 1)]
    with db:
        sql = "INSERT INTO usage_scope (id, name, prefixes, excluded, upstream) VALUES (1, 'c', ?, '[]', 'h')"
        db.execute(sql, ('["h/"]',))
        db.execute("INSERT INTO repository (id, name, created) VALUES (1, 'h/1', 0)")
        manifest = db.execute(ADD_MANIFEST, (1, digests[0], MANIFEST)).get
        for blob, digest in enumerate(digests):
            db.execute("INSERT INTO blob (id, digest, size, place, created) VALUES (?, ?, 1, 'x', 0)", (blob, digest))
            db.execute("INSERT INTO blob_link (repository, blob, needed) VALUES (1, ?, 0)", (blob,))
            db.execute("INSERT OR IGNORE INTO collect_queue (repository, digest, since) VALUES (1, ?, 0)", (digest,))
        sql = "INSERT INTO manifest_blob (repository, digest, manifest) VALUES (1, ?, ?)"
        db.executemany(sql, [(digest, manifest) for digest in digests[:-1]])
    pages, steps = list[Any](), list[int]()

    def count(event: dict[str, Any]) -> None:
        steps[-1] += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    db.trace_v2(2, count)  # SQLITE_TRACE_PROFILE
    position: QueuePosition | None = LINKS_START
    while position is not None:
        steps.append(0)
        links, position = unused_links(db, ["h"], unused_since=1.0, now=61.0, after=position)
        pages.append((links, position))
    db.trace_v2(0)
    assert pages == [([], (1, digests[999])), ([], (1, digests[1999])), ([(1, last_blob, digests[-1])], None)]
    # The first search takes about as many steps as the second. If a search read the whole rest of the queue, the first
    # one would take many more.
    assert steps[0] <= 1.2 * steps[1]
    db.close()


def add_image(db: apsw.Connection, number: int, children: int) -> int:
    """Adds a repository with an index that has this number of children. Returns the row id of the index."""
    db.execute("INSERT INTO repository (id, name, created) VALUES (?, ?, 0)", (number, f"h/{number}"))
    index: int = db.execute(ADD_MANIFEST, (number, f"sha256:{0:064x}", INDEX)).get
    for child in range(1, children + 1):
        digest = f"sha256:{child:064x}"
        db.execute(ADD_MANIFEST, (number, digest, MANIFEST))
        child_row = (number, digest, index)
        db.execute("INSERT INTO manifest_child (repository, digest, manifest) VALUES (?, ?, ?)", child_row)
    return index


def test_child_of_a_nested_index_and_of_another_index_is_not_removable(tmp_path: Path) -> None:
    """The index `root` lists the index `nested` and `child`. `nested` lists `child`, too, and so does a further index,
    `other`. The eviction of `root` does not delete `child`."""
    prepare_data_dir(tmp_path)
    db = connect(Layout(tmp_path).metadata)
    with db:
        db.execute("INSERT INTO repository (id, name, created) VALUES (1, 'h/1', 0)")
        root, nested, child, other = (
            db.execute(ADD_MANIFEST, (1, f"sha256:{number:064x}", INDEX)).get for number in range(4)
        )
        for index, listed in ((root, 1), (root, 2), (nested, 2), (other, 2)):
            row = (1, f"sha256:{listed:064x}", index)
            db.execute("INSERT INTO manifest_child (repository, digest, manifest) VALUES (?, ?, ?)", row)
    image = find_image(db, root)
    assert image is not None
    # `family`: `root` and all manifests below it. `removable`: those of them that its eviction deletes.
    assert (set(image.family), image.removable) == ({root, nested, child}, (root, nested))
    db.close()


def test_other_indexes_with_the_same_children_are_not_all_read(tmp_path: Path) -> None:
    """Children that another index lists, too, are not removable. To find that out, the search does not read all indexes
    that list a child."""
    prepare_data_dir(tmp_path)
    db = connect(Layout(tmp_path).metadata)
    with db:
        index = add_image(db, 1, children=10)
        for other in range(1, 41):
            row_id = db.execute(ADD_MANIFEST, (1, f"sha256:{1000 + other:064x}", INDEX)).get
            db.execute(
                "INSERT INTO manifest_child (repository, digest, manifest) "
                "SELECT 1, digest, ? FROM manifest_child WHERE manifest = ?",
                (row_id, index),
            )
    read_rows = record_rows(db)
    image = find_image(db, index)
    assert image is not None
    assert (len(image.family), image.removable) == (11, (index,))
    assert len(read_rows) <= 3 * 10 + 5
    db.close()


def test_cost_of_finding_an_image_grows_only_with_its_manifests(tmp_path: Path) -> None:
    """Finding an image whose index has ten times as many children takes at most ten times as many operations:
    comparisons and hashes of the integers in the read rows, which `CountedInt` counts. The search runs in a transaction
    for which other changes wait."""
    prepare_data_dir(tmp_path)
    db = connect(Layout(tmp_path).metadata)
    with db:
        indexes = [add_image(db, number, children) for number, children in enumerate((50, 500), 1)]
    db.row_trace = lambda _, row: tuple(CountedInt(value) if isinstance(value, int) else value for value in row)
    operations, sizes = list[int](), list[int]()
    for index in indexes:
        before = CountedInt.operations
        # Excludes 50 manifests that are not in the store, so that the search also looks each manifest up among these.
        image = find_image(db, index, excluded_manifests=frozenset(range(10**6, 10**6 + 50)))
        assert image is not None
        assert image.family == image.removable
        operations.append(CountedInt.operations - before)
        sizes.append(len(image.family))
    db.close()
    assert sizes == [51, 501]
    assert 50 < operations[1] <= 10 * operations[0]


def test_cost_of_planning_a_removal_grows_only_with_its_manifests(tmp_path: Path) -> None:
    """Planning the removal of an index with ten times as many children takes at most ten times as many operations:
    comparisons and hashes of the integers in the read rows, which `CountedInt` counts."""
    prepare_data_dir(tmp_path)
    db = connect(Layout(tmp_path).metadata)
    with db:
        for number, children in enumerate((50, 500), 1):
            add_image(db, number, children)
    db.row_trace = lambda _, row: tuple(CountedInt(value) if isinstance(value, int) else value for value in row)
    operations, sizes = list[int](), list[int]()
    for number in (1, 2):
        before = CountedInt.operations
        removal = SqliteInventory(db).plan_removal(RepositoryName(f"h/{number}"), Digest(f"sha256:{0:064x}"))
        operations.append(CountedInt.operations - before)
        sizes.append(len(removal.manifests))
    db.close()
    assert sizes == [51, 501]
    assert 50 < operations[1] <= 10 * operations[0]


def test_planning_a_removal_reads_each_reference_twice(tmp_path: Path) -> None:
    """An index lists 20 indexes and 30 other manifests, and each of these 20 indexes lists the same 30 manifests. To
    plan the removal of the first index, each entry of these indexes is read at most twice: with the index and with the
    manifest that it lists. In the plan, an index comes before the manifests that it lists.

    40 further indexes list the last manifest, number 50. So the plan does not remove this manifest; one of the 40
    indexes is read to find that out."""
    prepare_data_dir(tmp_path)
    db = connect(Layout(tmp_path).metadata)
    with db:
        root = add_image(db, 1, children=50)
        nested = [
            row_id for (row_id,) in db.execute("SELECT id FROM manifest WHERE id > ? ORDER BY id LIMIT 20", (root,))
        ]
        for index in nested:
            db.execute(
                "INSERT INTO manifest_child (repository, digest, manifest) "
                "SELECT 1, digest, ? FROM manifest WHERE id > ?",
                (index, nested[-1]),
            )
        for other in range(40):
            row_id = db.execute(ADD_MANIFEST, (1, f"sha256:{1000 + other:064x}", INDEX)).get
            row = (1, f"sha256:{50:064x}", row_id)
            db.execute("INSERT INTO manifest_child (repository, digest, manifest) VALUES (?, ?, ?)", row)
    read_rows = record_rows(db)
    removal = SqliteInventory(db).plan_removal(RepositoryName("h/1"), Digest(f"sha256:{0:064x}"))
    assert set(removal.manifests) == {Digest(f"sha256:{number:064x}") for number in range(50)}
    assert set(removal.manifests[1:21]) == {Digest(f"sha256:{number:064x}") for number in range(1, 21)}
    assert len(read_rows) <= 2 * (50 + 20 * 30) + 4 * 50  # the entries, and a few other rows for each manifest
    db.close()


@pytest.mark.parametrize("repositories", [1, 120])
def test_plan_reads_the_references_to_a_shared_layer_once(tmp_path: Path, repositories: int) -> None:
    """All 120 images of a cache share a layer. Planning the eviction of all of them reads at most twice as many rows as
    for half of them, whether the images are in one repository or each in its own."""
    prepare_data_dir(tmp_path)
    db = connect(Layout(tmp_path).metadata)
    with db:
        sql = "INSERT INTO usage_scope (id, name, prefixes, excluded, upstream) VALUES (1, 'c', ?, '[]', 'h')"
        db.execute(sql, ('["h/"]',))
        for number in range(1, repositories + 1):
            db.execute("INSERT INTO repository (id, name, created) VALUES (?, ?, 0)", (number, f"h/{number}"))
        for image in range(120):
            repository = image % repositories + 1
            manifest = db.execute(ADD_MANIFEST, (repository, f"sha256:{image:064x}", MANIFEST)).get
            for blob in (1, 1000 + image):
                digest = f"sha256:{blob:064x}"
                db.execute(
                    "INSERT OR IGNORE INTO blob (id, digest, size, place, created) VALUES (?, ?, ?, 'x', 0)",
                    (blob, digest, 100 if blob == 1 else 7),
                )
                db.execute(
                    "INSERT OR IGNORE INTO blob_link (repository, blob, needed) VALUES (?, ?, 0)", (repository, blob)
                )
                db.execute(
                    "INSERT INTO manifest_blob (repository, digest, manifest) VALUES (?, ?, ?)",
                    (repository, digest, manifest),
                )
    rules = EvictionRules(is_kept=lambda _: False, downloads=frozenset(), recent_pull_after=0.0)
    read_rows = record_rows(db)
    # Each image frees the 7 bytes of its own layer; the last one also frees the 100 bytes of the shared layer.
    assert len(plan_eviction(db, ["h"], rules, bytes_to_free=60 * 7, usage_scope="c", now=10.0)) == 60
    rows_of_half = len(read_rows)
    images = plan_eviction(db, ["h"], rules, bytes_to_free=10**9, usage_scope="c", now=10.0)
    assert [image.bytes for image in images] == [7] * 119 + [107]
    assert 0 < len(read_rows) - rows_of_half <= 2 * rows_of_half
    db.close()
