"""Copies of blobs to files: what is left of a copy that was cancelled or killed."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from storage.content import digest_of
from storage.data_dir.system import System
from storage.upkeep.backup.file_copies import FileCopier
from tests.fakes.open_files import open_files_below

DATA = b"the bytes of a blob"


class WaitingSystem(System):
    """A system whose `open` waits until `may_open` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.is_opening = threading.Event()
        self.may_open = threading.Event()

    def open(self, path: Path, flags: int, mode: int = 0o640) -> int:
        self.is_opening.set()
        assert self.may_open.wait(60)
        return super().open(path, flags, mode)


async def chunks_of(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.mark.parametrize("is_check", [True, False])
async def test_cancellation_while_a_file_is_opened(tmp_path: Path, is_check: bool) -> None:
    """A copy or a check that is cancelled while a thread opens its file closes this file. A copy leaves no file."""
    system = WaitingSystem()
    copier = FileCopier(system, tmp_path, may_link=False, verify=False)
    digest = digest_of(DATA)
    present, temporary = tmp_path / "present", tmp_path / "temporary"
    present.write_bytes(DATA)
    if is_check:
        call = copier.check_file(present, digest, len(DATA), lambda _: None)
    else:
        call = copier.write_chunks(chunks_of(DATA), digest, temporary, tmp_path / "final", lambda _: None)
    running = asyncio.create_task(call)
    assert await asyncio.to_thread(system.is_opening.wait, 60)
    running.cancel()
    system.may_open.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    copier.close()
    assert open_files_below(tmp_path) == []
    assert os.listdir(tmp_path) == ["present"]


@pytest.mark.parametrize("may_clone", [True, False])
async def test_a_leftover_link_does_not_change_the_source(tmp_path: Path, may_clone: bool) -> None:
    """A run that links files was killed, and its temporary file is a hard link to the source. A run that copies then
    leaves the source as it is."""
    source, temporary, final = tmp_path / "source", tmp_path / "temporary", tmp_path / "final"
    source.write_bytes(DATA)
    os.link(source, temporary)
    copier = FileCopier(System(), tmp_path, may_link=False, may_clone=may_clone, verify=False)
    fd = os.open(source, os.O_RDONLY)
    try:
        await copier.copy_file(fd, digest_of(DATA), len(DATA), temporary, final, lambda _: None)
    finally:
        os.close(fd)
        copier.close()
    assert (source.read_bytes(), final.read_bytes()) == (DATA, DATA)
    assert source.stat().st_ino != final.stat().st_ino
