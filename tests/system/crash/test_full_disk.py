"""Tests on disks that are really full."""

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


def test_a_full_disk_refuses_with_507_and_works_again_once_there_is_room(tmp_path: Path) -> None:
    """On a disk of 24 MiB, a larger push gets 507 in the format of the OCI spec, in one body and in chunks, and its
    space is freed. Then a small push works. If there is no room for the metadata, a manifest gets 507, and can be
    pushed once there is room."""
    run_alone("tests.system.crash.full_disk", tmp_path)


def test_a_disk_that_fills_up_under_a_mirror(tmp_path: Path) -> None:
    """If the disk becomes full in the middle of a blob, the readers of both workers are cut off, and the space of the
    blob is freed. The next client gets the blob from the upstream, without it being stored. Cached content is served as
    before. Once there is room, the blob is stored."""
    run_alone("tests.system.crash.full_disk_mirror", tmp_path)


def test_a_full_disk_is_emptied_through_the_registry(tmp_path: Path) -> None:
    """Without a free byte, reads work, the server starts, its health checks and its log say what is wrong, pushes get
    507, and each DELETE succeeds. The next collection frees the space. Then pushes work again without a restart, and
    the reserve has its space again."""
    run_alone("tests.system.crash.full_disk_emptied", tmp_path, "tmpfs")


SCENARIOS = {
    "without_reserve": "A data directory of an earlier version, without a reserve: reads are served from the database "
    "as it stands, and deletes work as soon as there is room to open it, without a restart.",
    "killed": "After a kill, with a log that has to be read first.",
    "no_inodes": "No file more can be made: what is there is read, deleted and collected.",
    "rights": "Accounts can be disabled, beside a server and without one, and failed logins are counted.",
    "log_beside": "The server's own output goes to the full disk: it starts, serves, and ends with 0.",
    "empty": "A first start is refused in one line that says what to do.",
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_server_on_a_full_disk(scenario: str, tmp_path: Path) -> None:
    """On a disk without a free byte or inode, what `SCENARIOS` says of each scenario is true."""
    run_alone("tests.system.crash.full_disk_starts", tmp_path, scenario)


def run_alone(module: str, folder: Path, *args: str) -> None:
    """Runs a program in its own mount namespace."""
    alone = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    run = subprocess.run(
        [*alone, sys.executable, "-m", module, str(folder), *args],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout


def test_a_blob_above_the_largest_file_the_system_allows_is_refused_with_507(tmp_path: Path) -> None:
    """If the system limits the size of files (RLIMIT_FSIZE), a larger blob gets 507 and leaves nothing. A smaller one
    works."""
    with running_server(tmp_path, workers=2) as server:
        for pid in server.worker_pids():
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (4 * MIB, 4 * MIB))
        large, small = random.Random(4).randbytes(6 * MIB), random.Random(5).randbytes(MIB)
        assert_storage_full(push(server, "team/app", large))
        assert pull(server, "team/app", large) is None
        assert not list((server.data / "uploads").iterdir())
        assert push(server, "team/app", small)[0] == 201
        assert pull(server, "team/app", small) == small
