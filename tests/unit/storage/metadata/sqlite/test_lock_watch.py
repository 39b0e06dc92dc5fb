"""Tests of the warning about a process that holds the lock of the database for long."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.access import AccountKind, AccountName
from storage.composition import open_registry, prepare_data_dir
from storage.data_dir.locks import Flock
from storage.metadata.sqlite.lock_watch import LockWatch
from tests.fakes.store_accounts import BY

HOLD = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held'); time.sleep(600)"


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    (tmp_path / "lock").touch()
    return tmp_path / "lock"


@pytest.fixture
def holder(lock_file: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock, and is stopped as by Ctrl-Z."""
    with subprocess.Popen([sys.executable, "-uc", HOLD, lock_file], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGSTOP)
        yield process
        process.kill()


def test_a_long_wait_names_the_stopped_holder(
    lock_file: Path, holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A process that waits for the lock logs the pid and the command of the holder, and how to continue it."""
    caplog.set_level(logging.WARNING)
    fd = os.open(lock_file, os.O_RDWR)
    watch = LockWatch(fd, warn_seconds=0.02)
    watch.begin_wait()
    deadline = time.monotonic() + 30
    while not caplog.messages and time.monotonic() < deadline:
        time.sleep(0.01)
    holder.kill()
    with Flock(fd):
        watch.end_wait()
    watch.close()
    os.close(fd)
    assert len(caplog.messages) == 1
    assert f"process {holder.pid} ({sys.executable} -uc {HOLD}" in caplog.messages[0]
    assert f"which is stopped; continue it with `fg` or `kill -CONT {holder.pid}`" in caplog.messages[0]


@pytest.mark.slow
def test_no_warning_after_a_short_wait(lock_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A wait that ends soon causes no warning, neither during the wait nor later."""
    fd = os.open(lock_file, os.O_RDWR)
    watch = LockWatch(fd, warn_seconds=0.2)
    watch.begin_wait()
    watch.end_wait()
    time.sleep(0.5)
    watch.close()
    os.close(fd)
    assert caplog.messages == []


async def test_changes_are_made_although_no_watch_can_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the operating system refuses to start the thread of the watch, because the process has too many threads, the
    database still works. Only the warning is missing."""
    start = threading.Thread.start

    def refuse_watch(thread: threading.Thread) -> None:
        if thread.name == "lock watch":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_watch)
    prepare_data_dir(tmp_path)
    async with asyncio.timeout(30), open_registry(tmp_path) as store:
        await store.accounts.add_account(AccountName("ann"), AccountKind.USER, password_hash=None, by=BY)
