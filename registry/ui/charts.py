"""`Chart`: the positions and sizes of the bars of a small chart. A template of the pages draws it as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

WIDTH: Final = 600
HEIGHT: Final = 100
"""The size of a chart in the units of its SVG, which a page stretches."""
_GAP: Final = 0.2
"""The part of a bar's slot that stays empty, as a share of the slot's width. It separates the bars. There is one slot
for each bar, and all slots have the same width."""
_LEAST_HEIGHT: Final = 1.5
"""The smallest height of a part of a bar whose value is not 0, so that the part stays visible."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a bar: a rectangle. `series`: the index of the series whose value the part shows. `x` and `y`: the
    upper left corner. All lengths are in the units of `WIDTH` and `HEIGHT`."""

    series: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of stacked bars: each bar has one value of each series, one above the other. `highest`: the sum of the
    values of the highest bar. `totals`: the sum of each series."""

    parts: Sequence[Part]
    highest: int
    totals: Sequence[int]

    @classmethod
    def of(cls, *series: Sequence[int]) -> Chart:
        """Returns the chart of these series. They need the same length, and no value may be negative."""
        bars = list(zip(*series, strict=True))
        highest = max(map(sum, bars), default=0)
        slot_width = WIDTH / max(1, len(bars))
        parts: list[Part] = []
        for number, values in enumerate(bars):
            top = float(HEIGHT)
            for series_index, value in enumerate(values):
                if value:
                    height = max(_LEAST_HEIGHT, value / highest * HEIGHT)
                    top = max(0.0, top - height)
                    x, width = (number + _GAP / 2) * slot_width, slot_width * (1 - _GAP)
                    parts.append(Part(series_index, round(x, 2), round(top, 2), round(width, 2), round(height, 2)))
        return cls(parts, highest, [sum(values) for values in series])
