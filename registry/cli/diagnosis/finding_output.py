"""Prints findings, for people or as JSON. A *finding* is one result of a check of the machine or the configuration.
The `lines` of a finding are the lines that the user should write into the `file` of the finding."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from registry.cli.diagnosis.finding import Finding, Level, worst_level
from registry.cli.output import plain_console, plural, print_json_value, print_line

_LEVEL_WORDS = {Level.OK: ("ok", "green"), Level.WARNING: ("warning", "yellow"), Level.PROBLEM: ("problem", "red")}
_INDENT = 9
"""Width of the column in front of each text: the longest word in `_LEVEL_WORDS` and two spaces."""


def print_findings(findings: Sequence[Finding], *, as_json: bool) -> int:
    """Prints the findings. The output for people ends with the worst findings, because a terminal shows the end of the
    output. Returns the exit code: 1 if there is a problem, otherwise 0."""
    worst = worst_level(findings)
    if as_json:
        print_json_value({"level": worst.value, "findings": [finding.as_json() for finding in findings]}, indent=2)
        return int(worst is Level.PROBLEM)
    printed_lines: set[tuple[str, str]] = set()
    for finding in sorted(findings, key=lambda finding: list(Level).index(finding.level)):
        _print(finding, is_repeated=(finding.file, finding.lines) in printed_lines)
        printed_lines.add((finding.file, finding.lines))
    counts = [
        plural(sum(finding.level is level for finding in findings), level.value)
        for level in (Level.PROBLEM, Level.WARNING)
        if any(finding.level is level for finding in findings)
    ]
    print_line(f"{', '.join(counts)}" if counts else "all is well", err=True)
    return int(worst is Level.PROBLEM)


def _print(finding: Finding, *, is_repeated: bool) -> None:
    """Prints one finding. `is_repeated`: whether an earlier finding has already printed the same lines for the same
    file."""
    from rich.text import Text

    console = plain_console()
    word, colour = _LEVEL_WORDS[finding.level]
    console.print(Text(f"{word:{_INDENT}}", colour) + Text(f"{finding.check}: {finding.what}"), soft_wrap=True)
    if finding.why:
        console.print(Text(f"{'':{_INDENT}}{finding.why}"), soft_wrap=True)
    if finding.next_step:
        console.print(Text(f"{'':{_INDENT}}next: {finding.next_step}", "bold"), soft_wrap=True)
    if finding.lines and is_repeated:
        console.print(Text(f"{'':{_INDENT + 4}}(the same lines as above)"))
    elif finding.lines:
        console.print(Text(textwrap.indent(finding.lines.rstrip(), " " * (_INDENT + 4))), soft_wrap=True)
