"""A data directory that has blobs but no database: no new registry begins in it, because garbage collection would
delete the blobs as files that nothing owns."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.composition import check_version, layout_of, open_registry, prepare_data_dir
from storage.content import digest_of
from storage.data_dir.check import DataDirectoryError, NoRegistry
from storage.names import RepositoryName

pytestmark = pytest.mark.full_store

APP = RepositoryName("team/app")
BODY = b"a pushed layer"


@pytest.fixture
async def data(tmp_path: Path) -> Path:
    """A data directory with one pushed blob, which no process has open."""
    directory = tmp_path / "data"
    prepare_data_dir(directory)
    async with open_registry(directory) as registry:
        writer = await registry.start_upload(APP)
        await writer.write(BODY)
        await writer.commit(digest_of(BODY))
        await writer.aclose()
    return directory


def _delete_database(data: Path) -> None:
    for file in data.glob("entrepot.db*"):
        file.unlink()


@pytest.mark.parametrize("damage", ["deleted", "emptied"])
def test_no_new_registry_begins_beside_blobs_without_a_database(data: Path, damage: str) -> None:
    """If the database of a data directory with blobs was deleted or emptied, the start of a server is refused. The
    blob stays, and no new database is made."""
    _delete_database(data)
    if damage == "emptied":
        (data / "entrepot.db").touch()
    with pytest.raises(DataDirectoryError, match=r"has blobs, but its database entrepot\.db is missing or empty"):
        prepare_data_dir(data)
    assert layout_of(data).blob(digest_of(BODY)).read_bytes() == BODY
    assert [file.stat().st_size for file in data.glob("entrepot.db*")] == ([0] if damage == "emptied" else [])


def test_commands_do_not_advise_to_begin_a_new_registry_beside_blobs(data: Path) -> None:
    """A command on a data directory with blobs but no database says that the database is missing. It does not say that
    a server would make one."""
    _delete_database(data)
    with pytest.raises(DataDirectoryError, match="put the database back") as refusal:
        check_version(data)
    assert not isinstance(refusal.value, NoRegistry)


async def test_the_registry_is_whole_when_the_database_is_back(data: Path) -> None:
    """After a refused start, the database is put back in its place. The next start serves the blob."""
    (data / "entrepot.db").rename(data.parent / "entrepot.db")
    with pytest.raises(DataDirectoryError):
        prepare_data_dir(data)
    (data.parent / "entrepot.db").rename(data / "entrepot.db")
    async with open_registry(data) as registry:
        assert (await registry.resolve_blob(APP, digest_of(BODY))).size == len(BODY)


def test_a_new_registry_begins_in_a_directory_without_blobs(tmp_path: Path) -> None:
    """A directory whose first start was interrupted before it had a database can be prepared: it has no blobs."""
    layout = layout_of(tmp_path)
    for directory in layout.directories():
        directory.mkdir(parents=True, exist_ok=True)
    layout.metadata.touch()
    prepare_data_dir(tmp_path)
    assert layout.metadata.stat().st_size > 0
