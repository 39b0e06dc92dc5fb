"""What a comparison ends with: figures and goals on the terminal, everything as JSON, and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import goals, results, table
from bench.goals import Verdict
from bench.results import Line


@dataclass(frozen=True)
class Outcome:
    """How a run went: whether every trial gave figures, and whether every goal is met."""

    sound: bool
    met: bool


def publish(
    lines: Sequence[Line],
    names: Sequence[str],
    about: Mapping[str, object],
    verdicts: Sequence[Verdict],
    plot: str,
    *,
    name: str,
    json: Path | None,
    picture: Path | None,
) -> Outcome:
    """Prints and writes it all: to the results' folder under `name`, and where else it is asked for."""
    document = results.as_json(lines, names, about)
    document["goals"] = [
        {"goal": goal.text, "wanted": goal.wanted, "measured": value, "met": value is not None and goal.met(value)}
        for goal, value in verdicts
    ]
    results.write(document, [results.FOLDER / f"{name}.json", *([json] if json else [])])
    for path in (results.FOLDER / f"{name}.svg", *([picture] if picture else [])):
        path.write_text(plot)
    print(f"\n{table.figures(lines, names)}\n\n{table.verdicts(verdicts)}")
    if taken := table.stolen(lines, names):
        print(f"\n{taken}")
    failed = [line for line in lines if line.failure]
    for line in failed:
        print(f"\nFAILED {line.name}: {line.failure}")
    return Outcome(not failed, goals.all_met(verdicts))
