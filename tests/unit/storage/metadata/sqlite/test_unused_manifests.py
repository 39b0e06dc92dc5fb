"""The search for manifests that nothing uses any more (`storage.metadata.sqlite.upkeep.unused_manifests`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from storage.composition import prepare_data_dir
from storage.data_dir.layout import Layout
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.upkeep.unused_manifests import add_unused, is_used
from tests.fakes.read_rows import record_rows

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def db(tmp_path: Path) -> Iterator[apsw.Connection]:
    """The metadata database of a new store that has the repository 1."""
    prepare_data_dir(tmp_path)
    connection = connect(Layout(tmp_path).metadata)
    connection.execute("INSERT INTO repository (id, name, created) VALUES (1, 'app', 0)")
    yield connection
    connection.close()


def add_manifest(db: apsw.Connection, row_id: int, *, listed_in: int | None = None, tags: int = 0) -> int:
    """Adds a manifest, unless there is one with this row id, and returns the row id. `listed_in`: an index that lists
    the manifest. `tags`: how many tags it gets."""
    if db.execute("SELECT 1 FROM manifest WHERE id = ?", (row_id,)).get is None:
        kind = MANIFEST if listed_in else INDEX
        columns = "id, repository, digest, media_type, size, pushed, body"
        sql = f"INSERT INTO manifest ({columns}) VALUES (?, 1, ?, ?, 1, 0, x'00')"
        db.execute(sql, (row_id, f"sha256:{row_id:064x}", kind))
    if listed_in:
        sql = "INSERT INTO manifest_child (repository, digest, manifest) VALUES (1, ?, ?)"
        db.execute(sql, (f"sha256:{row_id:064x}", listed_in))
    for tag in range(tags):
        db.execute(
            "INSERT INTO tag (repository, name, manifest, updated) VALUES (1, ?, ?, 0)", (f"{row_id}-{tag}", row_id)
        )
    return row_id


@pytest.mark.parametrize("is_one_index_tagged", [False, True])
def test_children_of_many_indexes(db: apsw.Connection, is_one_index_tagged: bool) -> None:
    """Children that many indexes list are unused if all these indexes are unused. The search reads each entry of
    an index twice, however many indexes there are."""
    with db:
        indexes = [add_manifest(db, row_id) for row_id in range(1, 41)]
        children = [add_manifest(db, row_id, listed_in=index) for row_id in range(101, 121) for index in indexes]
        if is_one_index_tagged:
            add_manifest(db, indexes[-1], tags=1)
    read_rows = record_rows(db)
    unused: set[int] = set()
    add_unused(db, indexes, (), unused)
    assert unused == ({*indexes[:-1]} if is_one_index_tagged else {*indexes, *children})
    assert len(read_rows) <= 2 * len(children) + len(indexes)


def test_tags_of_a_manifest_are_not_all_read(db: apsw.Connection) -> None:
    """A manifest with many tags is used. The search reads only as many of its tags as it needs."""
    with db:
        index = add_manifest(db, 1, tags=1000)
    read_rows = record_rows(db)
    unused: set[int] = set()
    assert is_used(db, index)
    add_unused(db, [index], {"1-0", "1-1"}, unused)
    assert not unused
    assert len(read_rows) <= 4
