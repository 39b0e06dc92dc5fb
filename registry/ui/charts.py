"""Computes the positions and sizes of the bars in a small chart (`Chart`). A template draws the chart as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 600
HEIGHT: Final = 100
"""`WIDTH` and `HEIGHT` are the size of a chart, in the units of its SVG. A page stretches the SVG."""
_GAP_SHARE: Final = 0.2
"""A chart has one slot for each bar. All slots have the same width. `_GAP_SHARE` is the share of this width that stays
empty, to separate the bars."""
_LEAST_HEIGHT: Final = 1.5
"""The smallest height of a part of a bar, so that small values stay visible. The value 0 has no part."""


@dataclass(frozen=True, slots=True)
class BarPart:
    """A rectangle that is a part of a bar. `series`: the index of the series whose value the part shows. `x` and `y`:
    the upper left corner. All lengths are in the units of `WIDTH` and `HEIGHT`."""

    series: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of stacked bars. Each bar stacks one value of each series. `highest`: the sum of the values in the
    highest bar. `totals`: the sum of the values in each series."""

    parts: Sequence[BarPart]
    highest: int
    totals: Sequence[int]

    @classmethod
    def of(cls, *series: Sequence[int]) -> Chart:
        """Returns the chart of these series. No value may be negative. Raises ValueError if the lengths of the series
        differ."""
        bars = list(zip(*series, strict=True))
        highest = max(map(sum, bars), default=0)
        slot_width = WIDTH / max(1, len(bars))
        parts: list[BarPart] = []
        for bar_index, values in enumerate(bars):
            top = float(HEIGHT)
            for series_index, value in enumerate(values):
                if value:
                    height = max(_LEAST_HEIGHT, value / highest * HEIGHT)
                    top = max(0.0, top - height)
                    x, width = (bar_index + _GAP_SHARE / 2) * slot_width, slot_width * (1 - _GAP_SHARE)
                    parts.append(BarPart(series_index, round(x, 2), round(top, 2), round(width, 2), round(height, 2)))
        return cls(parts, highest, [sum(values) for values in series])
