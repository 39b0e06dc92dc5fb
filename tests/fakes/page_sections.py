"""The console blocks of a page of docs, and whether a command prints what the page shows.

A page says behind the language of a block, where readers do not see it, what its test has to know:

    ```console test: NAME            before this block the test prepares what NAME stands for
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
    (re.compile(r"\bN (\w+?)s\b"), r"N \1"),
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
    """What a page has below one heading. `parts` are commands and the names of what the test prepares, in the page's
    order. `settings` are its TOML blocks, one after another."""

    title: str
    settings: str
    parts: tuple[Command | str, ...]
    elsewhere: dict[str, list[str]] = field(hash=False)
    """The commands that the test does not run, by the test that does."""


def read_sections(page: Path) -> list[Section]:
    """Reads the sections of the second level."""
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
    """Yields the commands of a console block. A command goes on after a line that ends with a backslash."""
    block = re.sub(r"\\\n\s*", "", block)
    ended = [text.splitlines() for text in re.split(r"^\$ ", block, flags=re.MULTILINE) if text]
    for (line, *output), following in zip(ended, [*ended[1:], [""]], strict=True):
        if line != "echo $?":
            code = int(following[1]) if following[0] == "echo $?" else 0
            yield Command(line, tuple(joined_lines(output)), code)


def joined_lines(lines: Sequence[str]) -> list[str]:
    """Returns the lines, with those that begin with two spaces at the end of the line before them."""
    joined: list[str] = []
    for line in lines:
        if line.startswith("  ") and joined:
            joined[-1] += " " + line.strip()
        else:
            joined.append(line)
    return joined


def shape_of(line: str, *, is_loose: bool = False) -> str:
    """Returns a line of output without the parts that differ between runs: digests, times, sizes, and the widths of
    tables. `is_loose`: also without numbers."""
    for pattern, name in [*_SHAPES, *(_LOOSE_SHAPES if is_loose else [])]:
        line = pattern.sub(name, line)
    return line.strip()


def has_shape(output: str, expected: Sequence[str], *, is_loose: bool = False) -> bool:
    """Returns whether a command has printed exactly the lines whose shapes the page shows, in this order, except where
    the page has `…`. `is_loose`: numbers may differ, and lines that begin with two spaces continue the line before them
    in the output as well."""
    shapes = [
        ".*?" if line == "…" else re.escape(shape_of(line, is_loose=is_loose) + "\n") for line in expected if line
    ]
    lines = joined_lines(output.splitlines()) if is_loose else output.splitlines()
    printed = "".join(shape_of(line, is_loose=is_loose) + "\n" for line in lines if line.strip())
    return re.fullmatch("".join(shapes), printed, re.DOTALL) is not None
