"""Which rows of a table are measured.

What a comparison ends with: figures and goals on the terminal, everything as JSON, and a plot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from bench.errors import BenchFailed
from bench.report import goals, measurements, tables
from bench.report.goals import GoalResult
from bench.report.measurements import RowSamples


class NamedRow(Protocol):
    """Whatever `--only` can name."""

    name: str


AnyRow = TypeVar("AnyRow", bound=NamedRow)


def pick_rows(rows: Sequence[AnyRow], only: str | None) -> list[AnyRow]:
    """The rows of a comma-separated list, in their own order; all without one. Raises BenchFailed for a name that is
    none."""
    known = [row.name for row in rows]
    wanted = [name.strip() for name in only.split(",")] if only else known
    if unknown := [name for name in wanted if name not in known]:
        raise BenchFailed(f"no row is called {', '.join(unknown)}; there are: {', '.join(known)}")
    return [row for row in rows if row.name in wanted]


@dataclass(frozen=True)
class RunOutcome:
    """How a run went: whether every trial gave figures, and whether every goal is met."""

    is_complete: bool
    met: bool


def publish_results(
    lines: Sequence[RowSamples],
    names: Sequence[str],
    about: Mapping[str, object],
    verdicts: Sequence[GoalResult],
    plot: str,
    *,
    name: str,
    json: Path | None,
    picture: Path | None,
) -> RunOutcome:
    """Prints and writes it all: to the results' folder under `name`, and where else it is asked for."""
    document = measurements.results_document(lines, names, about)
    document["goals"] = [
        {"goal": goal.text, "wanted": goal.wanted, "measured": value, "met": value is not None and goal.met(value)}
        for goal, value in verdicts
    ]
    measurements.write_json(document, [measurements.RESULTS_FOLDER / f"{name}.json", *([json] if json else [])])
    for path in (measurements.RESULTS_FOLDER / f"{name}.svg", *([picture] if picture else [])):
        path.write_text(plot)
    print(f"\n{tables.figures_table(lines, names)}\n\n{tables.goals_table(verdicts)}")
    if taken := tables.steal_note(lines, names):
        print(f"\n{taken}")
    failed = [line for line in lines if line.failure]
    for line in failed:
        print(f"\nFAILED {line.name}: {line.failure}")
    return RunOutcome(not failed, goals.are_all_met(verdicts))
