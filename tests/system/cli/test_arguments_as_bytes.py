"""Tests of arguments that are not UTF-8. On Linux, an argument is any bytes without a zero."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.commands import command_environment, entrepot
from tests.system.cli.test_command import EVERY_COMMAND, ROOT_COMMAND

NOT_UTF8 = os.fsdecode(b"\xff")


def usage_error(*args: str, folder: Path) -> str:
    """Runs a command that must fail because of wrong usage. Returns its last line on stderr."""
    done = entrepot(*args, folder=folder)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def text_parameters(name: str) -> list[Any]:
    """Returns the arguments and options of a command whose values are texts, or paths of directories."""
    command = ROOT_COMMAND
    for part in name.split():
        command = command.commands[part]
    annotations = (str, list[str], Path)
    texts = [each for each in command.params if each.type_descriptor.annotation in annotations]
    return [each for each in texts if "FILE" not in (each.metavar or "")]


@pytest.mark.parametrize("name", EVERY_COMMAND)
def test_a_text_that_is_not_utf8_is_wrong_usage(tmp_path: Path, name: str) -> None:
    """Each command refuses a text, or the path of a directory, that is not UTF-8: with one sentence and exit code 2."""
    for parameter in text_parameters(name):
        words = [NOT_UTF8] if parameter.param_type_name == "argument" else [parameter.opts[0], NOT_UTF8]
        line = usage_error(*name.split(), *words, folder=tmp_path)
        if parameter.param_type_name == "option":
            assert line == f"Error: Invalid value for {parameter.get_error_hint()}: it is not text in UTF-8"


@pytest.mark.parametrize("line", ["audit --actor", "jobs list --kind", "token revoke", "user add alice --note"])
def test_the_sentence_about_a_text_that_is_not_utf8(tmp_path: Path, line: str) -> None:
    """The sentence names the argument or option, and says what is wrong."""
    assert usage_error(*line.split(), NOT_UTF8, folder=tmp_path).endswith(": it is not text in UTF-8")


def test_a_file_name_can_have_any_bytes(tmp_path: Path) -> None:
    """The name of a file, such as that of the settings, can have bytes that are not UTF-8."""
    (tmp_path / NOT_UTF8).write_text('listen = "127.0.0.1:7777"')
    done = entrepot("config", "--format", "json", "--config", NOT_UTF8, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1:7777" in done.stdout


def test_a_data_directory_in_the_environment_that_is_not_utf8(tmp_path: Path) -> None:
    """A data directory in the environment that is not UTF-8 is wrong usage: SQLite opens no file there."""
    done = subprocess.run(
        [sys.executable, "-m", "registry", "user", "list"],
        cwd=tmp_path,
        env=command_environment(ENTREPOT_DATA=NOT_UTF8),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "entrepot: ENTREPOT_DATA: '\\udcff' is not text in UTF-8\n"
