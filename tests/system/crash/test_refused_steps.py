"""A disk that refuses one durable step: the caller gets an error, no partial content is visible, and the next push
works."""

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
from tests.system.crash.workload import Event, ExpectedState, StateCheck, StepLog, Workload, files_below, sweep

T = TypeVar("T")
SPARE = ("tell", "tidy")
"""Steps on a partial blob that may fail at the end, when the blob is one: that its lock falls tells others as well."""


class RefusingSystem(System):
    """Refuses the step `number`, counted from 1, with the error number `code`. Of a refused write, half is done.
    `refused`: the refused step. Refuses only what a disk could refuse: on a full disk, no step that frees bytes, and no
    creation of a directory that exists. `kinds`: the kind of each step so far that it could have refused; the caller
    sets `during`."""

    def __init__(self, number: int, code: int) -> None:
        super().__init__()
        self._left = number
        self._code = code
        self.refused: str | None = None
        self.during = ""
        self.kinds: list[tuple[str, str]] = []
        self._is_stopped = False

    def stop(self) -> None:
        """Refuses nothing from now on."""
        self._left = 0
        self._is_stopped = True

    def _step(self, name: str, step: Callable[[], T], error: type[Exception] | None = None) -> T:
        self._left -= 1
        if not self._is_stopped:
            self.kinds.append((self.during, name))
        if self._left == 0:
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
        if self._left == 1:
            super().write(fd, [chunks[0][: len(chunks[0]) // 2]], offset)
        told = os.readlink(f"/proc/self/fd/{fd}").endswith((".state", ".state (deleted)"))
        return self._step("tell" if told else "write", lambda: System.write(self, fd, chunks, offset))

    def sync(self, fd: int) -> None:
        self._step("sync", lambda: System.sync(self, fd))

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename", lambda: System.rename(self, source, target))

    def mkdir(self, path: Path) -> None:
        if path.exists():
            super().mkdir(path)
        self._step("mkdir", lambda: System.mkdir(self, path))

    def unlink(self, path: Path) -> None:
        if self._code != errno.ENOSPC:
            self._step("tidy" if path.parent.name == "partials" else "unlink", lambda: System.unlink(self, path))
        else:
            super().unlink(path)

    def commit(self, commit: Callable[[], None], *, durable: bool) -> None:
        error = apsw.FullError if self._code == errno.ENOSPC else apsw.IOError
        self._step("commit", lambda: System.commit(self, commit, durable=durable), error)


async def _day(data: Path, system: RefusingSystem, code: int, thorough: bool) -> tuple[StepLog, list[RegistryError]]:
    told, failures = StepLog(), list[RegistryError]()

    def tell(kind: str, event: Event) -> None:
        told.note(kind, event)
        system.during = str(event[1] if event[0] == "right" else event[0]) if kind == "begin" else ""
        if kind == "failed" and code == errno.ENOSPC and len(failures) == 1 and event[0] != "collect":
            _freed(data, told, event, system.refused or "")

    async with open_registry(data, grace=0, boot="boot", system=system) as registry:
        await Workload(registry, tell, failures).run()
        system.stop()
        check = StateCheck(registry, told, faults=True)
        if thorough:
            await check.everything()
        else:
            await check.blobs()
            await check.manifests()
            await check.uploads()
    async with open_registry(data, grace=0, boot="boot") as registry:
        await StateCheck(registry, told, faults=True).manifests()
        if thorough:
            await sweep(registry)
            await StateCheck(registry, told, faults=True).manifests()
            assert not list((data / "trash").iterdir())
    return told, failures


def _freed(data: Path, told: StepLog, event: Event, refused: str) -> None:
    """Checks that a session which met the full disk has freed its bytes. A session that could not even be taken over,
    because that needs a rename, keeps its bytes."""
    state = ExpectedState()
    for acknowledged in told.acknowledged:
        state.apply(acknowledged)
    others = {key: offset for key, (_, offset) in state.uploads.items() if key[1] not in event or refused == "rename"}
    kept = sum(others.values())
    left = [path for path in files_below(data / "uploads") if path.stat().st_size]
    assert sum(path.stat().st_size for path in left) <= kept, f"{event}: {left}"
    assert not list((data / "trash").iterdir())
    texts = [str(word).partition(":")[2] for word in event]
    assert not [path for path in files_below(data / "partials") if any(text and text in path.name for text in texts)]
    if event[0] in ("blob", "finish"):
        wanted = str(event[-1])
        there = any(digest == wanted for _, digest in state.blobs)
        assert there or not [path for path in files_below(data / "blobs") if path.name == wanted.partition(":")[2]]


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, StorageFull), (errno.EIO, StorageFailed)])
async def test_a_refused_step_is_told_and_leaves_nothing_partial(
    code: int, error: type[RegistryError], quick: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Lets a disk that is full or broken refuse each of the tried durable steps, which include each kind of step. The
    running request then fails with an error. If the disk is full, the bytes of the upload session are freed. Other
    acknowledged content stays, and the same content can be pushed again. On a full disk, a delete succeeds: its commit
    gets space from the reserve, and its file is deleted at once."""
    refusals: set[str] = set()
    reliefs = 0
    every = 3 if code == errno.ENOSPC else 9  # a broken disk gives nothing back that a thorough check could find
    prepare_data_dir(quick / "recorded")
    recorder = RefusingSystem(0, code)
    await _day(quick / "recorded", recorder, code, thorough=True)
    steps = len(recorder.kinds)
    chosen = [*choose_steps(recorder.kinds, random.Random(random.random())), steps + 1]
    for tried, number in enumerate(chosen):
        data = quick / str(number)
        prepare_data_dir(data)
        system = RefusingSystem(number, code)
        try:
            told, failures = await _day(data, system, code, thorough=tried % every == 0)
            if system.refused is None:
                break
            refusals.add(system.refused)
            relieved = code == errno.ENOSPC and system.refused in ("commit", "rename") and not failures
            if relieved:
                reliefs += 1
            elif system.refused not in SPARE:
                assert failures, "the request was acknowledged although a step of it failed"
                assert isinstance(failures[0], error)
            assert all(isinstance(failure, error) for failure in failures), failures
        except BaseException as problem:
            problem.add_note(f"step {number} refused: {system.refused}")
            raise
        shutil.rmtree(data)
    assert refusals >= {"create", "write", "sync", "rename", "mkdir", "commit"}
    assert steps > 90
    assert (reliefs > 0) == (code == errno.ENOSPC)
    assert system.refused is None, "the last day should have come through"
    assert not told.open
