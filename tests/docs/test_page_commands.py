"""Tests of the commands in the book. The tests run each block of commands, or the block states why not. Each command
that a page names exists.

Blocks that need docker are run in tests/deploy/test_book_commands.py. The pages upkeep.md, moving.md, air-gapped.md and
operations.md are run section by section in tests/system/cli. The tests there compare the whole output with the page.
The tests here only check that each line that the page shows is printed; a command may print further lines.
"""

from __future__ import annotations

import re
import shlex
from contextlib import ExitStack
from pathlib import Path

import pytest

from book.pages import LANGUAGES, page_file, page_names
from tests.fakes.book_page import (
    NOT_RUN,
    PREPARATIONS,
    PageRun,
    command_blocks,
    needs_clients,
    pages_in_english,
    root_files,
    runnable_blocks,
)
from tests.fakes.deployment.book_commands import commands_to_run, taken_commands
from tests.fakes.page_sections import commands_of
from tests.fakes.server_process import ROOT
from tests.system.cli.test_command import EVERY_COMMAND, ROOT_COMMAND, options_of

RUN_BY_SECTION = ("upkeep", "moving", "air-gapped", "operations")
"""The pages that tests/system/cli runs."""
PAGES_RUN_AS_A_WHOLE = {name: file for name, file in pages_in_english().items() if name not in RUN_BY_SECTION}
"""The files of all other pages, by the names of the pages. The blocks of such a page are run one after the other, in
one folder."""
PAGES = [name for name, file in PAGES_RUN_AS_A_WHOLE.items() if not all(map(needs_clients, runnable_blocks(file)))]
"""The pages that this module runs: those of `PAGES_RUN_AS_A_WHOLE` with a block that needs no docker, podman or skopeo.
The other pages have only blocks that need these clients, or no block to run."""
NOT_RUN_HERE = {
    "README": {"tests/deploy"},
    "quick-start": {"tests/deploy"},
    "accelerator": {"a cluster cannot be had in the tests", "tests/system/ops/test_client_check.py"},
    "ci": {"a cluster cannot be had in the tests"},
    "accounts": {"tests/system/admin/sso/test_sessions.py"},
    "events": {"tests/system/events"},
    "security": {"tests/system/hostile"},
    "deployment": {"tests/deploy"},
    "kubernetes": {"a cluster cannot be had in the tests"},
    "alerts": {"tests/system/ops"},
}
"""For each page, why some blocks are not run here: the tests that run their commands, or one of `REASONS`."""
WITHOUT_TEST = {"git pull", "docker compose build --pull"}
"""Commands of docs/en/deployment.md that tests/deploy does not run: they need a remote repository and base images."""
REASONS = {"a cluster cannot be had in the tests"}


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_work(tmp_path: Path, page: str) -> None:
    """Each command of the page has the exit code that the page shows, and prints the lines that the page shows."""
    with ExitStack() as stack:
        PageRun(tmp_path, stack).run_page(PAGES_RUN_AS_A_WHOLE[page])


def test_the_blocks_that_are_not_run() -> None:
    """The blocks that are not run are those in `NOT_RUN_HERE`, and the tests that it names exist."""
    found: dict[str, set[str]] = {}
    for page, file in PAGES_RUN_AS_A_WHOLE.items():
        for block in command_blocks(file):
            assert block.language == "console" or block.mark.startswith(NOT_RUN), f"no test runs {page}.md:{block.line}"
            if block.mark.startswith(NOT_RUN):
                found.setdefault(page, set()).add(block.mark.removeprefix(NOT_RUN))
    assert found == NOT_RUN_HERE
    named_paths = set().union(*NOT_RUN_HERE.values()) - REASONS
    assert [path for path in named_paths if not (ROOT / path).exists()] == []


def test_deployment_commands_are_taken_from_the_pages() -> None:
    """Each command in a block with the mark `not run here: tests/deploy` is tested: a test in tests/deploy takes the
    command from the page, or a block that is run here has the same command. Only the commands in `WITHOUT_TEST` are not
    tested."""
    run_here = {
        command.line.partition("  #")[0]
        for file in PAGES_RUN_AS_A_WHOLE.values()
        for block in runnable_blocks(file)
        for command in commands_of(block.text)
    }
    tested_beginnings = [beginning for _, beginning in taken_commands(ROOT / "tests" / "deploy")]
    # tests/system/cli runs air-gapped.md, but one block of this page has the mark.
    untested_commands = {
        command
        for page in PAGES_RUN_AS_A_WHOLE | {"air-gapped": None}
        for command in commands_to_run(page)
        if command not in run_here and not any(map(command.startswith, tested_beginnings))
    }
    assert untested_commands == WITHOUT_TEST


def test_every_preparation_is_used() -> None:
    """A preparation is a function that adds what a block needs, such as accounts; the mark of the block names it after
    `test:`. Each preparation is named by a page, and each preparation that a page names exists."""
    marks = [block.mark for file in PAGES_RUN_AS_A_WHOLE.values() for block in runnable_blocks(file)]
    assert {mark.partition("test: ")[2] for mark in marks if "test: " in mark} == set(PREPARATIONS)


def test_the_pages_have_many_commands() -> None:
    """The tests find many commands in the pages."""
    found = [block for file in PAGES_RUN_AS_A_WHOLE.values() for block in runnable_blocks(file)]
    assert len([command for block in found for command in commands_of(block.text)]) > 60


def named_commands() -> list[tuple[str, str]]:
    """Returns each text `entrepot …` in the sentences and blocks of all documents, with its file."""
    files = [file for page in page_names() for language in LANGUAGES if (file := page_file(page, language)).exists()]
    found: set[tuple[str, str]] = set()
    for file in [*files, *root_files()]:
        text = file.read_text()
        lines = re.findall(r"`(?:\w+=\S+ )?entrepot ([^`\n]+)`", text)
        lines += re.findall(r"^ *[$#] (?:\w+=\S+ )?entrepot ([^|>\n]+)", text, re.MULTILINE)
        found |= {(line.strip(), file.relative_to(ROOT).as_posix()) for line in lines}
    return sorted(found)


KNOWN_NAMES = {*EVERY_COMMAND, *(name for name, found in ROOT_COMMAND.commands.items() if found.callback)}
"""The names of all commands, and of the groups of commands that are also commands themselves."""


def test_named_commands_exist() -> None:
    """Each command that a document names exists, with all its options. A document may also name a group of commands,
    such as `entrepot mirror …`."""
    groups = {name.rpartition(" ")[0] for name in EVERY_COMMAND}
    wrong_commands = []
    for line, file in named_commands():
        words = shlex.split(line.replace("…", ""), comments=True)
        names = [" ".join(words[:count]) for count in (3, 2, 1)]
        name = next((name for name in names if name in KNOWN_NAMES), None)
        options = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
        if name is None:
            if names[-1] not in groups and not options & {"--version", "--install-completion"}:
                wrong_commands.append((file, line))
        elif not options <= options_of(name):
            wrong_commands.append((file, line))
    assert wrong_commands == []
