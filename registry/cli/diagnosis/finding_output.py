"""Prints findings, for people or as JSON. A *finding* is one result of a check of the machine or the configuration."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from registry.cli.diagnosis.finding import Finding, Level, worst_level
from registry.cli.output import plain_console, plural, print_json_value, print_line

_MARKS = {Level.OK: ("ok", "green"), Level.WARNING: ("warning", "yellow"), Level.PROBLEM: ("problem", "red")}
_INDENT = 9
"""How many columns are in front of each text: the width of the longest mark, and two spaces."""


def print_findings(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Prints the findings. In the output for people, the worst come last, because people see the end of the output
    first in a terminal. Returns the exit code: 1 if there is a problem, otherwise 0."""
    level = worst_level(findings)
    if as_json:
        print_json_value({"level": level.value, "findings": [each.as_json() for each in findings]}, indent=2)
        return int(level is Level.PROBLEM)
    printed_lines: set[tuple[str, str]] = set()
    for finding in sorted(findings, key=lambda each: list(Level).index(each.level)):
        _print(finding, is_repeated=(finding.file, finding.lines) in printed_lines)
        printed_lines.add((finding.file, finding.lines))
    counts = [
        plural(sum(finding.level is each for finding in findings), each.value)
        for each in (Level.PROBLEM, Level.WARNING)
        if any(finding.level is each for finding in findings)
    ]
    print_line(f"{', '.join(counts)}" if counts else "all is well", err=True)
    return int(level is Level.PROBLEM)


def _print(finding: Finding, *, is_repeated: bool) -> None:
    """Prints one finding. `finding.lines` are lines to write into a file as the solution. `is_repeated`: the same lines
    for the same file were already printed with an earlier finding."""
    from rich.text import Text

    console = plain_console()
    mark, colour = _MARKS[finding.level]
    console.print(Text(f"{mark:{_INDENT}}", colour) + Text(f"{finding.check}: {finding.what}"), soft_wrap=True)
    if finding.why:
        console.print(Text(f"{'':{_INDENT}}{finding.why}"), soft_wrap=True)
    if finding.next_step:
        console.print(Text(f"{'':{_INDENT}}next: {finding.next_step}", "bold"), soft_wrap=True)
    if finding.lines and is_repeated:
        console.print(Text(f"{'':{_INDENT + 4}}(the same lines as above)"))
    elif finding.lines:
        console.print(Text(textwrap.indent(finding.lines.rstrip(), " " * (_INDENT + 4))), soft_wrap=True)
