"""Reads the console blocks of a page of the documentation, and compares the output of commands with the page.

A block can have a mark for the tests. The mark follows the language of the block, where readers do not see it:

    ```console test: NAME            before this block, the test runs the preparation NAME
    ```console not run here: FILE    the test does not run this block; FILE is the test that does

A line of output that begins with two spaces continues the line before it. A line `…` stands for any lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

_BLOCK: Final = re.compile(r"^```(toml|console)(?: (test|not run here): (.+?))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SHAPES: Final = [
    (re.compile(r"─+"), "LINE"),
    (re.compile(r"sha(256|512)([:-])[0-9a-f]{6,}…?"), r"sha\1\2DIGEST"),
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "UUID"),
    (re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d[:-]\d\d([:-]\d\d)?Z?(\.\d+)?)?( UTC)?"), "TIME"),
    (re.compile(r"\d+(\.\d+)? ([KMGT]i)?B\b"), "SIZE"),
    (re.compile(r"SIZE (linked|copied)"), "SIZE brought"),  # a target on the same file system gets links
    (re.compile(r"\b\d+\.\d s\b"), "SECONDS"),
    (re.compile(r"\b(cli:)[\w-]+"), r"\1ACTOR"),
    (re.compile(r"[ \t]+"), " "),
]
"""Patterns of text that differs between runs, and the text that replaces it."""
_LOOSE_SHAPES: Final = [
    (re.compile(r"\bruns for [^,]+"), "runs for TIME"),
    (re.compile(r"\b\d\d:\d\d:\d\d\b"), "TIME"),
    (re.compile(r"\d+"), "N"),
    (re.compile(r"\bN (\w+?)s\b"), r"N \1"),  # the singular and the plural of a noun
]
"""Further patterns for the state of a server, in which numbers differ as well."""


@dataclass(frozen=True)
class Command:
    """A command on a page, with the output that the page shows, and the expected exit code."""

    line: str
    output: tuple[str, ...]
    exit_code: int


@dataclass(frozen=True)
class Section:
    """The part of a page below one heading. `parts`: the commands and the names of preparations, in the order of the
    page. `settings`: the text of all TOML blocks."""

    title: str
    settings: str
    parts: tuple[Command | str, ...]
    elsewhere: dict[str, list[str]] = field(hash=False)
    """The commands that this test does not run, by the name of the test that runs them."""


def read_sections(page: Path) -> list[Section]:
    """Returns the sections of a page, which begin with headings of the second level."""
    return [_section(text) for text in page.read_text().split("\n## ")[1:]]


def _section(text: str) -> Section:
    settings: list[str] = []
    parts: list[Command | str] = []
    elsewhere: dict[str, list[str]] = {}
    for language, mark, name, block in _BLOCK.findall(text):
        commands = list(commands_of(block)) if language == "console" else []
        if language == "toml":
            settings.append(block)
        if mark == "test":
            parts.append(name)
        if mark == "not run here":
            elsewhere[name] = [command.line for command in commands]
        else:
            parts.extend(commands)
    return Section(text.partition("\n")[0], "\n".join(settings), tuple(parts), elsewhere)


def commands_of(block: str) -> Iterator[Command]:
    """Yields the commands of a console block. A command whose line ends with a backslash continues on the next line.
    The output of a following `echo $?` is the expected exit code."""
    block = re.sub(r"\\\n\s*", "", block)
    entries = [text.splitlines() for text in re.split(r"^\$ ", block, flags=re.MULTILINE) if text]
    for (line, *output), following in zip(entries, [*entries[1:], [""]], strict=True):
        if line != "echo $?":
            code = int(following[1]) if following[0] == "echo $?" else 0
            yield Command(line, tuple(joined_lines(output)), code)


def joined_lines(lines: Sequence[str]) -> list[str]:
    """Returns the lines. Appends each line that begins with two spaces to the line before it."""
    joined: list[str] = []
    for line in lines:
        if line.startswith("  ") and joined:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line)
    return joined


def shape_of(line: str, *, is_loose: bool = False) -> str:
    """Returns the shape of a line of output: fixed words replace digests, times, sizes, and other parts that differ
    between runs. `is_loose`: also replaces numbers."""
    for pattern, name in [*_SHAPES, *(_LOOSE_SHAPES if is_loose else [])]:
        line = pattern.sub(name, line)
    return line.strip()


def has_shape(output: str, expected: Sequence[str], *, is_loose: bool = False) -> bool:
    """Returns whether the lines of `output` have the shapes of the `expected` lines, in the same order. An expected
    line `…` stands for any lines. `is_loose`: numbers may differ, and an output line that begins with two spaces
    continues the line before it."""
    shapes = [
        ".*?" if line == "…" else re.escape(shape_of(line, is_loose=is_loose) + "\n") for line in expected if line
    ]
    lines = joined_lines(output.splitlines()) if is_loose else output.splitlines()
    printed = "".join(shape_of(line, is_loose=is_loose) + "\n" for line in lines if line.strip())
    return re.fullmatch("".join(shapes), printed, re.DOTALL) is not None
