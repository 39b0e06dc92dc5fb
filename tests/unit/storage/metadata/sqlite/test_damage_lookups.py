"""A lookup of a blob or manifest must report damaged content. This check needs no SQL statement of its own."""

from __future__ import annotations

from pathlib import Path

import apsw

from storage.composition import open_registry
from storage.metadata.sqlite import lookups
from storage.metadata.sqlite.database import connect
from storage.names import RepositoryName, Tag
from tests.fakes.registry_content import push_image

APP = RepositoryName("team/app")


async def test_a_lookup_takes_one_statement(data: Path) -> None:
    """A lookup of a blob, of a manifest or of a manifest's descriptor takes one SQL statement. The statement does not
    read the tables of damaged content."""
    async with open_registry(data) as registry:
        image = await push_image(registry, APP, "one", "latest")
    db = connect(data / "entrepot.db", read_only=True)
    statements: list[str] = []

    def trace(_: apsw.Cursor, sql: str, __: object) -> bool:
        statements.append(sql)
        return True

    db.exec_trace = trace
    lookups.blob(db, APP, image.blobs[0].digest)
    lookups.manifest(db, APP, Tag("latest"), {})
    lookups.manifest_descriptor(db, APP, image.digest)
    db.exec_trace = None
    assert len(statements) == 3
    assert not any("damaged" in sql for sql in statements)
    db.close()
