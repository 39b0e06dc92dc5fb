"""Tests of the command `entrepot` as a whole: help, version, completion of a shell, wrong usage."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from registry import __version__
from registry.cli.command import app
from registry.cli.options import MAX_ID
from storage.composition import layout_of, prepare_data_dir
from tests.fakes.commands import command_environment, entrepot, entrepot_program
from tests.fakes.server_process import ROOT


def test_version(tmp_path: Path) -> None:
    """`--version` prints the package's version."""
    assert entrepot_program("--version", folder=tmp_path).stdout == f"entrepot {__version__}\n"


def test_help_lists_the_commands(tmp_path: Path) -> None:
    """The help of `entrepot` lists all commands."""
    output = entrepot("--help", folder=tmp_path).stdout
    assert [name for name in ROOT_COMMAND.commands if f"\n  {name} " not in output] == []
    assert len(ROOT_COMMAND.commands) > 20


def commands(command: Any, name: str = "") -> Iterator[str]:
    """Yields the full names of all commands below a command of click."""
    subcommands = getattr(command, "commands", None)
    if subcommands is None:
        yield name
        return
    for part, inner in subcommands.items():
        yield from commands(inner, f"{name} {part}".strip())


ROOT_COMMAND: Any = typer.main.get_command(app)
EVERY_COMMAND = list(commands(ROOT_COMMAND))


@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_help_has_examples(name: str) -> None:
    """Each command's help ends with examples that can be typed."""
    result = CliRunner().invoke(app, [*name.split(), "-h"], prog_name="entrepot")
    assert result.exit_code == 0
    assert f"\n    entrepot {name}" in result.stdout


@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_numbers_are_limited(name: str) -> None:
    """Each argument and option that is a whole number has a limit, so that no number is too large for the database."""
    command = ROOT_COMMAND
    for part in name.split():
        command = command.commands[part]
    numbers = [each for each in command.params if getattr(each, "type_descriptor", None) is not None]
    unlimited = [
        each.name
        for each in numbers
        if each.type_descriptor.annotation is int and (each.max is None or each.max > MAX_ID)
    ]
    assert unlimited == []


def test_job_number_beyond_the_limit_is_refused(tmp_path: Path) -> None:
    """A job number that the database cannot store is a usage error."""
    done = entrepot("jobs", "show", "9" * 20, folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def options_of(name: str) -> set[str]:
    """Returns the options of a command."""
    command = ROOT_COMMAND
    for part in name.split():
        command = command.commands[part]
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_similar_commands_have_the_same_options(name: str) -> None:
    """Each command with the option `--config` also has `--data`. Each command that shows data has `--json`."""
    options = options_of(name)
    assert "--config" not in options or "--data" in options
    if name.split()[-1] in ("list", "show", "status", "inspect", "config", "audit"):
        assert "--json" in options


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(tmp_path: Path, shell: str) -> None:
    """`--show-completion` prints the completion script for the shell that runs the command. The command recognises the
    shell by the name of its program, so the test uses a copy of bash with the name of the shell."""
    program = shutil.copy(shutil.which("bash") or "/bin/bash", tmp_path / shell)
    command = f"{shlex.quote(sys.executable)} -m registry --show-completion; exit $?"
    result = subprocess.run(
        [program, "-c", command], cwd=tmp_path, env=command_environment(), capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert f"complete_{shell}" in result.stdout


def test_completion_of_a_command(tmp_path: Path) -> None:
    """The completion of `entrepot ins` is `inspect`."""
    result = entrepot_program(
        folder=tmp_path, _ENTREPOT_COMPLETE="complete_bash", COMP_WORDS="entrepot ins", COMP_CWORD="1"
    )
    assert result.stdout.split() == ["inspect"]


@pytest.mark.parametrize("args", [["--no-such"], ["no-such"], ["serve", "extra"], ["inspect"]])
def test_bad_usage(tmp_path: Path, args: list[str]) -> None:
    """For wrong usage, the exit code is 2, and stderr says what is wrong, without a traceback."""
    result = entrepot_program(*args, folder=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "line",
    [
        "status",
        "events list",
        "fsck",
        "gc",
        "scrub",
        "quota list",
        "user list",
        "inspect team/app:1",
        "reload",
        "serve",
    ],
)
def test_a_data_directory_that_cannot_be_read(tmp_path: Path, line: str) -> None:
    """If the system refuses the path of the data directory, here because a name is too long, the command fails with the
    reason in one line."""
    result = entrepot(*line.split(), "--data", tmp_path / ("a" * 300), folder=tmp_path)
    assert result.returncode == 1
    assert "File name too long" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("line", ["status", "events list", "fsck", "inspect team/app:1"])
def test_a_file_that_cannot_be_opened(tmp_path: Path, line: str) -> None:
    """If a file of the data directory cannot be opened, the command fails with one line that has the file and the
    reason. Here the file is the reserve (it only occupies disk space), and a directory is in its place."""
    prepare_data_dir(tmp_path / "data")
    reserve = layout_of(tmp_path / "data").reserve
    reserve.unlink()
    reserve.mkdir()
    result = entrepot(*line.split(), "--data", tmp_path / "data", folder=tmp_path)
    assert result.returncode == 1
    assert result.stderr == f"entrepot: {reserve}: Is a directory\n"


def test_command_line_imports_no_large_packages() -> None:
    """To be fast, the command line module imports neither the web framework, nor the server, nor the database, nor
    rich."""
    code = "import sys, registry.__main__; print(*{'fastapi', 'uvicorn', 'apsw', 'rich'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "\n"
