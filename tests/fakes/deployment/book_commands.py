"""Commands of the book that tests/deploy runs, in the words of the page.

A test takes its command from the page with `book_command`, so the test fails if the page no longer has the command.
tests/docs checks that each command in a block marked `not run here: tests/deploy` is taken by a test.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tests.fakes.book_page import NOT_RUN, command_blocks, pages_in_english

MARK: Final = f"{NOT_RUN}tests/deploy"
"""The mark of the blocks whose commands tests/deploy runs."""
_COMMENT: Final = re.compile(r" {2,}#.*$")
_JOINED_LINES: Final = re.compile(r"\\\n\s*")


def commands_to_run(page: str) -> list[str]:
    """Returns the commands of a page's blocks with the mark `MARK`, without prompts, comments and output. Commands that
    are joined by `&&` are returned one by one."""
    found = []
    for block in command_blocks(pages_in_english()[page]):
        if block.mark != MARK:
            continue
        for line in _JOINED_LINES.sub("", block.text).splitlines():
            if block.language == "sh" or line.startswith(("$ ", "# ")):
                found += _COMMENT.sub("", line.removeprefix("$ ").removeprefix("# ")).split(" && ")
    return found


def book_command(page: str, beginning: str, *changes: tuple[str, str]) -> str:
    """Returns the command of a page that begins with `beginning`. `changes`: texts in the command, each with the text
    that replaces it, for what differs in the test, such as an address or the name of a file. Raises AssertionError
    unless the page has exactly one such command, and the command has each text that is to be replaced."""
    found = [command for command in dict.fromkeys(commands_to_run(page)) if command.startswith(beginning)]
    assert len(found) == 1, f"{page}.md has {found} for {beginning!r}"
    command = found[0]
    for old, new in changes:
        assert old in command, f"{command!r} of {page}.md has no {old!r}"
        command = command.replace(old, new)
    return command


def shown_file(page: str, command: str) -> str:
    """Returns the lines that a block of the page shows below the command `command`, such as those of `cat FILE`, up to
    the next command. Raises AssertionError if no block has the command."""
    for block in command_blocks(pages_in_english()[page]):
        if block.mark == MARK and f" {command}\n" in block.text:
            lines = block.text.partition(f" {command}\n")[2].splitlines()
            end = next((number for number, line in enumerate(lines) if line.startswith(("$ ", "# "))), len(lines))
            return "".join(f"{line}\n" for line in lines[:end])
    raise AssertionError(f"{page}.md has no command {command!r}")


def taken_commands(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the page and the beginning of each command that a test below `folder` takes with `book_command` or
    `shown_file`."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in ("book_command", "shown_file"):
                page, beginning = (ast.literal_eval(argument) for argument in node.args[:2])
                yield page, beginning
