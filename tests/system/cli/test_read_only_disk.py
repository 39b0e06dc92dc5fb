"""A data directory on a file system that is mounted read-only, as the system does after errors of a disk. The tests
mount it in a mount namespace of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.commands import command_environment

COMMANDS = ("user list", "backup backups", "jobs list", "serve --listen 127.0.0.1:0 --insecure-open")
ENTREPOT = f"{sys.executable} -m registry"


def run_read_only(folder: Path, *commands: str) -> list[subprocess.CompletedProcess[str]]:
    """Fills a data directory and runs each shell command while its file system is mounted read-only."""
    namespace_command = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]
    (folder / "data").mkdir()

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*namespace_command, "--propagation", "private", "sh", "-e", "-c", script],
            cwd=folder,
            env=command_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )

    filled = run(f"{ENTREPOT} user add alice --admin --generate --data data")
    assert filled.returncode == 0, filled.stderr
    return [run(f"mount --bind data data && mount -o remount,bind,ro data\n{command}") for command in commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_say_how_to_save_the_content(tmp_path: Path, command: str) -> None:
    """A command on a read-only data directory fails with one line, which says how to save the content."""
    (done,) = run_read_only(tmp_path, f"{ENTREPOT} {command} --data {tmp_path}/data")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"entrepot: cannot write to the data directory {tmp_path}/data: Read-only file system; it was mounted "
        "read-only, or the system has made it read-only after errors of the disk. To save the content, copy the "
        "directory to another disk with `cp -a`, and name the copy with --data\n"
    )


def test_a_copy_of_a_read_only_directory(tmp_path: Path) -> None:
    """A copy of the directory that `cp -a` makes has the content, and a backup of it works. Each problem that `entrepot
    doctor` finds in the read-only directory says that it is read-only."""
    copied, diagnosed = run_read_only(
        tmp_path,
        f"cp -a data copy; {ENTREPOT} backup backups --data copy",
        f"{ENTREPOT} doctor --offline --json --data data",
    )
    assert copied.returncode == 0, copied.stderr
    problems = [
        finding["what"] for finding in json.loads(diagnosed.stdout)["findings"] if finding["level"] == "problem"
    ]
    assert problems
    assert [what for what in problems if "read-only" not in what.lower() or "the check failed" in what] == []
