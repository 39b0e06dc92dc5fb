"""Upkeep of a store with files that the process may not read, for example because root has copied them there. Their
bytes may be right, so nothing is taken out of use or deleted, and the work on all other files goes on."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import typer

from registry.cli.options import one_line_errors
from storage.blobs.files import unreadable_files
from storage.blobs.files.unreadable_files import describe_forbidden
from storage.composition import open_registry, prepare_data_dir
from storage.consistency import ProblemCode
from storage.content import digest_of
from storage.errors import StorageFailed
from storage.names import Digest, RepositoryName
from storage.store.stored_registry import StoredRegistry
from storage.upkeep.checker import CheckOptions, ConfirmedProblem
from storage.upkeep.scrubber import MAX_LOGGED_UNREADABLE
from tests.fakes.blob_files import layout_behind
from tests.fakes.forbidden_files import ForbiddenFiles
from tests.fakes.registry_content import push_blob, read_blob
from tests.fakes.scrub_runs import delete, file_of, flip_byte, quarantined_file, scrub
from tests.unit.storage.upkeep.test_unreadable_files import Clock
from tests.unit.storage.upkeep.test_unreadable_files import clock as clock

REPO = RepositoryName("team/app")
PERMISSION = "Permission denied"


@pytest.fixture
async def store(tmp_path: Path, clock: Clock) -> AsyncIterator[StoredRegistry]:
    unreadable_files.warned_at.clear()
    prepare_data_dir(tmp_path / "data")
    async with open_registry(tmp_path / "data", grace=3600, expire=3600, clock=clock) as opened:
        yield opened


@pytest.fixture
def forbidden(monkeypatch: pytest.MonkeyPatch) -> ForbiddenFiles:
    return ForbiddenFiles(monkeypatch)


async def push_blobs(store: StoredRegistry, count: int) -> list[Digest]:
    return [(await push_blob(store, REPO, b"blob %d" % number)).digest for number in range(count)]


async def findings(store: StoredRegistry, options: CheckOptions) -> list[ConfirmedProblem]:
    """Checks the store and returns what it finds."""
    found: list[ConfirmedProblem] = []

    async def on_problem(finding: ConfirmedProblem) -> None:
        found.append(finding)

    async def on_progress(_done: int, _total: int, _message: str) -> None:
        pass

    await store.checker.check(options, on_problem, on_progress)
    return found


async def test_scrub_goes_on_after_a_forbidden_blob(
    store: StoredRegistry, forbidden: ForbiddenFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """Scrub reports a blob whose file it may not read, with the path, and checks all others. It neither marks the blob
    as damaged nor moves its file. Once the file may be read, the blob is served as before."""
    digests = await push_blobs(store, 3)
    path = file_of(store, digests[0])
    forbidden.paths.add(path)
    flip_byte(file_of(store, digests[2]))

    result, [unreadable, damaged] = await scrub(store)

    assert (result["blobs"], result["unreadable"], result["damaged"]) == (3, 1, 1)
    assert (unreadable["event"], unreadable["digest"]) == ("unreadable", digests[0])
    assert f"cannot read {path}: {PERMISSION}" in unreadable["reason"]
    assert (damaged["event"], damaged["digest"]) == ("damaged", digests[2])
    assert len([text for text in caplog.messages if str(path) in text]) == 1
    assert [blob.digest for blob in (await store.damage.damaged_blobs(None, 10)).items] == [digests[2]]
    assert not quarantined_file(store, digests[0]).exists()
    forbidden.paths.clear()
    assert await read_blob(store, REPO, digests[0]) == b"blob 0"
    assert (await scrub(store))[0]["unreadable"] == 0


async def test_scrub_goes_on_if_the_repaired_file_is_forbidden(
    store: StoredRegistry, forbidden: ForbiddenFiles
) -> None:
    """If a damaged blob's file was put back but may not be read, scrub reports that and checks all other blobs. The
    next scrub that may read the file heals the blob."""
    digests = await push_blobs(store, 2)
    delete(file_of(store, digests[0]))
    assert (await scrub(store))[0]["damaged"] == 1
    file_of(store, digests[0]).write_bytes(b"blob 0")
    forbidden.paths.add(file_of(store, digests[0]))

    result, [step] = await scrub(store)

    assert (result["blobs"], result["unreadable"], result["healed"]) == (1, 1, 0)
    assert (step["event"], step["digest"]) == ("unreadable", digests[0])
    forbidden.paths.clear()
    assert (await scrub(store))[0]["healed"] == 1
    assert await read_blob(store, REPO, digests[0]) == b"blob 0"


async def test_scrub_of_many_forbidden_blobs(
    store: StoredRegistry, forbidden: ForbiddenFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """Scrub does not stop after many blobs that it may not read, because it takes none of them out of use. It reports
    each as a step, but logs only the first ones and their number."""
    digests = await push_blobs(store, MAX_LOGGED_UNREADABLE + 5)
    forbidden.paths.update(file_of(store, digest) for digest in digests)
    result, steps = await scrub(store)
    assert result["unreadable"] == len(steps) == len(digests)
    texts = [text for text in caplog.messages if "was not checked" in text]
    assert len(texts) == MAX_LOGGED_UNREADABLE
    assert any(f"has no permission to read the files of {len(digests)} blobs" in text for text in caplog.messages)


@pytest.mark.parametrize("hash_bytes", [False, True])
@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.slow
async def test_a_check_reports_forbidden_blobs(
    store: StoredRegistry, forbidden: ForbiddenFiles, hash_bytes: bool, repair: bool
) -> None:
    """A check, also without `hash_bytes`, reports each blob whose file it may not read, and goes on. A repair changes
    nothing about these blobs, however many they are."""
    digests = await push_blobs(store, 25)
    *forbidden_digests, lost = digests
    forbidden.paths.update(file_of(store, digest) for digest in forbidden_digests)
    delete(file_of(store, lost))

    found = await findings(store, CheckOptions(hash_bytes=hash_bytes, repair=repair))

    assert {(finding.problem.code, finding.problem.item, finding.repair is None) for finding in found} == {
        *((ProblemCode.BLOB_FILE_FORBIDDEN, digest, True) for digest in forbidden_digests),
        (ProblemCode.BLOB_FILE_MISSING, lost, not repair),
    }
    assert f"cannot read {file_of(store, digests[0])}: {PERMISSION}" in found[0].problem.text
    forbidden.paths.clear()
    assert await read_blob(store, REPO, digests[0]) == b"blob 0"


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.slow
async def test_a_check_reports_a_forbidden_stray(
    store: StoredRegistry, clock: Clock, forbidden: ForbiddenFiles, repair: bool
) -> None:
    """A check reports a file without a row that it may not read. A repair leaves it."""
    digest = digest_of(b"bytes without a row")
    file_of(store, digest).write_bytes(b"bytes without a row")
    forbidden.paths.add(file_of(store, digest))
    clock.ahead = 7200
    [finding] = await findings(store, CheckOptions(repair=repair))
    assert (finding.problem.code, finding.problem.item, finding.repair) == (ProblemCode.STRAY, digest, None)
    assert file_of(store, digest).exists()


async def test_collection_skips_a_forbidden_directory(
    store: StoredRegistry, clock: Clock, forbidden: ForbiddenFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """If the process may not enter one of the directories of blob files, garbage collection removes all garbage outside
    of that directory, and logs which directory it is. Later rounds remove the rest."""
    unneeded, other, stray = b"blob 0", b"blob 1", b"stray"
    await push_blobs(store, 2)
    file_of(store, digest_of(stray)).write_bytes(stray)
    directory = file_of(store, digest_of(unneeded)).parent
    assert directory not in {file_of(store, digest_of(data)).parent for data in (other, stray)}
    forbidden.paths.add(directory)
    clock.ahead = 7200
    for _ in range(2):
        await store.collector.collect(all_shards=True)
        assert not file_of(store, digest_of(other)).exists()
        assert not file_of(store, digest_of(stray)).exists()
    assert any(f"cannot read {directory}: {PERMISSION}" in text for text in caplog.messages)
    forbidden.paths.clear()
    assert file_of(store, digest_of(unneeded)).exists()
    await store.collector.collect(all_shards=True)
    assert not file_of(store, digest_of(unneeded)).exists()


async def test_a_check_reports_a_forbidden_directory(
    store: StoredRegistry, clock: Clock, forbidden: ForbiddenFiles
) -> None:
    """A check reports a directory of blob files that the process may not list, even if no blob is in it, and checks all
    others. Otherwise it would say that nothing is wrong, although it has not looked for strays there."""
    stray = digest_of(b"stray")
    file_of(store, stray).write_bytes(b"stray")
    directory = layout_behind(store).shard(0)
    assert directory != file_of(store, stray).parent
    forbidden.paths.add(directory)
    clock.ahead = 7200
    [of_directory, of_stray] = await findings(store, CheckOptions())
    assert of_directory.problem.code is ProblemCode.BLOB_FILE_FORBIDDEN
    assert f"cannot read {directory}: {PERMISSION}" in of_directory.problem.text
    assert (of_stray.problem.code, of_stray.problem.item) == (ProblemCode.STRAY, stray)


async def test_a_check_fails_if_the_disk_cannot_list_a_directory(
    store: StoredRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk has lost a directory of blob files, a check ends with an error that names the directory."""
    directory = layout_behind(store).shard(0)
    ForbiddenFiles(monkeypatch, errno.EIO).paths.add(directory)
    with pytest.raises(StorageFailed) as caught:
        await findings(store, CheckOptions())
    assert caught.value.message_for_operators().endswith(f"{os.strerror(errno.EIO)}: {directory}")


async def test_a_failed_job_names_the_file(
    store: StoredRegistry, forbidden: ForbiddenFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    """If a job ends because the system refuses a call, the error of the job, and the line that the command prints, name
    the file."""
    quarantine = layout_behind(store).quarantine
    forbidden.paths.add(quarantine)
    with pytest.raises(typer.Exit), one_line_errors():
        await scrub(store)
    text = f"the registry's storage failed: {PERMISSION}: {quarantine}"
    assert capsys.readouterr().err == f"entrepot: {text}\n"
    [job] = (await store.jobs.jobs(None, 1)).items
    assert job.progress.message == text


async def test_a_push_replaces_a_forbidden_file(
    store: StoredRegistry, forbidden: ForbiddenFiles, caplog: pytest.LogCaptureFixture
) -> None:
    """A pull of a blob whose file may not be read fails. The log names the file and the remedy once, although clients
    try again. A push of the same bytes stores them in a new file, which every repository serves."""
    layer = await push_blob(store, REPO, b"layer")
    path = file_of(store, layer.digest)
    forbidden.paths.add(path)
    with caplog.at_level(logging.WARNING, "storage.damage"):
        for _ in range(3):
            with pytest.raises(StorageFailed, match=f"the file of {layer.digest} cannot be opened: {PERMISSION}"):
                await store.open_blob(REPO, layer.digest)
    [text] = caplog.messages
    assert f"cannot read {path}: {PERMISSION}; run as root: ch" in text
    inode = path.stat().st_ino
    forbidden.paths.clear()  # the new file belongs to this process
    await push_blob(store, RepositoryName("team/web"), b"layer")
    assert path.stat().st_ino != inode
    assert await read_blob(store, REPO, layer.digest) == b"layer"


@pytest.mark.parametrize(
    ("forbidden_path", "user", "command"),
    [
        ("shard/file", 4711, "chown 4711:{group} {root}/shard/file"),
        ("shard", 4711, "chown 4711:{group} {root}/shard"),
        ("shard/file", None, "chmod u+rX {root}/shard/file"),
    ],
)
def test_the_remedy_names_what_denies_the_access(
    tmp_path: Path,
    forbidden: ForbiddenFiles,
    monkeypatch: pytest.MonkeyPatch,
    forbidden_path: str,
    user: int | None,
    command: str,
) -> None:
    """The text about a forbidden file names the file, or the directory that may not be entered. The command gives it to
    the user of the process, or, if it belongs to that user, makes it readable."""
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "file").write_bytes(b"")
    forbidden.paths.add(tmp_path / forbidden_path)
    if user is not None:
        monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(PermissionError) as caught:
        os.open(tmp_path / "shard" / "file", os.O_RDONLY)
    text = describe_forbidden(tmp_path / "shard" / "file", caught.value)
    assert text.startswith(f"the server cannot read {tmp_path / forbidden_path}: {PERMISSION}")
    assert text.endswith(f"run as root: {command.format(group=os.getegid(), root=tmp_path)}")
