"""Report files: each process of the server writes its state to a file, and other processes read all reports."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from storage.data_dir.layout import Layout
from storage.data_dir.report_files import (
    MAX_REPORT_BYTES,
    ReportFile,
    open_report_file,
    read_all_reports,
    read_reports_in,
)
from storage.data_dir.system import System


class FullDisk(System):
    """A system with no space for files in the directory `full`."""

    def __init__(self, full: Path) -> None:
        super().__init__()
        self._full = full

    def allocate(self, fd: int, size: int) -> None:
        if self._full == Path(os.readlink(f"/proc/self/fd/{fd}")).parent:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().allocate(fd, size)


def test_a_report_replaces_the_previous_one(tmp_path: Path) -> None:
    """A new report replaces the previous report completely, even if it is shorter. `close` deletes the file."""
    file = ReportFile(tmp_path / "workers", System())
    assert read_reports_in(tmp_path / "workers") == []
    file.write(b"a" * MAX_REPORT_BYTES)
    file.write(b"short")
    assert read_reports_in(tmp_path / "workers") == [b"short"]
    with pytest.raises(ValueError, match="allowed"):
        file.write(b"a" * (MAX_REPORT_BYTES + 1))
    file.close()
    assert list((tmp_path / "workers").iterdir()) == []
    assert read_reports_in(tmp_path / "nothing") == []


def test_a_killed_process_reports_nothing(tmp_path: Path) -> None:
    """The report of a killed process does not count. A process that starts later deletes the file, once the file is
    old."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        ReportFile(tmp_path, System()).write(b"child")
        os.write(writer, b".")
        signal.pause()
        os._exit(0)
    assert os.read(reader, 1) == b"."
    assert read_reports_in(tmp_path) == [b"child"]
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert read_reports_in(tmp_path) == []
    (leftover_file,) = tmp_path.iterdir()
    first_report_file = ReportFile(tmp_path, System())
    assert leftover_file.exists()
    os.utime(leftover_file, (0, 0))
    ReportFile(tmp_path, System()).close()
    assert not leftover_file.exists()
    first_report_file.close()
    for end in (reader, writer):
        os.close(end)


def test_readers_get_only_complete_reports(tmp_path: Path) -> None:
    """While a thread writes reports, a reader gets only complete reports."""
    file, ended = ReportFile(tmp_path, System()), threading.Event()
    reports = [bytes([65 + number]) * (number * 1000 + 1) for number in range(8)]
    file.write(reports[0])

    def write() -> None:
        while not ended.is_set():
            for report in reports:
                file.write(report)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(300):
            assert set(read_reports_in(tmp_path)) <= set(reports)
    finally:
        ended.set()
        thread.join()
        file.close()


def test_a_foreign_directory_in_memory_is_refused(tmp_path: Path) -> None:
    """If the disk is full, reports are written to a directory in `/dev/shm`, a file system in memory. The server
    refuses this directory if another user may control it. Nothing in the directory is deleted."""
    layout = Layout(tmp_path / "data")
    layout.root.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "old").write_bytes(b"")
    os.utime(other / "old", (0, 0))
    try:
        layout.workers_in_memory.symlink_to(other)
        with pytest.raises(PermissionError):
            open_report_file(layout, FullDisk(layout.workers))
        layout.workers_in_memory.unlink()
        layout.workers_in_memory.mkdir()
        layout.workers_in_memory.chmod(0o777)
        with pytest.raises(PermissionError):
            open_report_file(layout, FullDisk(layout.workers))
        if os.geteuid() == 0:  # only root can change the owner of a directory
            layout.workers_in_memory.chmod(0o700)
            os.chown(layout.workers_in_memory, 12345, 12345)
            with pytest.raises(PermissionError):
                open_report_file(layout, FullDisk(layout.workers))
    finally:
        if layout.workers_in_memory.is_symlink():
            layout.workers_in_memory.unlink()
        else:
            layout.workers_in_memory.rmdir()
    assert (other / "old").exists()


def test_pipes_and_links_are_no_reports(tmp_path: Path) -> None:
    """A pipe in the directory does not block readers, and links in it are not followed."""
    directory = tmp_path / "workers"
    other = ReportFile(tmp_path / "other", System())
    other.write(b"other")
    file = ReportFile(directory, System())
    file.write(b"here")
    os.mkfifo(directory / "pipe")
    (directory / "link").symlink_to(next((tmp_path / "other").iterdir()))
    results: list[list[bytes]] = []

    def read() -> None:
        ReportFile(directory, System()).close()
        results.append(read_reports_in(directory))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert results == [[b"here"]]
    file.close()
    other.close()


def test_a_short_write_is_a_full_disk(tmp_path: Path) -> None:
    """If the system writes only a part of a report, `write` raises the error of a full disk."""

    class ShortWrite(System):
        def write(self, fd: int, chunks: Sequence[bytes | memoryview], offset: int) -> int:
            return super().write(fd, [bytes(chunks[0])[:10]], offset)

    file = ReportFile(tmp_path, ShortWrite())
    with pytest.raises(OSError, match="No space"):
        file.write(b"a" * 100)
    file.close()


def test_a_full_disk_leaves_no_file(tmp_path: Path) -> None:
    """If there is no space for a report file, an error is raised and the file is deleted."""
    with pytest.raises(OSError, match="No space"):
        ReportFile(tmp_path, FullDisk(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_reports_are_in_memory_if_the_disk_is_full(tmp_path: Path) -> None:
    """If the disk has no space for a report, the report is written to a directory in `/dev/shm`. `read_all_reports`
    finds the report there."""
    layout = Layout(tmp_path)
    file = open_report_file(layout, FullDisk(layout.workers))
    try:
        file.write(b"here")
        assert read_reports_in(layout.workers) == []
        assert read_all_reports(layout) == [b"here"]
    finally:
        file.close()
    assert not layout.workers_in_memory.exists()
    assert read_all_reports(layout) == []
