"""A data directory that the previous release has written can be used with this release. Its content is served, and its
uploads and downloads continue."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.access import AccountName, Grantee, GranteeKind
from storage.composition import check_version, has_had_account, list_partials, open_registry, prepare_data_dir
from storage.content import Actor, Allowance, UpstreamCheck, digest_of
from storage.data_dir.check import DataDirectoryError
from storage.data_dir.system import boot_id
from storage.names import Digest, RepositoryName, Tag, UploadID
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, ConfirmedProblem
from storage.upstream_tags import Sighting
from tests.fakes import written_data_dir as previous_release

APP, UBUNTU = RepositoryName("team/app"), RepositoryName("docker.io/library/ubuntu")
LATEST = Tag("latest")
ALICE = Actor("alice")


@pytest.fixture
def written(tmp_path: Path) -> previous_release.Written:
    return previous_release.write_data_dir(tmp_path / "data", boot_id())


@pytest.fixture
async def registry(tmp_path: Path, written: previous_release.Written) -> AsyncIterator[StoredRegistry]:
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", clock=lambda: previous_release.NOW + 60) as opened:
        yield opened


async def read(registry: StoredRegistry, repo: RepositoryName, digest: Digest) -> bytes:
    reader = await registry.open_blob(repo, digest)
    try:
        return b"".join([chunk async for chunk in reader])
    finally:
        await reader.aclose()


def test_the_server_migrates_the_data_directory(written: previous_release.Written, tmp_path: Path) -> None:
    """Before the migration, commands ask the user to start the server once, which migrates the directory. The partial
    blob is listed and `has_had_account` is true, both before and after the migration."""
    with pytest.raises(DataDirectoryError, match="start `entrepot serve` once to bring it up to date"):
        check_version(tmp_path / "data")
    check_partials_and_accounts(tmp_path)
    prepare_data_dir(tmp_path / "data")
    check_version(tmp_path / "data")
    check_partials_and_accounts(tmp_path)


def check_partials_and_accounts(tmp_path: Path) -> None:
    assert has_had_account(tmp_path / "data")
    (partial,) = list_partials(tmp_path / "data")
    assert (partial.digest, partial.size) == (digest_of(previous_release.PARTIAL), len(previous_release.PARTIAL))
    assert (partial.received, partial.is_downloading) == (previous_release.PARTIAL_STOP, False)


async def test_content_of_the_previous_release_is_served(
    registry: StoredRegistry, written: previous_release.Written
) -> None:
    """The hosted image (`APP`) and the mirrored image (`UBUNTU`) are served by tag, byte for byte."""
    assert (await registry.get_manifest(APP, LATEST)).body == written.manifest
    assert (await registry.get_manifest(UBUNTU, LATEST)).body == written.mirrored_manifest
    for repo, blob in (
        (APP, previous_release.CONFIG),
        (APP, previous_release.LAYER),
        (UBUNTU, previous_release.MIRRORED_LAYER),
    ):
        assert await read(registry, repo, digest_of(blob)) == blob


async def test_a_check_finds_no_problem(registry: StoredRegistry) -> None:
    """A check finds no problem in what the previous release has written."""
    findings: list[ConfirmedProblem] = []

    async def on_problem(finding: ConfirmedProblem) -> None:
        findings.append(finding)

    async def on_progress(done: int, total: int, message: str) -> None:
        pass

    await registry.checker.check(CheckOptions(hash_bytes=True), on_problem, on_progress)
    assert findings == []


async def test_uploads_of_the_previous_release_continue(registry: StoredRegistry) -> None:
    """An upload session continues after the bytes that it has. A session without bytes continues at offset 0."""
    remaining_bytes = b"and the other half"
    upload = UploadID(previous_release.UPLOAD)
    assert await registry.upload_offset(APP, upload, by=ALICE) == len(previous_release.UPLOADED_BYTES)
    for number, stored_bytes in (
        (previous_release.UPLOAD, previous_release.UPLOADED_BYTES),
        (previous_release.BARE_UPLOAD, b""),
    ):
        writer = await registry.resume_upload(APP, UploadID(number), len(stored_bytes), by=ALICE)
        await writer.write(remaining_bytes)
        await writer.commit(digest_of(stored_bytes + remaining_bytes))
        await writer.aclose()
        assert await read(registry, APP, digest_of(stored_bytes + remaining_bytes)) == stored_bytes + remaining_bytes
    assert await registry.blobs.list_uploads() == []


async def test_the_partial_blob_of_the_previous_release_is_completed(registry: StoredRegistry, tmp_path: Path) -> None:
    """A partial blob is a file with the bytes of a mirror's download that have arrived. Only the missing bytes have to
    be downloaded."""
    size = len(previous_release.PARTIAL)
    partial = await registry.partials.claim(digest_of(previous_release.PARTIAL), size, "docker.io")
    assert partial.missing() == [(previous_release.PARTIAL_STOP, size)]
    partial.write_at(previous_release.PARTIAL_STOP, previous_release.PARTIAL[previous_release.PARTIAL_STOP :])
    await partial.commit(UBUNTU)
    partial.close()
    assert await read(registry, UBUNTU, digest_of(previous_release.PARTIAL)) == previous_release.PARTIAL
    assert list((tmp_path / "data" / "partials").iterdir()) == []


async def test_accounts_and_records_of_the_previous_release_are_available(
    registry: StoredRegistry, written: previous_release.Written
) -> None:
    """Accounts, groups, grants and signing keys are available, and so are the mirror's records about its upstreams."""
    accounts, records = registry.accounts, registry.records
    assert (accounts.has_had_account(), accounts.epoch()) == (True, 5)
    assert accounts.account(AccountName("alice")).admin
    assert accounts.password_hash(AccountName("alice")) == "a hash"
    (grant,) = accounts.grants([Grantee(GranteeKind.GROUP, "dev")])
    assert str(grant.pattern) == "team/**"
    (key,) = accounts.signing_keys()
    assert key.id == "key"
    assert await records.last_check(UBUNTU, LATEST) == UpstreamCheck(previous_release.NOW, True)
    assert await records.token("docker.io pull ubuntu") == ("a token", 4e9)
    assert await records.allowance("docker.io") == Allowance(previous_release.NOW, 97, 100, 0.0)
    assert await records.is_confirmed(UBUNTU, digest_of(previous_release.MIRRORED_LAYER))
    sightings = [Sighting(previous_release.NOW, digest_of(written.mirrored_manifest))]
    assert await registry.upstream_tags.sightings(UBUNTU, LATEST) == sightings
    assert await registry.upstream_tags.sightings(APP, LATEST) == []  # this tag was pushed, not mirrored


async def test_garbage_of_the_previous_release_is_collected(registry: StoredRegistry, tmp_path: Path) -> None:
    """Garbage collection empties the trash and deletes the blobs of a deleted image. Content in use stays."""
    manifest = await registry.resolve_manifest(UBUNTU, LATEST)
    await registry.delete_manifest(UBUNTU, manifest.digest, by=ALICE)
    registry.collector.grace = 0.0
    await registry.collector.collect()
    assert list((tmp_path / "data" / "trash").iterdir()) == []
    assert not await registry.metadata.known_blobs([digest_of(previous_release.MIRRORED_LAYER)])
    assert await read(registry, APP, digest_of(previous_release.LAYER)) == previous_release.LAYER


def test_partial_records_are_written_as_before(tmp_path: Path) -> None:
    """The records of partial blobs have the same format as in the previous release, because a process of the previous
    release may still run and read them."""
    from storage.blobs.files.partial_state_format import PartialProgress, decode_progress

    record = PartialProgress("boot", 10, extents=[(0, 4)]).encode()
    assert struct.unpack_from("<8sIIQ40s2Q", record)[:4] == (b"partial1", 0, 2, 10)
    assert decode_progress(record) == PartialProgress("boot", 10, extents=[(0, 4)])
