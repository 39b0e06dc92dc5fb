"""Plain tables for a terminal, which are Markdown as well."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.goals import GoalResult
from bench.report.measurements import STEAL, RowSamples, Spread, spread

TOLERABLE_STEAL = 1.0
"""Percent of the processors that a host may take without it being said."""


def number_text(value: float) -> str:
    """Three digits or so: enough for what a measurement is worth."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.095 else f"{value:.4f}"


def spread_text(seen: Spread) -> str:
    return f"{number_text(seen.median)} [{number_text(seen.low)} to {number_text(seen.high)}]"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of one width; the first is set to the left, the others to the right."""
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]) + " |"

    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def figures_table(lines: Sequence[RowSamples], subjects: Sequence[str]) -> str:
    """A line for each figure: median and quartiles of each subject, and the first's ratio to each of the others."""
    first, *others = subjects
    rows = []
    for line in lines:
        for figure in line.figures:
            seen = [line.values(subject, figure) for subject in subjects]
            cells = [spread_text(spread(values)) if values else "-" for values in seen]
            ratios = [line.ratio(first, other, figure.key) for other in others]
            rows.append(
                [line.title, figure.unit, *cells, *(f"{number_text(r)}x" if r is not None else "-" for r in ratios)]
            )
    names = [f"{name}: median [quartiles]" for name in subjects]
    return text_table(["what", "unit", *names, *(f"{first} / {other}" for other in others)], rows)


def steal_note(lines: Sequence[RowSamples], subjects: Sequence[str]) -> str:
    """The rows during which the host took enough of the processors to show; empty: there are none."""
    found = []
    for line in lines:
        seen = [line.median(subject, STEAL.key) or 0 for subject in subjects]
        if max(seen) >= TOLERABLE_STEAL:
            each = ", ".join(f"{share:.1f} % ({name})" for name, share in zip(subjects, seen, strict=True))
            found.append(f"- {line.title}: {each}")
    head = "The host took processor time during these rows, which costs some latency and speed; medians:"
    return "\n".join([head, *found]) if found else ""


def goals_table(found: Sequence[GoalResult]) -> str:
    """Goals, and whether they are met."""
    rows = []
    for goal, value in found:
        sign = "x" if goal.relative else ""
        met = "not measured" if value is None else "met" if goal.met(value) else "not met"
        rows.append([goal.text, goal.wanted, "-" if value is None else f"{number_text(value)}{sign}", met])
    return text_table(["goal", "wanted", "measured", ""], rows)


def growth_table(lines: Sequence[RowSamples], names: Sequence[str]) -> str:
    """A column for each size: the median, and in parentheses its ratio to the smallest's."""
    rows = []
    for line in lines:
        figure = line.figures[0]
        cells = []
        for name in names:
            values = line.values(name, figure)
            against = line.ratio(name, names[0], figure.key)
            cells.append(f"{number_text(spread(values).median)} ({number_text(against or 0)}x)" if values else "-")
        rows.append([line.title, figure.unit, *cells])
    return text_table(["manifests in the store", "unit", *names], rows)
