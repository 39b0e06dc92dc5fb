"""The cost of the search for unused blobs of mirrored repositories. It depends on the length of the collect queue (the
blobs that may have become unused), not on the size of the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage.composition import prepare_data_dir
from storage.data_dir.layout import Layout
from storage.metadata.sqlite.database import connect
from storage.metadata.sqlite.upkeep.cached_image_tables import unused_links
from storage.names import Digest

REPOSITORIES = 200


@pytest.mark.parametrize("links", [10, 1000])
def test_unused_links_are_found_by_the_queue(tmp_path: Path, links: int) -> None:
    """The search takes fewer than 200 steps of SQLite's virtual machine, however many links and repositories there
    are."""
    prepare_data_dir(tmp_path)
    db = connect(Layout(tmp_path).metadata)
    with db:
        sql = "INSERT INTO usage_scope (id, name, prefixes, excluded, upstream) VALUES (1, 'c', ?, '[]', 'h')"
        db.execute(sql, ('["h/"]',))
        for number in range(1, REPOSITORIES + 1):
            db.execute("INSERT INTO repository (id, name, created) VALUES (?, ?, 0)", (number, f"h/{number}"))
        for blob in range(1, links + 1):
            digest = f"sha256:{blob:064x}"
            db.execute("INSERT INTO blob (id, digest, size, place, created) VALUES (?, ?, 1, 'x', 0)", (blob, digest))
            repository = blob % REPOSITORIES + 1
            db.execute("INSERT INTO blob_link (repository, blob, needed) VALUES (?, ?, 0)", (repository, blob))
        db.execute("INSERT INTO collect_queue (repository, digest, since) VALUES (8, ?, 0)", (f"sha256:{7:064x}",))
    steps = list[int]()

    def count(event: dict[str, Any]) -> None:
        steps.append(event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"])

    db.trace_v2(2, count)  # SQLITE_TRACE_PROFILE
    assert unused_links(db, ["h"], 1.0) == [(8, 7, Digest(f"sha256:{7:064x}"))]
    assert unused_links(db, ["other"], 1.0) == []
    db.trace_v2(0)
    assert max(steps) < 200
    db.close()
