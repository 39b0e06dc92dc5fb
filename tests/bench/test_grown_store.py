"""Tests of the stores of the bench `growth`: rows that are inserted in bulk equal the rows that pushes create."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.growth.synthetic_store import (
    MANY_TAGS_REPO,
    TAGS_PER_REPOSITORY,
    StoreSize,
    fill_store,
    manifest_of_tag,
    repository_name,
)
from bench.loaders.http_client import MANIFEST_TYPE
from bench.random_content import CONFIG_TYPE, BlobContent, make_blob
from storage.composition import layout_of, open_registry, prepare_data_dir
from storage.content import Actor, Manifest
from storage.interface import Registry
from storage.names import Digest, RepositoryName, Tag
from tests.fakes.second_connection import second_connection

SIZE = StoreSize(30)
BY = Actor("anonymous", "127.0.0.1", "", "bench")
CONFIG = make_blob(b"{}", CONFIG_TYPE)
LAYERS = (make_blob(b"one"), make_blob(b"two"))
BASE = RepositoryName("base/app")
# Ids and times are not compared. The audit log is not compared either: the inserted rows are those of blob pushes,
# which the log does not record. The test mounts blobs instead, because this is faster, and the log does record mounts.
ROWS = {
    "repository": "SELECT name, manifests FROM repository",
    "blob_link": "SELECT r.name, b.digest FROM blob_link l JOIN repository r ON r.id = l.repository "
    "JOIN blob b ON b.id = l.blob",
    "manifest": "SELECT r.name, m.digest, media_type, size, subject, artifact_type, annotations, body "
    "FROM manifest m JOIN repository r ON r.id = m.repository",
    "manifest_blob": "SELECT r.name, x.digest, m.digest FROM manifest_blob x JOIN repository r ON r.id = x.repository "
    "JOIN manifest m ON m.id = x.manifest",
    "manifest_child": "SELECT * FROM manifest_child",
    "tag": "SELECT r.name, t.name, m.digest FROM tag t JOIN repository r ON r.id = t.repository "
    "JOIN manifest m ON m.id = t.manifest",
    "tag_history": "SELECT r.name, tag, digest, actor, address, request_id, user_agent FROM tag_history h "
    "JOIN repository r ON r.id = h.repository",
}


async def push_blob(registry: Registry, repo: RepositoryName, blob: BlobContent) -> None:
    writer = await registry.start_upload(repo)
    assert isinstance(blob.content, bytes)
    await writer.write(blob.content)
    await writer.commit(Digest(blob.digest))


async def push_all(registry: Registry) -> None:
    for number in range(SIZE.repositories):
        await push(registry, RepositoryName(repository_name(number)), [f"t{tag}" for tag in range(TAGS_PER_REPOSITORY)])
    await push(registry, RepositoryName(MANY_TAGS_REPO), [f"t{tag:07d}" for tag in range(SIZE.many)])


async def push(registry: Registry, repo: RepositoryName, tags: list[str]) -> None:
    for each in (CONFIG, *LAYERS):
        await registry.mount_blob(repo, Digest(each.digest), BASE, BY)
    for tag in tags:
        body = manifest_of_tag(repo, tag, CONFIG, LAYERS).body
        await registry.put_manifest(repo, Manifest.parse(body, MANIFEST_TYPE), [Tag(tag)], by=BY)


def rows(data: Path) -> dict[str, list[Any]]:
    db = second_connection(layout_of(data).metadata)
    try:
        return {table: sorted(db.execute(sql).fetchall(), key=repr) for table, sql in ROWS.items()}
    finally:
        db.close()


async def test_inserted_rows_equal_pushed_rows(tmp_path: Path) -> None:
    """Bulk insertion and pushes give the same rows in every compared table, except for ids and times."""
    for name in ("grown", "pushed"):
        prepare_data_dir(tmp_path / name)
        async with open_registry(tmp_path / name) as registry:
            for each in (CONFIG, *LAYERS):
                await push_blob(registry, BASE, each)
            if name == "pushed":
                await push_all(registry)
    fill_store(tmp_path / "grown", SIZE, CONFIG, LAYERS)
    assert rows(tmp_path / "grown") == rows(tmp_path / "pushed")


async def test_pushes_to_a_filled_store(tmp_path: Path) -> None:
    """In a repository whose rows were inserted in bulk, a push can move a tag, and a new manifest can refer to the
    repository's blobs."""
    prepare_data_dir(tmp_path)
    async with open_registry(tmp_path) as registry:
        for each in (CONFIG, *LAYERS):
            await push_blob(registry, BASE, each)
    fill_store(tmp_path, SIZE, CONFIG, LAYERS)
    repo = RepositoryName(repository_name(1))
    new = Manifest.parse(manifest_of_tag("other", "t", CONFIG, LAYERS).body, MANIFEST_TYPE)
    async with open_registry(tmp_path) as registry:
        before = manifest_of_tag(repo, "t3", CONFIG, LAYERS)
        assert (await registry.get_manifest(repo, Tag("t3"))).body == before.body
        await registry.put_manifest(repo, new, [Tag("t3")], by=BY)
        assert (await registry.get_manifest(repo, Tag("t3"))).digest == new.digest
        assert (await registry.get_manifest(repo, Digest(before.digest))).body == before.body
