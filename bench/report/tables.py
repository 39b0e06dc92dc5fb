"""Formats results as text tables for a terminal. The tables are also valid Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from bench.report.goals import GoalResult, are_all_met
from bench.report.measurements import STEAL, RowSamples, Spread, spread

TOLERABLE_STEAL = 1.0
"""The report has a note when the host withheld at least this percentage of CPU time."""


def number_text(value: float | None) -> str:
    """Returns the number with about three digits, because measurements are no more precise; `-` for None."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.095 else f"{value:.4f}"


def ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{number_text(ratio)}x"


def spread_text(values: Spread) -> str:
    return f"{number_text(values.median)} [{number_text(values.low)} to {number_text(values.high)}]"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table with aligned columns. The text in the first column is aligned to the left, all other text to the
    right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "| " + " | ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in others)]) + " |"

    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])


def figures_table(measured_rows: Sequence[RowSamples], subjects: Sequence[str]) -> str:
    """Returns a table with a line for each figure. The line has the median and the quartiles of each subject, and the
    ratios of the first subject to all other subjects."""
    first, *others = subjects

    def cells(row_samples: RowSamples, key: str) -> list[str]:
        samples = [row_samples.values(subject, key) for subject in subjects]
        spreads = [spread_text(spread(values)) if values else "-" for values in samples]
        return [*spreads, *(ratio_text(row_samples.ratio(first, other, key)) for other in others)]

    names = [f"{name}: median [quartiles]" for name in subjects]
    rows = [
        [row_samples.title, figure.unit, *cells(row_samples, figure.key)]
        for row_samples in measured_rows
        for figure in row_samples.figures
    ]
    return text_table(["what", "unit", *names, *(f"{first} / {other}" for other in others)], rows)


def growth_table(measured_rows: Sequence[RowSamples], stores: Sequence[str]) -> str:
    """Returns a table with a line for each row and a column for each store. A cell has the median of the row's first
    figure, and its ratio to the median on the smallest store."""

    def cell(row_samples: RowSamples, store: str) -> str:
        key = row_samples.figures[0].key
        return f"{number_text(row_samples.median(store, key))} ({ratio_text(row_samples.ratio(store, stores[0], key))})"

    rows = [
        [row_samples.title, row_samples.figures[0].unit, *(cell(row_samples, store) for store in stores)]
        for row_samples in measured_rows
    ]
    return text_table(["manifests in the store", "unit", *stores], rows)


def steal_note(measured_rows: Sequence[RowSamples], subjects: Sequence[str]) -> str:
    """Returns a note about the rows during which the host withheld much CPU time; an empty text if there are no such
    rows."""
    found = []
    for row_samples in measured_rows:
        medians = [row_samples.median(subject, STEAL.key) or 0 for subject in subjects]
        if max(medians) >= TOLERABLE_STEAL:
            shares = ", ".join(f"{share:.1f} % ({name})" for name, share in zip(subjects, medians, strict=True))
            found.append(f"- {row_samples.title}: {shares}")
    head = "The host withheld processor time during these rows, which costs latency and speed; medians:"
    return "\n".join([head, *found]) if found else ""


def goals_table(results: Sequence[GoalResult]) -> str:
    """Returns a table with a line for each goal: the bound, the measured value, and whether the goal is met."""
    rows = []
    for goal, value in results:
        verdict = "not measured" if value is None else "met" if are_all_met([(goal, value)]) else "not met"
        rows.append([goal.text, goal.wanted, ratio_text(value) if goal.relative else number_text(value), verdict])
    return text_table(["goal", "wanted", "measured", ""], rows)
