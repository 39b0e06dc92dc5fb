"""Tests of servers on small disks that are really filled. Each test runs a program that mounts such a disk."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.server_process import ROOT, running_server
from tests.system.crash.full_disk import MIB, assert_storage_full, pull, push


def test_pushes_to_a_full_disk_get_507_until_space_is_free(tmp_path: Path) -> None:
    """On a disk of 24 MiB, a push of 40 MiB gets 507 with an error body as in the OCI spec, whether it is sent in one
    body or in chunks. Its space is freed, and a small push then works. If there is no space for the metadata, a
    manifest gets 507. It can be pushed once there is space."""
    run_alone("tests.system.crash.full_disk", tmp_path)


def test_disk_becomes_full_while_a_mirror_downloads(tmp_path: Path) -> None:
    """If the disk becomes full while a mirror downloads a blob, the clients that read this blob are disconnected on
    both workers, and the space of the blob is freed. The next client gets the blob from the upstream, and the mirror
    does not store it. Cached content is served as before. Once there is space, the blob is stored."""
    run_alone("tests.system.crash.full_disk_mirror", tmp_path)


def test_a_full_disk_is_emptied_through_the_registry(tmp_path: Path) -> None:
    """On a disk without a free byte, the server starts and reads work. The health check and the log report the full
    disk. Pushes get 507, and each DELETE succeeds. The next garbage collection frees the space. Then pushes work again
    without a restart, and the reserve (the file whose space is used on a full disk) has its size again."""
    run_alone("tests.system.crash.full_disk_emptied", tmp_path, "tmpfs")


@pytest.mark.parametrize("size", ["24m", "48m", "64m"])
def test_a_small_full_disk_with_a_long_log_is_emptied(tmp_path: Path, size: str) -> None:
    """If a small disk becomes full when the database's log is almost long enough for a checkpoint, everything can be
    deleted: the checkpoint leaves enough of the reserve for the next deletes."""
    run_alone("tests.system.crash.full_disk_long_log", tmp_path, size)


SCENARIOS = {
    "without_reserve": "A data directory of an earlier version, without a reserve: reads are served from the database "
    "as it stands, and deletes work as soon as there is space to open the database for writing, without a restart.",
    "killed": "A server starts after a kill, although it must recover the write-ahead log first.",
    "no_inodes": "The disk has no free inode: content can be read, deleted and collected.",
    "account_commands": "Accounts can be disabled, whether a server runs or not, and failed logins are counted.",
    "log_on_full_disk": "The server's output goes to a file on the full disk: it starts, serves, and exits with 0.",
    "empty_directory": "A first start fails with an error of one line that says what to do.",
}
"""The scenarios of `full_disk_starts`, and what must hold in each."""


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_server_on_a_full_disk(scenario: str, tmp_path: Path) -> None:
    """On a disk without a free byte or inode, the server behaves as `SCENARIOS` describes."""
    run_alone("tests.system.crash.full_disk_starts", tmp_path, scenario)


def run_alone(module: str, folder: Path, *args: str) -> None:
    """Runs a program in its own mount namespace, and checks that it succeeds."""
    namespace_command = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    run = subprocess.run(
        [*namespace_command, sys.executable, "-m", module, str(folder), *args],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout


def test_blob_above_the_file_size_limit_gets_507(tmp_path: Path) -> None:
    """If the system limits the size of files to 4 MiB (RLIMIT_FSIZE), a push of a larger blob gets 507 and leaves no
    file. A push of a smaller blob works."""
    with running_server(tmp_path, workers=2) as server:
        for pid in server.worker_pids():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))
        large, small = random.Random(4).randbytes(6 * MIB), random.Random(5).randbytes(MIB)
        assert_storage_full(push(server, "team/app", large))
        assert pull(server, "team/app", large) is None
        assert not list((server.data / "uploads").iterdir())
        assert push(server, "team/app", small)[0] == 201
        assert pull(server, "team/app", small) == small
