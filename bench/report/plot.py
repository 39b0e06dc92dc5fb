"""Draws plots as SVG: bars of ratios, and curves."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

from bench.report.measurements import RATE, SPEED, Figure, RowSamples
from bench.report.tables import number_text

WIDTH, LEFT, RIGHT, STEP, TOP = 760, 270, 90, 26, 56
"""In pixels: the width of a plot, its left and right margins, the height of a bar with its gap, and the top margin."""
CHARACTER_WIDTH = 5.8
"""Approximate width of a character of a label in pixels."""
INK, BAR, GRID = "#1f2933", "#2f6f9f", "#cfd8e0"
COLOURS = ("#2f6f9f", "#c2571a", "#4b8b3b", "#8a4fa3", "#7a7a7a")


def ratio_bars(
    measured_rows: Sequence[RowSamples], ours: str, theirs: str, *, drawn: Collection[Figure] = (RATE, SPEED)
) -> str:
    """Returns a plot as SVG. Each row has a bar for each of its figures that is in `drawn`. The bar shows the ratio of
    the subject `ours` to the subject `theirs` on a logarithmic scale."""
    bars = [
        (f"{row_samples.title}, {figure.unit}", ratio)
        for row_samples in measured_rows
        for figure in row_samples.figures
        if figure in drawn and (ratio := row_samples.ratio(ours, theirs, figure.key))
    ]
    left = max([LEFT, *(20 + round(CHARACTER_WIDTH * len(label)) for label, _ in bars)])
    low = min([0.5, *(ratio for _, ratio in bars)])
    high = max([2.0, *(ratio for _, ratio in bars)])

    def x(ratio: float) -> float:
        return left + (WIDTH - left - RIGHT) * math.log(ratio / low) / math.log(high / low)

    height = TOP + STEP * len(bars) + 30
    parts = [_text(left, 24, f"{ours}, as a multiple of {theirs}", size=15)]
    for mark in (mark for power in range(-2, 4) for mark in (10.0**power, 3 * 10.0**power) if low <= mark <= high):
        parts.append(_line(x(mark), TOP - 8, x(mark), height - 24, INK if mark == 1 else GRID))
        parts.append(_text(x(mark), height - 8, f"{mark:g}x", anchor="middle"))
    for index, (label, ratio) in enumerate(bars):
        y = TOP + STEP * index
        start, stop = sorted((x(1.0), x(ratio)))
        parts.append(_text(left - 10, y + 13, label, anchor="end"))
        parts.append(f'<rect x="{start:.1f}" y="{y}" width="{stop - start:.1f}" height="16" fill="{BAR}"/>')
        parts.append(_text(stop + 6, y + 13, f"{number_text(ratio)}x"))
    return _svg(height, parts)


def curves(title: str, sizes: Sequence[int], series: Mapping[str, Sequence[float]]) -> str:
    """Returns a plot as SVG with a curve for each series. The curve shows the ratio of each value to the first value of
    the series. The horizontal axis shows the sizes on a logarithmic scale."""
    relative = {
        name: [value / values[0] for value in values] for name, values in series.items() if values and values[0]
    }
    top = max([1.5, *(value for values in relative.values() for value in values)])
    height, left, right = 420, 60, 520  # in pixels
    low, high = math.log10(sizes[0]), math.log10(max(sizes[-1], sizes[0] * 10))

    def point(size: int, value: float) -> tuple[float, float]:
        return left + (right - left) * (math.log10(size) - low) / (high - low), height - 40 - (
            height - 100
        ) * value / top

    parts = [_text(left, 24, title, size=15)]
    for mark in (0.0, 0.5, 1.0, 1.3, 2.0, 3.0, 5.0, 10.0):
        if mark <= top:
            y = point(sizes[0], mark)[1]
            parts += [_line(left, y, right, y, GRID), _text(left - 8, y + 4, f"{mark:g}x", anchor="end")]
    parts += [_text(point(size, 0)[0], height - 18, f"{size:,}", anchor="middle") for size in sizes]
    for index, (name, values) in enumerate(relative.items()):
        colour = COLOURS[index % len(COLOURS)]
        points = " ".join(
            "{:.1f},{:.1f}".format(*point(size, value)) for size, value in zip(sizes, values, strict=False)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(right + 16, 70 + 20 * index, name, colour=colour))
    return _svg(height, parts)


def _svg(height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>', *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, colour: str = INK) -> str:
    attributes = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    return f"<text {attributes}>{escape(text)}</text>"


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
