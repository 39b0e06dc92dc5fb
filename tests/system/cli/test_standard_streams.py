"""Tests of commands whose standard streams are closed, or cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.composition import prepare_data_dir
from tests.fakes.commands import command_environment

COMMANDS = ["--version", "--help", "config", "status --json", "scrub --json"]


def run(line: str, redirection: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs `entrepot` with a redirection of the shell, on an empty registry."""
    prepare_data_dir(folder / "data")
    command = f'"{sys.executable}" -m registry {line} {redirection}'
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        env=command_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("line", COMMANDS)
@pytest.mark.parametrize(
    ("redirection", "reason"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_output_that_cannot_be_written(tmp_path: Path, line: str, redirection: str, reason: str) -> None:
    """If the standard output is full or closed, the last line on stderr says so, and the exit code is 1."""
    done = run(line, redirection, tmp_path)
    assert done.returncode == 1, done
    assert done.stderr.splitlines()[-1] == f"entrepot: cannot write to the standard output: {reason}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("line", COMMANDS)
def test_a_reader_that_has_ended(tmp_path: Path, line: str) -> None:
    """If the reader of the output has ended, the command ends without a message about it."""
    done = run(line, "| exec 0<&-", tmp_path)
    assert "Traceback" not in done.stderr
    assert "standard output" not in done.stderr
    assert "Broken pipe" not in done.stderr


def test_an_output_of_which_a_part_is_read(tmp_path: Path) -> None:
    """If the reader ends after the first line of a long output, the command ends quietly."""
    done = run("config", "| head -1", tmp_path)
    assert done.stdout.startswith("setting")
    assert done.stderr == ""


def test_a_command_without_output_needs_no_stdout(tmp_path: Path) -> None:
    """A command that prints nothing on stdout succeeds without it."""
    assert run("key rotate", ">&-", tmp_path).returncode == 0


def test_closed_streams_are_not_files_of_the_registry(tmp_path: Path) -> None:
    """If all three streams are closed, the files of the registry get other descriptors, so that no text is written into
    them, and a read of stdin finds nothing."""
    done = run("user add alice --password-file -", "<&- >&- 2>&-", tmp_path)
    assert done.returncode in (1, 2)
    assert run("fsck", "", tmp_path).returncode == 0
    assert os.listdir(tmp_path) == ["data"]
