"""Tests with a disk that refuses one durable step (such as a write), because it is full or broken. The request gets an
error, no partial content is visible, and the next push works."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import apsw
import pytest

from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.system import System
from storage.errors import RegistryError, StorageFailed, StorageFull
from tests.system.crash.durable_steps import choose_steps
from tests.system.crash.workload import ExpectedState, Request, RequestLog, StateCheck, Workload, files_below, sweep

T = TypeVar("T")
OPTIONAL_STEPS = ("write state", "remove partial")
"""Steps that may fail without an error for the client: a write of the state file of a partial blob (an unfinished
download), and the removal of its files. Other processes learn the end of the download from its lock as well."""


class RefusingSystem(System):
    """Refuses the step `number`, counted from 1, with the error number `code`. A refused write writes half of its
    bytes. Counts only steps that a real disk could refuse: on a full disk, not those that free bytes, and not the
    creation of a directory that exists. `refused`: the name of the refused step. `kinds`: the kind of each step so far.
    `during`: the current request, which the caller sets."""

    def __init__(self, number: int, code: int) -> None:
        super().__init__()
        self._steps_left = number
        self._code = code
        self.refused: str | None = None
        self.during = ""
        self.kinds: list[tuple[str, str]] = []
        self._is_stopped = False

    def stop(self) -> None:
        """Lets every later step succeed."""
        self._steps_left = 0
        self._is_stopped = True

    def _step(self, name: str, step: Callable[[], T], error: type[Exception] | None = None) -> T:
        self._steps_left -= 1
        if not self._is_stopped:
            self.kinds.append((self.during, name))
        if self._steps_left == 0:
            self.refused = name
            if error is not None:
                raise error("refused by the test")
            raise OSError(self._code, os.strerror(self._code))
        return step()

    def open(self, path: Path, flags: int, mode: int = 0o644) -> int:
        if flags & os.O_EXCL:
            return self._step("create", lambda: System.open(self, path, flags, mode))
        return super().open(path, flags, mode)

    def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
        if self._steps_left == 1:
            super().write(fd, [chunks[0][: len(chunks[0]) // 2]], offset)
        is_state = os.readlink(f"/proc/self/fd/{fd}").endswith((".state", ".state (deleted)"))
        return self._step("write state" if is_state else "write", lambda: System.write(self, fd, chunks, offset))

    def sync(self, fd: int) -> None:
        self._step("sync", lambda: System.sync(self, fd))

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", lambda: System.rename(self, source, target))

    def mkdir(self, path: Path) -> None:
        if path.exists():
            super().mkdir(path)  # raises FileExistsError
        self._step("mkdir", lambda: System.mkdir(self, path))

    def unlink(self, path: Path) -> None:
        if self._code != errno.ENOSPC:
            name = "remove partial" if path.parent.name == "partials" else "unlink"
            self._step(name, lambda: System.unlink(self, path))
        else:
            super().unlink(path)

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        error = apsw.FullError if self._code == errno.ENOSPC else apsw.IOError
        self._step("commit", lambda: System.commit(self, commit, durable=durable), error)


async def _run_workload(
    data: Path, system: RefusingSystem, code: int, thorough: bool
) -> tuple[RequestLog, list[RegistryError]]:
    """Runs the workload and checks the registry afterwards. Returns the log of the requests, and their errors.
    `thorough`: also checks partial blobs, accounts, new pushes and garbage collection."""
    request_log, failures = RequestLog(), list[RegistryError]()

    def announce(kind: str, request: Request) -> None:
        request_log.note(kind, request)
        # A request `right` is one of several changes of accounts and rights. Its second word names the change.
        system.during = str(request[1] if request[0] == "right" else request[0]) if kind == "begin" else ""
        # The first request that fails is the one with the refused step.
        if kind == "failed" and code == errno.ENOSPC and len(failures) == 1 and request[0] != "collect":
            _check_freed(data, request_log, request, system.refused or "")

    async with open_registry(data, grace=0, boot="boot", system=system) as registry:
        await Workload(registry, announce, failures).run()
        system.stop()
        check = StateCheck(registry, request_log, faults=True)
        if thorough:
            await check.check_all()
        else:
            await check.blobs()
            await check.manifests()
            await check.uploads()
    async with open_registry(data, grace=0, boot="boot") as registry:
        await StateCheck(registry, request_log, faults=True).manifests()
        if thorough:
            await sweep(registry)
            await StateCheck(registry, request_log, faults=True).manifests()
            assert not list((data / "trash").iterdir())
    return request_log, failures


def _check_freed(data: Path, request_log: RequestLog, request: Request, refused: str) -> None:
    """Checks that the bytes of an upload session are freed after a request of the session has met the full disk. If the
    refused step is a rename, the registry could not open the session, and the session keeps its bytes."""
    state = ExpectedState()
    for acknowledged in request_log.acknowledged:
        state.apply(acknowledged)
    other_offsets = {
        key: offset for key, (_, offset) in state.uploads.items() if key[1] not in request or refused == "rename"
    }
    kept_bytes = sum(other_offsets.values())
    leftover_files = [path for path in files_below(data / "uploads") if path.stat().st_size]
    assert sum(path.stat().st_size for path in leftover_files) <= kept_bytes, f"{request}: {leftover_files}"
    assert not list((data / "trash").iterdir())
    hashes = [str(word).partition(":")[2] for word in request]
    assert not [
        path for path in files_below(data / "partials") if any(digest and digest in path.name for digest in hashes)
    ]
    if request[0] in ("blob", "finish"):
        digest_of_request = str(request[-1])
        is_acknowledged = any(digest == digest_of_request for _, digest in state.blobs)
        assert is_acknowledged or not [
            path for path in files_below(data / "blobs") if path.name == digest_of_request.partition(":")[2]
        ]


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, StorageFull), (errno.EIO, StorageFailed)])
async def test_refused_step_fails_the_request_and_leaves_no_partial_content(
    code: int, error: type[RegistryError], memory_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is full or broken refuses one of the tried durable steps, which include each kind of step. The
    running request then fails with an error. If the disk is full, the bytes of the upload session are freed. Other
    acknowledged content stays, and the same content can be pushed again. On a full disk, a delete succeeds: its commit
    uses reserved space, and its file is deleted at once."""
    refusals: set[str] = set()
    successes_from_reserve = 0
    thorough_every = 3 if code == errno.ENOSPC else 9  # a thorough check finds less after EIO, which frees no bytes
    prepare_data_dir(memory_folder / "recorded")
    recorder = RefusingSystem(0, code)
    await _run_workload(memory_folder / "recorded", recorder, code, thorough=True)
    steps = len(recorder.kinds)
    chosen = [*choose_steps(recorder.kinds, random.Random(random.random())), steps + 1]
    for index, number in enumerate(chosen):
        data = memory_folder / str(number)
        prepare_data_dir(data)
        system = RefusingSystem(number, code)
        try:
            request_log, failures = await _run_workload(data, system, code, thorough=index % thorough_every == 0)
            if system.refused is None:
                break
            refusals.add(system.refused)
            # A delete commits from the reserve. If its file cannot be moved to the trash, the file is deleted at once.
            used_reserve = code == errno.ENOSPC and system.refused in ("commit", "rename") and not failures
            if used_reserve:
                successes_from_reserve += 1
            elif system.refused not in OPTIONAL_STEPS:
                assert failures, "the request was acknowledged although a step of it failed"
                assert isinstance(failures[0], error)
            assert all(isinstance(failure, error) for failure in failures), failures
        except BaseException as problem:
            problem.add_note(f"step {number} refused: {system.refused}")
            raise
        shutil.rmtree(data)
    assert refusals >= {"create", "write", "sync", "rename", "mkdir", "commit"}
    assert steps > 90
    assert (successes_from_reserve > 0) == (code == errno.ENOSPC)
    assert system.refused is None, "the last run should have completed without a refused step"
    assert not request_log.unacknowledged
